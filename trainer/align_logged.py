"""GBPO without rollouts: policy gradients on what the log says that users took."""

from typing import Any

from configs.alignment import GBPOConfig
from models.base import TableModel
from sharding.parallelize import ParallelModel
from trainer.align_online import prompt_loader
from trainer.objectives.logged import LoggedInputs
from trainer.policy import Worker
from trainer.probe import PolicyProbe
from trainer.prompts import prompts_of_step
from trainer.scoring import candidates_of
from trainer.supervised import SupervisedTargets
from trainer.trainer import TrainerState
from trainer.training_stage import OneUpdate


class LoggedImpressions(OneUpdate):
    """Turns a step's sequences into one update on what users took next."""

    def __init__(
        self, worker: Worker, config: GBPOConfig, model: TableModel, steps_per_epoch: int
    ) -> None:
        super().__init__(self._inputs)
        self._worker = worker
        self._config = config
        self._model = model
        self._supervised = SupervisedTargets(worker, model, config.supervised_weight)
        self._probe = PolicyProbe(worker, config, steps_per_epoch)

    def draw(self, start: ParallelModel) -> None:
        """Have the divergence from `start` told at the prompts of the first step. Collective."""
        with prompt_loader(self._worker, self._config, TrainerState()) as loader:
            step = next(iter(loader))
        prompts = prompts_of_step(self._worker, self._config.prompts, step)
        self._probe.draw(start, (each.batch for each in prompts))

    def attach(self, policy: ParallelModel) -> None:
        """Measure `policy` where a step is logged."""
        self._probe.attach(policy)

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
