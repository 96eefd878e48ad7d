"""Pretraining: next-item prediction over user sequences."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from configs.objectives import SampledSoftmaxConfig
from data_loaders.items import train_counts
from data_loaders.loader import LoaderState, TrainingLoader
from models.batch import JaggedBatch
from sharding.checkpoint import CheckpointInfo, CheckpointStore
from sharding.parallelize import ParallelModel
from trainer.evaluate import uses_validation, validation_ranker
from trainer.in_batch import gather_positives
from trainer.monitor.stage_monitor import StageMonitor
from trainer.objectives.negatives import draw_negatives
from trainer.objectives.next_item import NextItemInputs, NextItemLoss
from trainer.policy import (
    Say,
    Worker,
    build_sequence_model,
    checkpoint_reference,
    parallelize_policy,
    provenance,
    start_worker,
)
from trainer.trainer import Limits, Trainer, TrainerState


class NextItemInputsMaker:
    """Turns a step's batches into loss inputs: draws the negatives of the global batch."""

    def __init__(self, worker: Worker) -> None:
        self._objective = worker.recipe.objective
        self._seed = worker.recipe.seed
        self._num_items = worker.num_items
        self._ctx = worker.ctx
        objective = worker.recipe.objective
        self._num_in_batch = 0
        self._counts: Tensor | None = None
        if isinstance(objective, SampledSoftmaxConfig) and objective.negatives != "uniform":
            self._num_in_batch = objective.in_batch_negatives
            if objective.logq_correction:
                counts = train_counts(worker.layout.data)
                self._counts = torch.cat([counts.new_zeros(1), counts])  # by item id

    def __call__(self, batches: Sequence[JaggedBatch], step: int) -> list[NextItemInputs]:
        """Inputs of each micro batch of this rank. Collective if positives are shared."""
        batches = [batch.to(self._ctx.device) for batch in batches]
        positives: Tensor | None = None
        if self._num_in_batch:
            positives = gather_positives(batches, self._num_in_batch, self._seed, step, self._ctx)
        return [
            draw_negatives(
                self._objective,
                batch,
                num_items=self._num_items,
                seed=self._seed,
                step=step,
                global_positives=positives,
                item_counts=self._counts,
            )
            for batch in batches
        ]


def train_worker(settings: dict[str, Any], say: Say) -> dict[str, Any]:
    """Pretrain on this rank; rank 0's answer names the selected checkpoint.

    Args:
        settings: `recipe`, `output` and `fingerprint` (of the stage: keys its checkpoints).
        say: prints a line at the driver.
    """
    worker = start_worker(settings, say)
    recipe, config = worker.recipe, worker.recipe.training
    model = build_sequence_model(worker)
    loss_module = NextItemLoss(model, recipe.objective, worker.num_items)
    newest, best = stage_stores(worker, "train", settings["fingerprint"], config.checkpoint.keep)
    info = newest.newest()
    limits = Limits(config.epochs, config.max_steps)
    with training_loader(worker, None) as probe:
        total_steps = limits.total_steps(probe.steps_per_epoch)
    policy = parallelize_policy(
        worker,
        model,
        loss_module,
        total_steps=total_steps,
        optimizer=config.optimizer,
        sparse_lr=recipe.sharding.optimizer.lr,
    )
    state = resume(worker, policy, newest, info)
    validation = config.validation
    make_inputs = NextItemInputsMaker(worker)
    trainer = Trainer(
        model=policy,
        loader=training_loader(worker, state),
        make_inputs=lambda step: make_inputs(step.micro_batches, step.step),
        limits=limits,
        state=state,
        newest=newest,
        best=best,
        checkpoint=config.checkpoint,
        save=saver(worker, policy, stage=settings["fingerprint"]),
        validation=validation,
        validate=None
        if validation is None
        else validation_ranker(worker, policy, validation.max_users),
        log_every=config.log_every_steps,
        monitor=stage_monitor(
            worker,
            policy,
            "train",
            settings["fingerprint"],
            total_steps,
            loss_module.flops_per_token(mean_length(worker)),
        ),
    )
    return outcome(trainer.train(), newest, best)


def training_loader(worker: Worker, state: TrainerState | None) -> TrainingLoader:
    """The recipe's loader, at the state's position."""
    return TrainingLoader(
        worker.dataset,
        worker.recipe.data.loader,
        seed=worker.recipe.seed,
        rank=worker.ctx.rank,
        world_size=worker.ctx.world_size,
        include_validation=not uses_validation(worker.recipe),
        state=LoaderState(**state.loader) if state is not None and state.loader else None,
    )


def stage_stores(
    worker: Worker, stage: str, fingerprint: str, keep: int
) -> tuple[CheckpointStore, CheckpointStore]:
    """The newest checkpoints of a stage, and the best one apart from them."""
    layout = worker.layout
    return (
        CheckpointStore(layout.checkpoints(stage, fingerprint), keep=keep, ctx=worker.ctx),
        CheckpointStore(layout.best(stage, fingerprint), keep=2, ctx=worker.ctx),
    )


def resume(
    worker: Worker, policy: ParallelModel, store: CheckpointStore, info: CheckpointInfo | None
) -> TrainerState:
    """Continue from a checkpoint where there is one."""
    if info is None:
        return TrainerState()
    state = TrainerState(**store.load(policy, info))
    worker.tell(f"resuming from step {info.step:,} ({info.url})")
    return state


def saver(worker: Worker, policy: ParallelModel, **hashes: str) -> Any:
    """Function that saves the policy with the recipe and its provenance."""
    recipe_json = worker.recipe.model_dump(mode="json")
    fingerprints = provenance(worker, **hashes)

    def save(store: CheckpointStore, state: dict[str, Any]) -> CheckpointInfo:
        return store.save(policy, policy.step, state, recipe_json, fingerprints)

    return save


def mean_length(worker: Worker) -> float:
    """Tokens of a mean sequence, for counting FLOPs."""
    manifest = worker.dataset.manifest
    longest = float(worker.recipe.data.loader.max_length)
    return min(manifest.num_events / max(manifest.num_users, 1), longest)


def stage_monitor(
    worker: Worker,
    policy: ParallelModel,
    stage: str,
    fingerprint: str,
    total_steps: int,
    forward_flops_per_token: float,
) -> StageMonitor | None:
    """Rank 0's monitor."""
    if worker.ctx.rank != 0:
        return None
    recipe = worker.recipe
    return StageMonitor(
        stage,
        total_steps=total_steps,
        start_step=policy.step,
        directory_url=worker.layout.metrics(stage, fingerprint),
        forward_flops_per_token=forward_flops_per_token,
        world_size=worker.ctx.world_size,
        device=worker.ctx.device,
        dtype=torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32,
        say=worker.say,
    )


def outcome(state: TrainerState, newest: CheckpointStore, best: CheckpointStore) -> dict[str, Any]:
    """A training stage's outputs: the checkpoint that later stages start from. Collective."""
    last = newest.newest()
    selected = best.newest() if state.best_value is not None else last
    assert last is not None and selected is not None, "a finished stage has saved"
    return {
        "checkpoint": checkpoint_reference(selected),
        "last_checkpoint": checkpoint_reference(last),
        "selected_on": "validation" if state.best_value is not None else "last step",
        "best_value": state.best_value,
        "best_epoch": state.best_epoch + 1,
        "steps": last.step,
    }
