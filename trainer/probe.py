"""What alignment that does not generate logs of the policy itself, at the steps that are logged.

Its losses score what the log holds alone: what they leave out costs a pass over the catalogue, or a
generation, which not every step shall pay for.

Shape legend: N contexts, K losers of a winner, L parts of log π.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from configs.generation import AncestralConfig
from models.batch import JaggedBatch
from sharding.parallelize import ParallelModel
from trainer.logged_steps import LoggedSteps
from trainer.objectives import policy_gradient as pg
from trainer.objectives.dpo import PreferenceInputs
from trainer.policy import Worker
from trainer.prompts import Prompts
from trainer.rollout import Rollout, RolloutEngine
from trainer.scoring import Likelihood

PROBED = 256
"""Training contexts in which the divergence from a policy that is not held is measured."""


class PolicyProbe:
    """Adds to a step's inputs what is measured before their update."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._logged: LoggedSteps | None = None
        self._policy: ParallelModel | None = None
        self._engine: RolloutEngine | None = None
        self._drawn: list[Rollout] = []

    def draw(self, start: ParallelModel, contexts: Iterable[JaggedBatch]) -> None:
        """Keep draws of the reference, which `start` is now, for where it is not held. Collective.

        Args:
            start: it may be trained on later.
            contexts: a few, equally many batches on all ranks.
        """
        engine = RolloutEngine(self._worker, start, AncestralConfig(samples=1))
        engine.refresh()
        self._drawn = [engine(_prompts(batch), 0) for batch in contexts]

    def attach(self, policy: ParallelModel, logged: LoggedSteps) -> None:
        """Measure `policy` at the `logged` steps."""
        self._policy, self._logged = policy, logged
        self._engine = RolloutEngine(self._worker, policy, AncestralConfig(samples=1))

    def __call__(
        self,
        inputs: Sequence[PreferenceInputs],
        contexts: Sequence[JaggedBatch],
        step: int,
        reference: Likelihood | None,
    ) -> list[PreferenceInputs]:
        """The inputs, with measures where the coming update is logged. Collective.

        Args:
            inputs: of the step's micro batches, on the policy's device.
            contexts: theirs, whole, as the loader has them.
            step: of the loader; keys what is drawn.
            reference: π_ref, where it is held; otherwise its draws tell the divergence.
        """
        told = self.measures(contexts, step, reference)
        if told is None:
            return list(inputs)
        assert self._policy is not None, "as measures has it"
        likelihood = Likelihood.of(self._worker, self._policy)
        writes_codes = self._worker.recipe.writes_codes
        measured = []
        for each, values in zip(inputs, told, strict=True):
            log_probs = None if writes_codes else likelihood(each.candidates)
            measured.append(replace(each, log_probs=log_probs, measures=each.measures | values))
        return measured

    def measures(
        self, contexts: Sequence[JaggedBatch], step: int, reference: Likelihood | None
    ) -> list[dict[str, Tensor]] | None:
        """Of each micro batch, `entropy` and `kl` [N]; None where nothing is logged. Collective."""
        assert self._policy is not None and self._engine is not None, "attach comes first"
        assert self._logged is not None, "attach comes first"
        if self._policy.step + 1 not in self._logged:
            return None
        self._engine.refresh()
        divergence = None
        if self._drawn:
            divergence = self._from_draws(Likelihood.of(self._worker, self._policy))
        measured = []
        for batch in contexts:
            told = sampled_measures(self._engine(_prompts(batch), step), reference)
            if divergence is not None:
                told["kl"] = divergence.expand(batch.num_sequences)
            measured.append(told)
        return measured

    def _from_draws(self, likelihood: Likelihood) -> Tensor:
        """KL(π_ref‖π), k3 from draws of π_ref: scalar, equal on all ranks. Collective."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._worker.ctx.device)
        for drawn in self._drawn:
            there = drawn.group.valid[..., None]
            new = likelihood.parts(drawn.candidates).where(there, 0.0)
            values = pg.divergences(drawn.log_probs.where(there, 0.0), new, "k3").mean((1, 2))
            sums += torch.stack([values.sum().double(), torch.ones_like(values).sum().double()])
        total, number = self._worker.ctx.all_reduce_sum(sums).unbind()
        return (total / number.clamp(min=1)).float()


def _prompts(batch: JaggedBatch) -> Prompts:
    """Contexts to generate after, whatever was taken next."""
    return Prompts(batch, batch.target_ids[batch.offsets[1:] - 1], None)


def sampled_measures(drawn: Rollout, reference: Likelihood | None) -> dict[str, Tensor]:
    """`entropy` (-log π of an item drawn from π) and `kl` (k3) of each context: [N], means over
    the parts of log π, as online alignment logs them."""
    there = drawn.group.valid[..., None]
    new = drawn.log_probs.where(there, 0.0)
    told = {"entropy": -new.mean((1, 2))}
    if reference is not None:
        old = reference.parts(drawn.candidates).where(there, 0.0)
        told["kl"] = pg.divergences(new, old, "k3").mean((1, 2))
    return told
