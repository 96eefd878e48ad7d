"""Which of a stage's steps are logged."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoggedSteps:
    """Every so many, the first and the last; where guardrails watch, an epoch's last and those that
    are validated as well, so that no policy is judged of which nothing was seen."""

    every: int
    total: int
    steps_per_epoch: int
    guarded: bool
    validated_every: int | None = None
    """Updates between validations within an epoch."""

    def __contains__(self, step: int) -> bool:
        """Whether the update that makes it `step` is logged."""
        judged = [self.steps_per_epoch, self.validated_every] if self.guarded else []
        due = (every is not None and step % every == 0 for every in (self.every, *judged))
        return any(due) or step in (1, self.total)
