"""Alignment: preference optimisation from a pretrained checkpoint, on the same worker group."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from configs import storage
from configs.alignment import (
    AlignmentBase,
    GBPOConfig,
    GeneratedAlignment,
    GeneratedPairsBase,
    OfflineAlignment,
    OnlineAlignment,
    OnlineBase,
)
from configs.layout import weights_hash
from configs.policy_gradient import ReferenceConfig
from data_loaders.loader import LoaderState
from data_loaders.preferences import (
    PreferenceLoader,
    commit_reference,
    preference_batches,
    write_reference,
)
from models.base import TableModel
from sharding.parallelize import ParallelModel
from trainer.align_actors import ActorUpdates
from trainer.align_generated import GeneratedPairs
from trainer.align_logged import LoggedImpressions
from trainer.align_online import OnlineUpdates, prompt_loader
from trainer.evaluate import load_policy, preference_accuracy, validation_ranker
from trainer.left_out import left_out_samples
from trainer.logged_steps import LoggedSteps
from trainer.metrics import Measured
from trainer.objectives.dpo import PreferenceInputs, PreferenceLoss
from trainer.objectives.logged import LoggedLoss
from trainer.objectives.online import OnlineLoss
from trainer.policy import Say, Worker, open_checkpoint, start_worker
from trainer.probe import PROBED, PolicyProbe
from trainer.reference_policy import ReferencePolicy
from trainer.rollout_actors import RolloutActors, snapshots_url
from trainer.scoring import Likelihood, build_scorer, pair_candidates
from trainer.supervised import SupervisedTargets
from trainer.trainer import Limits, StepLoader, TrainerState
from trainer.training_stage import OneUpdate, TrainingStage


def align_worker(settings: dict[str, Any], say: Say) -> dict[str, Any]:
    """Align on this rank; rank 0's answer names the selected checkpoint.

    Args:
        settings: `recipe`, `output`, `fingerprint` (of the stage), `start` (checkpoint reference of
            the pretrained policy), `pairs` and `reference` (URLs; pairs may be null where online
            alignment has no rule).
        say: prints a line at the driver.
    """
    worker = start_worker(settings, say)
    config = worker.recipe.alignment
    assert config is not None, "the align stage exists only with an alignment block"
    if isinstance(config, GBPOConfig) and not config.generates:
        return logged_stage(worker, config, settings).fit()
    if isinstance(config, OnlineBase):
        return online_stage(worker, config, settings).fit()
    if isinstance(config, GeneratedPairsBase):
        return generated_stage(worker, config, settings).fit()
    return offline_stage(worker, config, settings).fit()


def offline_stage(
    worker: Worker, config: OfflineAlignment, settings: dict[str, Any]
) -> TrainingStage:
    """Preference optimisation on pairs of the log."""
    pairs, reference = settings["pairs"], settings["reference"]
    loss = PreferenceLoss(build_scorer(worker, normalised=False), config)
    with preference_loader(worker, config, pairs, None, TrainerState()) as probe:
        steps = probe.steps_per_epoch

    updates = LoggedPairs(worker, config, loss.model)

    def before(policy: ParallelModel, afresh: bool) -> None:
        write_reference_once(worker, policy, settings)
        load_policy(worker, policy, settings["start"])
        updates.draw(policy, pairs)
        load_pretrained(worker, policy, settings, afresh)

    return TrainingStage(
        loss=loss,
        steps_per_epoch=steps,
        loader_at=lambda state: preference_loader(worker, config, pairs, reference, state),
        updates=updates,
        before=before,
        **shared_settings(worker, config, settings),
    )


def online_stage(
    worker: Worker, config: OnlineAlignment, settings: dict[str, Any]
) -> TrainingStage:
    """Policy gradients on what the policy itself generates."""
    loss = OnlineLoss(build_scorer(worker, normalised=True), config)
    reference = None
    if config.reference is not None:
        reference = ReferencePolicy(
            worker,
            config.reference,
            OnlineLoss(build_scorer(worker, normalised=True), config),
            settings["start"],
        )
    with prompt_loader(worker, config, TrainerState()) as probe:
        batches = probe.steps_per_epoch
    updates = OnlineUpdates(worker, config, loss, reference)
    loader_at: Callable[[TrainerState], StepLoader] = partial(prompt_loader, worker, config)
    if config.rollout_actors is not None:
        url = snapshots_url(worker.layout.checkpoints("align", settings["fingerprint"]))
        actors = RolloutActors(worker, config.rollout_actors, settings, url)
        updates = from_actors = ActorUpdates(worker, config, loss, reference, actors)
        loader_at = from_actors.loader
    return TrainingStage(
        loss=loss,
        steps_per_epoch=batches * config.inner_epochs,
        loader_at=loader_at,
        updates=updates,
        before=lambda policy, afresh: load_pretrained(worker, policy, settings, afresh),
        **shared_settings(worker, config, settings),
    )


def logged_stage(worker: Worker, config: GBPOConfig, settings: dict[str, Any]) -> TrainingStage:
    """Policy gradients on what the log says that users took, and nothing else."""
    loss = LoggedLoss(build_scorer(worker, normalised=True), config)
    with prompt_loader(worker, config, TrainerState()) as probe:
        steps = probe.steps_per_epoch
    updates = LoggedImpressions(worker, config, loss.model)

    def before(policy: ParallelModel, afresh: bool) -> None:
        load_policy(worker, policy, settings["start"])
        updates.draw(policy, left_out_samples(worker))
        load_pretrained(worker, policy, settings, afresh)

    return TrainingStage(
        loss=loss,
        steps_per_epoch=steps,
        loader_at=lambda state: prompt_loader(worker, config, state),
        updates=updates,
        before=before,
        **shared_settings(worker, config, settings),
    )


def generated_stage(
    worker: Worker, config: GeneratedAlignment, settings: dict[str, Any]
) -> TrainingStage:
    """Preference optimisation on pairs that the policy of the round's start generates."""
    loss = PreferenceLoss(build_scorer(worker, normalised=False), config)
    start = ReferencePolicy(
        worker,
        ReferenceConfig(sync_every_steps=config.round_steps, mixing=1.0),
        PreferenceLoss(build_scorer(worker, normalised=False), config),
        settings["start"],
    )
    with prompt_loader(worker, config, TrainerState()) as probe:
        steps = probe.steps_per_epoch
    return TrainingStage(
        loss=loss,
        steps_per_epoch=steps,
        loader_at=lambda state: prompt_loader(worker, config, state),
        updates=GeneratedPairs(worker, config, loss, start),
        before=lambda policy, afresh: load_pretrained(worker, policy, settings, afresh),
        **shared_settings(worker, config, settings),
    )


