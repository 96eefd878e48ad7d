"""What preference optimisation logs of the policy itself, at the steps that are logged.

Its losses score pairs alone: what they leave out costs a pass over the catalogue, or a generation,
which not every step shall pay for.

Shape legend: N contexts, K losers of a winner, L parts of log π.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from configs.alignment import AlignmentBase
from configs.generation import AncestralConfig
from models.batch import JaggedBatch
from sharding.parallelize import ParallelModel
from trainer.objectives import policy_gradient as pg
from trainer.objectives.dpo import PreferenceInputs
from trainer.policy import Worker
from trainer.prompts import Prompts
from trainer.rollout import Rollout, RolloutEngine
from trainer.scoring import Likelihood


class PolicyProbe:
    """Adds to a step's inputs what is measured before their update."""

    def __init__(self, worker: Worker, config: AlignmentBase, total_steps: int) -> None:
        """`total_steps` of the stage, the last of which is logged, too."""
        self._worker = worker
        self._every, self._total = config.log_every_steps, total_steps
        self._policy: ParallelModel | None = None
        self._engine: RolloutEngine | None = None

    def attach(self, policy: ParallelModel) -> None:
        """Measure `policy`."""
        self._policy = policy
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
            reference: π_ref, where it is held; without it there is no divergence.
        """
        assert self._policy is not None and self._engine is not None, "attach comes first"
        coming = self._policy.step + 1
        if coming % self._every and coming not in (1, self._total):
            return list(inputs)
        self._engine.refresh()
        likelihood = None
        if not self._worker.recipe.writes_codes:
            likelihood = Likelihood.of(self._worker, self._policy)
        measured = []
        for each, batch in zip(inputs, contexts, strict=True):
            targets = batch.target_ids[batch.offsets[1:] - 1]
            drawn = self._engine(Prompts(batch, targets, None), step)
            told = sampled_measures(drawn, reference)
            log_probs = None if likelihood is None else likelihood(each.candidates)
            measured.append(replace(each, log_probs=log_probs, measures=each.measures | told))
        return measured


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
