"""Pretraining: next-item prediction over user sequences."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.objectives import MultiTaskConfig, NextCodeConfig, SampledSoftmaxConfig
from data_loaders.histories import HistoryLoader
from data_loaders.items import train_counts
from data_loaders.loader import LoaderState, TrainingLoader
from models.batch import JaggedBatch
from sharding.parallelize import ParallelModel
from trainer.codes import NextCodeInputsMaker
from trainer.evaluate import uses_validation, validation_ranker
from trainer.in_batch import gather_positives
from trainer.losses import pretraining_loss
from trainer.metrics import Measured
from trainer.objectives.multi_task import MultiTaskLoss
from trainer.objectives.negatives import draw_negatives
from trainer.objectives.next_code import NextCodeLoss
from trainer.objectives.next_item import NextItemInputs, NextItemLoss
from trainer.policy import Say, Worker, start_worker
from trainer.trainer import Limits, TrainerState
from trainer.training_stage import OneUpdate, TrainingStage
from trainer.warm_start import WarmStart


class NextItemInputsMaker:
    """Turns a step's batches into loss inputs: draws the negatives of the global batch."""

    def __init__(self, worker: Worker) -> None:
        objective = worker.recipe.objective
        assert not isinstance(objective, NextCodeConfig | MultiTaskConfig), "see a recipe's checks"
        self._objective = objective
        self._seed = worker.recipe.seed
        self._num_items = worker.num_items
        self._ctx = worker.ctx
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
    loss = pretraining_loss(worker)
    make_inputs: NextItemInputsMaker | NextCodeInputsMaker
    if isinstance(loss, NextCodeLoss):
        make_inputs = NextCodeInputsMaker(worker, loss.model)
    else:
        make_inputs = NextItemInputsMaker(worker)
    return fit_from_start(
        worker,
        settings,
        loss,
        make_inputs,
        loader_at=lambda state: training_loader(worker, state),
        validator=lambda policy, users: validation_ranker(worker, policy, users),
    )


def fit_from_start(
    worker: Worker,
    settings: dict[str, Any],
    loss: NextItemLoss | NextCodeLoss | MultiTaskLoss,
    make_inputs: Callable[[Sequence[JaggedBatch], int], Sequence[Any]],
    loader_at: Callable[[TrainerState], TrainingLoader | HistoryLoader],
    validator: Callable[[ParallelModel, int | None], Callable[[], Measured]],
) -> dict[str, Any]:
    """Train a model that no earlier stage of the recipe trained, by the block `training`.

    Args:
        worker: this rank.
        settings: as of `train_worker`.
        loss: holds the model.
        make_inputs: loss inputs of each micro batch of a step.
        loader_at: the stage's loader at the position of a state.
        validator: of a policy and the most users to ask; measures it on validation.

    Returns:
        Outputs that name the selected checkpoint.
    """
    recipe, config = worker.recipe, worker.recipe.training
    max_users = config.validation.max_users if config.validation is not None else None
    with loader_at(TrainerState()) as probe:
        steps_per_epoch = probe.steps_per_epoch
    return TrainingStage(
        worker=worker,
        name="train",
        fingerprint=settings["fingerprint"],
        config=config,
        limits=Limits(config.epochs, config.max_steps),
        sparse_lr=recipe.sharding.optimizer.lr,
        loss=loss,
        steps_per_epoch=steps_per_epoch,
        before=WarmStart(worker, settings["start"]),
        loader_at=loader_at,
        updates=OneUpdate(lambda step: make_inputs(step.micro_batches, step.step)),
        validator=lambda policy: validator(policy, max_users),
    ).fit()


def training_loader(worker: Worker, state: TrainerState) -> TrainingLoader:
    """The recipe's loader, at the state's position."""
    return TrainingLoader(
        worker.dataset,
        worker.recipe.data.loader,
        seed=worker.recipe.seed,
        rank=worker.ctx.rank,
        world_size=worker.ctx.world_size,
        include_validation=not uses_validation(worker.recipe),
        state=LoaderState(**state.loader) if state.loader else None,
    )