def shared_settings(
    worker: Worker, config: AlignmentBase, settings: dict[str, Any]
) -> dict[str, Any]:
    """What all alignment stages are told alike."""

    def validator(policy: ParallelModel) -> Callable[[], Measured]:
        max_users = config.validation.max_users if config.validation is not None else None
        pairs = settings["pairs"]
        if pairs is None:
            return validation_ranker(worker, policy, max_users)
        rank = validation_ranker(worker, policy, max_users, config.rule)

        def measure() -> Measured:
            found = rank()
            found.metrics["preference_accuracy"] = preference_accuracy(worker, policy, pairs)
            return found

        return measure

    return {
        "worker": worker,
        "name": "align",
        "fingerprint": settings["fingerprint"],
        "config": config,
        "limits": Limits(config.epochs, None),
        "sparse_lr": worker.recipe.sharding.optimizer.lr * config.sparse_lr_ratio,
        "validator": validator,
        "measure_start": True,
        "hashes": {"start": weights_hash(settings["start"])},
    }


def load_pretrained(
    worker: Worker, policy: ParallelModel, settings: dict[str, Any], afresh: bool
) -> None:
    """Begin with the pretrained policy, unless the stage goes on from a checkpoint. Collective."""
    if afresh:
        store, info = open_checkpoint(worker, settings["start"])
        store.load_start(policy, info)


