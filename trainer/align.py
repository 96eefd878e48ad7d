"""Alignment: preference optimisation from a pretrained checkpoint, on the same worker group."""

from collections.abc import Callable
from typing import Any

import torch

from configs import storage
from configs.alignment import OfflineAlignment
from data_loaders.loader import LoaderState
from data_loaders.preferences import (
    PreferenceLoader,
    commit_reference,
    preference_batches,
    write_reference,
)
from models.base import CodeDecoder, TableModel
from sharding.parallelize import ParallelModel
from trainer.evaluate import load_policy, preference_accuracy, validation_ranker
from trainer.objectives.dpo import PreferenceInputs, PreferenceLoss
from trainer.objectives.scoring import Supervised
from trainer.policy import Say, Worker, open_checkpoint, start_worker
from trainer.pretrain import NextItemInputsMaker
from trainer.scoring import Likelihood, build_scorer, next_code_targets, pair_candidates
from trainer.trainer import Limits, TrainerState
from trainer.training_stage import TrainingStage


def align_worker(settings: dict[str, Any], say: Say) -> dict[str, Any]:
    """Align on this rank; rank 0's answer names the selected checkpoint.

    Args:
        settings: `recipe`, `output`, `fingerprint` (of the stage), `start` (checkpoint reference of
            the pretrained policy), `pairs` and `reference` (URLs).
        say: prints a line at the driver.
    """
    worker = start_worker(settings, say)
    recipe, config = worker.recipe, worker.recipe.alignment
    assert config is not None, "the align stage exists only with an alignment block"
    pairs, reference, start = settings["pairs"], settings["reference"], settings["start"]

    def before(policy: ParallelModel, afresh: bool) -> None:
        write_reference_once(worker, policy, settings)
        if afresh:
            store, info = open_checkpoint(worker, start)
            store.load_start(policy, info)

    def validator(policy: ParallelModel) -> Callable[[], dict[str, float]]:
        max_users = config.validation.max_users if config.validation is not None else None
        rank = validation_ranker(worker, policy, max_users)
        return lambda: rank() | {"preference_accuracy": preference_accuracy(worker, policy, pairs)}

    loss = PreferenceLoss(build_scorer(worker, normalised=False), config)
    with preference_loader(worker, config, pairs, None, TrainerState()) as probe:
        steps_per_epoch = probe.steps_per_epoch
    stage = TrainingStage(
        worker=worker,
        name="align",
        fingerprint=settings["fingerprint"],
        config=config,
        limits=Limits(config.epochs, None),
        sparse_lr=recipe.sharding.optimizer.lr * config.sparse_lr_ratio,
        loss=loss,
        steps_per_epoch=steps_per_epoch,
        loader_at=lambda state: preference_loader(worker, config, pairs, reference, state),
        make_inputs=PreferenceInputsMaker(worker, config, loss.model),
        validator=validator,
        before=before,
        measure_start=True,
        hashes={"start": start["hash"]},
    )
    return stage.fit()


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


class PreferenceInputsMaker:
    """Turns a step's pairs into loss inputs, with targets for the supervised term."""

    def __init__(self, worker: Worker, config: OfflineAlignment, model: TableModel) -> None:
        self._worker = worker
        self._model = model
        self._device = worker.ctx.device
        self._supervises = config.supervised_weight > 0
        self._next_item: NextItemInputsMaker | None = None
        if self._supervises and not isinstance(model, CodeDecoder):
            self._next_item = NextItemInputsMaker(worker)

    def __call__(self, step: Any) -> list[PreferenceInputs]:
        """Inputs of each micro batch of this rank. Collective if positives are shared."""
        pairs = step.micro_batches
        candidates = [pair_candidates(self._worker, self._model, batch) for batch in pairs]
        supervised: list[Supervised | None] = [None] * len(pairs)
        if self._next_item is not None:
            supervised = [*self._next_item([batch.batch for batch in pairs], step.step)]
        elif self._supervises:
            assert isinstance(self._model, CodeDecoder)
            supervised = [
                next_code_targets(self._worker, self._model, each.batch) for each in candidates
            ]
        reference = [
            torch.cat([batch.reference_chosen[:, None], batch.reference_rejected], dim=1)
            for batch in pairs
        ]
        return [
            PreferenceInputs(*parts).to(self._device)
            for parts in zip(candidates, reference, supervised, strict=True)
        ]


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
        commit_reference(url, worker.ctx.world_size, settings["start"]["hash"])
    worker.ctx.barrier()
