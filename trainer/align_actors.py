"""Online alignment whose groups come from rollout actors, some steps old.

The ratios of the loss are against the policy that generated a group, whichever that was; what is
too old is dropped, and counted.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from configs.alignment import OnlineAlignment
from configs.policy_gradient import RolloutActorsConfig
from data_loaders.loader import StepBatches
from data_loaders.prompts import PromptSequences
from sharding.checkpoint import CheckpointStore
from sharding.parallelize import ParallelModel
from trainer.align_online import OnlineUpdates, prompt_loader
from trainer.logged_steps import LoggedSteps
from trainer.objectives.online import OnlineInputs, OnlineLoss
from trainer.policy import Worker
from trainer.reference_policy import ReferencePolicy
from trainer.rollout_actors import AskedStep, AskingLoader, RolloutActors
from trainer.trainer import TrainerState


class ActorUpdates(OnlineUpdates):
    """Turns the groups that actors generated for a step into updates, unless they are too old, or
    of a policy that was given up since.

    It logs `staleness` (batches of prompts since the group's policy, on the rank where it is
    largest), `queue_wait` (seconds) and `dropped` (share of the batches since the stage went on).
    """

    def __init__(
        self,
        worker: Worker,
        config: OnlineAlignment,
        loss: OnlineLoss,
        reference: ReferencePolicy | None,
        actors: RolloutActors,
    ) -> None:
        super().__init__(worker, config, loss, reference)
        assert config.rollout_actors is not None, "there are actors"
        self._settings: RolloutActorsConfig = config.rollout_actors
        self._actors = actors
        self._answered = self._dropped = self._line = 0

    def loader(self, state: TrainerState) -> AskingLoader:
        """The stage's loader at the position of a state; its steps are asked for ahead."""
        loader = prompt_loader(self._worker, self._config, state)
        return AskingLoader(loader, self._ask, self._settings.ahead, self._actors.stop)

    def attach(self, policy: ParallelModel, logged: LoggedSteps) -> None:
        """Train `policy`, and start the actors. Collective."""
        super().attach(policy, logged)
        self._actors.start()

    def restore(self, beside: CheckpointStore, name: str | None) -> None:
        """As in `OnlineUpdates`; the actors go on with the policy that was returned to, and what
        others generated is dropped."""
        super().restore(beside, name)
        self._line += 1
        self._publish()

    def __call__(self, step: Any) -> Iterator[Sequence[OnlineInputs]]:
        """Inputs of each update; none where the groups are too old. Collective."""
        assert self._policy is not None, "attach comes first"
        began = time.monotonic()
        found = self._actors.answer(step.asked)
        waited = time.monotonic() - began
        epochs = self._config.inner_epochs
        mine = ((self._policy.step - found.version) // epochs, found.line != self._line)
        ages, given_up = zip(*self._worker.ctx.all_gather_object(mine), strict=True)
        staleness = max(ages)
        self._answered += 1
        if staleness > self._settings.max_staleness or any(given_up):
            self._dropped += 1
            return
        rollouts = [each.to(self._worker.ctx.device) for each in found.rollouts]
        inputs = self.inputs(step.prompts, rollouts, self.rewarded(rollouts), step.step)
        told = {
            "staleness": float(staleness),
            "queue_wait": waited,
            "dropped": self._dropped / self._answered,
        }
        yield from self.trained([_measuring(each, told) for each in inputs])
        if (self._policy.step // epochs) % self._settings.snapshot_every == 0:
            self._publish()

    def _publish(self) -> None:
        assert self._policy is not None, "attach comes first"
        self._actors.publish(self._policy, self._line)

    def _ask(self, sequences: StepBatches[PromptSequences]) -> AskedStep:
        prompts = self.cut(sequences)
        return AskedStep(sequences, prompts, self._actors.ask(prompts, sequences.step))


def _measuring(inputs: OnlineInputs, told: dict[str, float]) -> OnlineInputs:
    """The same inputs, which log further numbers of the whole step."""
    constants = {name: torch.full_like(inputs.advantages, value) for name, value in told.items()}
    return replace(inputs, measures=inputs.measures | constants)
