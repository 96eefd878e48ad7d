"""Alignment: preference optimisation from a pretrained checkpoint, on the same worker group."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from configs import storage
from configs.alignment import DPOConfig
from configs.objectives import ItemObjective, NextCodeConfig
from configs.recipe import Recipe
from data_loaders.loader import LoaderState
from data_loaders.preferences import (
    PreferenceLoader,
    commit_reference,
    preference_batches,
    write_reference,
)
from models.batch import PreferenceBatch
from sharding.parallelize import ParallelModel
from sharding.retrieval import Catalogue
from trainer.evaluate import load_policy, preference_accuracy, validation_ranker
from trainer.objectives.dpo import PreferenceInputs, PreferenceLoss
from trainer.policy import (
    Say,
    Worker,
    build_sequence_model,
    open_checkpoint,
    start_worker,
)
from trainer.pretrain import (
    NextItemInputsMaker,
)
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
    objective = item_objective(recipe)
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

    with preference_loader(worker, config, pairs, None, TrainerState()) as probe:
        steps_per_epoch = probe.steps_per_epoch
    stage = TrainingStage(
        worker=worker,
        name="align",
        fingerprint=settings["fingerprint"],
        config=config,
        limits=Limits(config.epochs, None),
        sparse_lr=recipe.sharding.optimizer.lr * config.sparse_lr_ratio,
        loss=PreferenceLoss(build_sequence_model(worker), config, objective, worker.num_items),
        steps_per_epoch=steps_per_epoch,
        loader_at=lambda state: preference_loader(worker, config, pairs, reference, state),
        make_inputs=PreferenceInputsMaker(worker, config),
        validator=validator,
        before=before,
        measure_start=True,
        hashes={"start": start["hash"]},
    )
    return stage.fit()


def item_objective(recipe: Recipe) -> ItemObjective:
    """The objective of a recipe whose model scores items."""
    objective = recipe.objective
    assert not isinstance(objective, NextCodeConfig), "a recipe's checks tell decoders apart"
    return objective


def preference_loader(
    worker: Worker,
    config: DPOConfig,
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
    """Turns a step's pairs into loss inputs, with negatives for the supervised term."""

    def __init__(self, worker: Worker, config: DPOConfig) -> None:
        self._device = worker.ctx.device
        self._next_item = NextItemInputsMaker(worker) if config.supervised_weight > 0 else None

    def __call__(self, step: Any) -> list[PreferenceInputs]:
        """Inputs of each micro batch of this rank. Collective if positives are shared."""
        pairs = [batch.to(self._device) for batch in step.micro_batches]
        if self._next_item is None:
            return [PreferenceInputs(batch, None) for batch in pairs]
        supervised = self._next_item([batch.batch for batch in pairs], step.step)
        return [PreferenceInputs(*both) for both in zip(pairs, supervised, strict=True)]


def write_reference_once(worker: Worker, policy: ParallelModel, settings: dict[str, Any]) -> None:
    """Catalogue log-probabilities of every pair under the starting policy. Collective.

    They are computed once and keyed by the checkpoint's hash; a resumed stage finds them.
    """
    url = settings["reference"]
    done = storage.exists(storage.join(url, "manifest.json")) if worker.ctx.rank == 0 else False
    if worker.ctx.broadcast_object(done):
        return
    load_policy(worker, policy, settings["start"])
    temperature = item_objective(worker.recipe).temperature
    catalogue = Catalogue(policy, worker.num_items, worker.recipe.evaluation.catalogue_chunk)
    ids, chosen, rejected = [], [], []
    for pairs in preference_batches(
        settings["pairs"],
        "all",
        pairs_per_batch=worker.recipe.evaluation.users_per_batch,
        rank=worker.ctx.rank,
        world_size=worker.ctx.world_size,
    ):
        pairs = pairs.to(worker.ctx.device)
        log_probs = catalogue_log_probs(policy, catalogue, pairs, temperature)
        ids.append(pairs.pair_ids.cpu())
        chosen.append(log_probs[0].cpu())
        rejected.append(log_probs[1].cpu())
    write_reference(
        url,
        worker.ctx.rank,
        torch.cat(ids).numpy(),
        torch.cat(chosen).numpy(),
        torch.cat(rejected).numpy(),
    )
    worker.ctx.barrier()
    if worker.ctx.rank == 0:
        commit_reference(url, worker.ctx.world_size, settings["start"]["hash"])
    worker.ctx.barrier()


def catalogue_log_probs(
    policy: ParallelModel, catalogue: Catalogue, pairs: PreferenceBatch, temperature: float
) -> tuple[Tensor, Tensor]:
    """log π(chosen | context) and log π(rejected | context), each [b]. Collective.

    π is the softmax of score / temperature over the whole catalogue, whose log-sum-exp is computed
    over the sharded table.
    """
    queries = policy.query(pairs.batch)[pairs.batch.offsets[1:] - 1]
    log_z = catalogue.log_sum_exp(queries, temperature)
    both = [
        (queries * policy.item_keys(ids)).sum(-1) / temperature - log_z
        for ids in (pairs.chosen_ids, pairs.rejected_ids)
    ]
    return both[0], both[1]
