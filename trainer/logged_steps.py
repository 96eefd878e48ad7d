"""Which of a stage's steps are logged."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoggedSteps:
    """Every so many, the first and the last; where guardrails watch, an epoch's last as well, so
    that no policy is judged of which nothing was seen."""

    every: int
    total: int
    steps_per_epoch: int
    guarded: bool

    def __contains__(self, step: int) -> bool:
        """Whether the update that makes it `step` is logged."""
        epoch_ends = self.guarded and step % self.steps_per_epoch == 0
        return step % self.every == 0 or epoch_ends or step in (1, self.total)
