"""Pretraining: next-item prediction over user sequences."""

from typing import Any

import torch

from configs.objectives import SampledSoftmaxConfig
from configs.recipe import Recipe
from data_loaders.loader import LoaderState, StepBatches, TrainingLoader
from sharding.checkpoint import CheckpointInfo, CheckpointStore
from sharding.process_group import DistributedContext
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

    def __init__(self, recipe: Recipe, num_items: int, ctx: DistributedContext) -> None:
        self._objective = recipe.objective
        self._seed = recipe.seed
        self._num_items = num_items
        self._ctx = ctx

    def __call__(self, batches: StepBatches) -> list[NextItemInputs]:
        """Inputs of each micro batch of this rank. Collective if positives are shared."""
        positives = None
        objective = self._objective
        if isinstance(objective, SampledSoftmaxConfig) and objective.negatives != "uniform":
            positives = gather_positives(
                batches.micro_batches,
                objective.in_batch_negatives,
                self._seed,
                batches.step,
                self._ctx,
            )
        return [
            draw_negatives(
                objective,
                batch.to(self._ctx.device),
                num_items=self._num_items,
                seed=self._seed,
                step=batches.step,
                global_positives=positives,
            )
            for batch in batches.micro_batches
        ]


def train_worker(settings: dict[str, Any], say: Say) -> dict[str, Any]:
    """Pretrain on this rank; rank 0's answer names the selected checkpoint.

    Args:
        settings: `recipe`, `output` and `fingerprint` (of the stage: keys its checkpoints).
        say: prints a line at the driver.
    """
    worker = start_worker(settings, say)
    recipe, ctx, config = worker.recipe, worker.ctx, worker.recipe.training
    model = build_sequence_model(worker)
    newest, best = stage_stores(worker, "train", settings["fingerprint"], config.checkpoint.keep)
    loader_options = {
        "seed": recipe.seed,
        "rank": ctx.rank,
        "world_size": ctx.world_size,
        "include_validation": not uses_validation(recipe),
    }
    info = newest.newest()
    limits = Limits(config.epochs, config.max_steps)
    probe = TrainingLoader(worker.dataset, recipe.data.loader, **loader_options)
    total_steps = limits.total_steps(probe.steps_per_epoch)
    probe.close()
    policy = parallelize_policy(
        worker,
        model,
        NextItemLoss(model, recipe.objective, worker.num_items),
        total_steps=total_steps,
        optimizer=config.optimizer,
        sparse_lr=recipe.sharding.optimizer.lr,
    )
    state = resume(worker, policy, newest, info)
    loader = TrainingLoader(
        worker.dataset,
        recipe.data.loader,
        state=LoaderState(**state.loader) if state.loader else None,
        **loader_options,
    )
    validation = config.validation
    trainer = Trainer(
        model=policy,
        loader=loader,
        make_inputs=NextItemInputsMaker(recipe, worker.num_items, ctx),
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
        monitor=stage_monitor(worker, policy, "train", settings["fingerprint"], total_steps),
    )
    return outcome(trainer.train(), newest, best)


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
    worker: Worker, policy: Any, store: CheckpointStore, info: CheckpointInfo | None
) -> TrainerState:
    """Continue from a checkpoint where there is one."""
    if info is None:
        return TrainerState()
    state = TrainerState(**store.load(policy, info))
    worker.tell(f"resuming from step {info.step:,} ({info.url})")
    return state


def saver(worker: Worker, policy: Any, **hashes: str) -> Any:
    """Function that saves the policy with the recipe and its provenance."""
    recipe_json = worker.recipe.model_dump(mode="json")
    fingerprints = provenance(worker, **hashes)

    def save(store: CheckpointStore, state: dict[str, Any]) -> CheckpointInfo:
        return store.save(policy, policy.step, state, recipe_json, fingerprints)

    return save


def stage_monitor(
    worker: Worker, policy: Any, stage: str, fingerprint: str, total_steps: int
) -> StageMonitor | None:
    """Rank 0's monitor."""
    if worker.ctx.rank != 0:
        return None
    manifest, recipe = worker.dataset.manifest, worker.recipe
    mean_length = min(
        manifest.num_events / max(manifest.num_users, 1), float(recipe.data.loader.max_length)
    )
    return StageMonitor(
        stage,
        total_steps=total_steps,
        start_step=policy.step,
        directory_url=worker.layout.metrics(stage, fingerprint),
        forward_flops_per_token=policy.model.flops_per_token(mean_length),
        world_size=worker.ctx.world_size,
        device=worker.ctx.device,
        dtype=torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32,
        say=worker.say,
    )


def outcome(
    state: TrainerState, newest: CheckpointStore, best: CheckpointStore
) -> dict[str, Any]:
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
