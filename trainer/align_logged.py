"""GBPO without rollouts: policy gradients on what the log says that users took."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from configs.alignment import GBPOConfig
from data_loaders.prompts import PromptLoader
from models.base import TableModel
from models.batch import JaggedBatch
from sharding.parallelize import ParallelModel
from trainer.align_online import prompt_loader
from trainer.logged_steps import LoggedSteps
from trainer.objectives.logged import LoggedInputs
from trainer.policy import Worker
from trainer.probe import PROBED, PolicyProbe
from trainer.prompts import prompts_of_step
from trainer.scoring import candidates_of
from trainer.supervised import SupervisedTargets
from trainer.trainer import TrainerState
from trainer.training_stage import OneUpdate


class LoggedImpressions(OneUpdate):
    """Turns a step's sequences into one update on what users took next."""

    def __init__(self, worker: Worker, config: GBPOConfig, model: TableModel) -> None:
        super().__init__(self._inputs)
        self._worker = worker
        self._config = config
        self._model = model
        self._supervised = SupervisedTargets(worker, model, config.supervised_weight)
        self._probe = PolicyProbe(worker)

    def draw(self, start: ParallelModel, left_out: np.ndarray) -> None:
        """Have the divergence from `start` told at the prompts of the first steps. Collective.

        Args:
            start: π_ref.
            left_out: int64, samples that are not trained on.
        """
        with prompt_loader(self._worker, self._config, TrainerState()) as loader:
            loader.leave_out(left_out)
            self._probe.draw(start, self._first_contexts(loader))

    def _first_contexts(self, loader: PromptLoader) -> Iterator[JaggedBatch]:
        """Micro batches of whole steps, until there are PROBED prompts or an epoch is over; those
        that are empty on every rank left out. Collective."""
        ctx, found = self._worker.ctx, 0
        for step in islice(loader, loader.steps_per_epoch):
            contexts = [
                each.batch for each in prompts_of_step(self._worker, self._config.prompts, step)
            ]
            mine = torch.tensor([batch.num_sequences for batch in contexts], dtype=torch.float64)
            numbers = ctx.all_reduce_sum(mine.to(ctx.device)).tolist()
            yield from (batch for batch, n in zip(contexts, numbers, strict=True) if n)
            found += int(sum(numbers))
            if found >= PROBED:
                return

    def attach(self, policy: ParallelModel, logged: LoggedSteps) -> None:
        """Measure `policy` where a step is logged."""
        self._probe.attach(policy, logged)

    def _inputs(self, step: Any) -> list[LoggedInputs]:
        """Inputs of each micro batch of this rank. Collective."""
        prompts = prompts_of_step(self._worker, self._config.prompts, step)
        candidates = [
            candidates_of(self._worker, self._model, each.batch, each.target_ids[:, None])
            for each in prompts
        ]
        supervised = self._supervised(candidates, step.step)
        told = self._probe.measures([each.batch for each in prompts], step.step, None)
        made = []
        for at, each in enumerate(prompts):
            assert each.outcomes is not None, "the loader has the rule"
            measures = told[at] if told is not None else {}
            made.append(LoggedInputs(candidates[at], each.outcomes, supervised[at], measures))
        return made