def preference_loader(
    worker: Worker,
    config: OfflineAlignment,
    pairs_url: str,
    reference_url: str | None,
    state: TrainerState,
) -> PreferenceLoader:
    """The loader of training pairs, at the state's position."""
    return PreferenceLoader(
        pairs_url,
        reference_url=reference_url,
        pairs_per_step=config.pairs_per_step,
        loader=worker.recipe.data.loader,
        seed=worker.recipe.seed,
        rank=worker.ctx.rank,
        world_size=worker.ctx.world_size,
        state=LoaderState(**state.loader) if state.loader else None,
    )


class LoggedPairs(OneUpdate):
    """Turns a step's pairs into one update, with targets for the supervised term."""

    def __init__(self, worker: Worker, config: OfflineAlignment, model: TableModel) -> None:
        super().__init__(self._inputs)
        self._worker = worker
        self._model = model
        self._supervised = SupervisedTargets(worker, model, config.supervised_weight)
        self._probe = PolicyProbe(worker)

    def draw(self, start: ParallelModel, pairs_url: str) -> None:
        """Have the divergence from `start` told in the contexts of a few pairs. Collective."""
        ctx = self._worker.ctx
        few = preference_batches(
            pairs_url,
            "train",
            pairs_per_batch=self._worker.recipe.evaluation.users_per_batch,
            rank=ctx.rank,
            world_size=ctx.world_size,
            most=PROBED,
        )
        self._probe.draw(start, (pairs.batch for pairs in few))

    def attach(self, policy: ParallelModel, logged: LoggedSteps) -> None:
        """Measure `policy` where a step is logged."""
        self._probe.attach(policy, logged)

    def _inputs(self, step: Any) -> list[PreferenceInputs]:
        """Inputs of each micro batch of this rank. Collective."""
        pairs = step.micro_batches
        candidates = [pair_candidates(self._worker, self._model, batch) for batch in pairs]
        reference = [
            torch.cat([batch.reference_chosen[:, None], batch.reference_rejected], dim=1)
            for batch in pairs
        ]
        supervised = self._supervised(candidates, step.step)
        inputs = [
            PreferenceInputs(*parts).to(self._worker.ctx.device)
            for parts in zip(candidates, reference, supervised, strict=True)
        ]
        return self._probe(inputs, [batch.batch for batch in pairs], step.step, None)


def write_reference_once(worker: Worker, policy: ParallelModel, settings: dict[str, Any]) -> None:
    """log π of every pair's items under the starting policy. Collective.

    They are computed once and keyed by the checkpoint's hash; a resumed stage finds them.
    """
    url = settings["reference"]
    done = storage.exists(storage.join(url, "manifest.json")) if worker.ctx.rank == 0 else False
    if worker.ctx.broadcast_object(done):
        return
    load_policy(worker, policy, settings["start"])
    likelihood = Likelihood.of(worker, policy)
    ids, log_probs = [], []
    for pairs in preference_batches(
        settings["pairs"],
        "all",
        pairs_per_batch=worker.recipe.evaluation.users_per_batch,
        rank=worker.ctx.rank,
        world_size=worker.ctx.world_size,
    ):
        ids.append(pairs.pair_ids)
        log_probs.append(likelihood(pair_candidates(worker, policy.model, pairs)).cpu())
    both = torch.cat(log_probs).numpy()
    write_reference(url, worker.ctx.rank, torch.cat(ids).numpy(), both[:, 0], both[:, 1:])
    worker.ctx.barrier()
    if worker.ctx.rank == 0:
        commit_reference(url, worker.ctx.world_size, weights_hash(settings["start"]))
    worker.ctx.barrier()
