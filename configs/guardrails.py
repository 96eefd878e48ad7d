"""What alignment must not spoil, and what to do where it does."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from configs.base import Config

Action = Literal["warn", "stop", "roll_back"]
"""Say it and go on; end with the best policy that kept the limits; or return to the last policy
that kept them and go on from there at a lower learning rate.

Policies are judged before the first step and at each validation; without it, as epochs end. What is
broken for long is warned of once, and again after a judgement found it kept."""


class LimitConfig(Config):
    """A bound on one number: a validation metric (`hr@50`, `coverage@10`, `legality`,
    `preference_accuracy`) or what a training step logs (`kl`, `margin`, `entropy`). Over beams
    `kl` and `entropy` describe likely candidates, not the policy.

    `kl` is measured from the reference. Where that follows the policy, at each round of `sprec` and
    `ipa` and by `reference.sync_every_steps`, it bounds how far the policy goes from there, never
    how far it went from the pretrained one in all; what that costs is bounded by a `max_drop` of a
    validation metric."""

    metric: str
    max_drop: float | None = Field(None, ge=0, lt=1)
    """Share of the value before alignment that may be lost; validation metrics only."""
    confidence: float | None = Field(None, gt=0.5, lt=1)
    """With which a drop must be known to be larger for the action, and not to be larger for the
    policy to be selected or returned to; in between, alignment goes on. Of `hr`, `ndcg` and `mrr`:
    one-sided, paired over groups of the users of validation, at each validation by itself. Null:
    what is measured counts, however few the users are."""
    min: float | None = None
    max: float | None = None
    action: Action = "roll_back"

    @model_validator(mode="after")
    def _bounds_something(self) -> "LimitConfig":
        if self.max_drop is None and self.min is None and self.max is None:
            raise ValueError(f"the limit of {self.metric!r} needs max_drop, min or max")
        if self.confidence is not None and (self.max_drop is None or self.action == "warn"):
            raise ValueError(
                f"confidence={self.confidence:g} of the limit of {self.metric!r} decides what is "
                "selected by its max_drop: give it one, and the action roll_back or stop, or leave "
                "confidence out"
            )
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(
                f"nothing keeps the limit of {self.metric!r}: min={self.min:g} is above "
                f"max={self.max:g}; swap them"
            )
        return self


class DivergenceConfig(Config):
    """Reward hacking: what is optimised rises while what is wanted falls."""

    reward: str = "reward"
    """A training metric, averaged between validations. The start's is that of the first
    `guardrails.window` logged steps, and of no more than half of those before validation."""
    metric: str = "ndcg@10"
    """A validation metric."""
    validations: PositiveInt = 2
    """In a row, each suspected: it has a higher reward and a lower metric than the one before, or
    than where the course began, which is the start, or the policy of the last roll-back. The steps
    in between are noisy; larger numbers wait for more of them."""
    action: Action = "warn"
    """Unless it is `warn`, no policy is selected, or kept to return to, that is suspected: a
    roll-back leaves all of them, and a stop ends with what lies before them."""


class GuardrailsConfig(Config):
    """Watched during alignment; said when broken, and kept in the results."""

    limits: tuple[LimitConfig, ...] = ()
    divergence: DivergenceConfig | None = None
    rollback_lr_ratio: float = Field(0.5, gt=0, le=1)
    """Learning rates after a roll-back, relative to those before."""
    max_rollbacks: NonNegativeInt = 2
    """The next one stops instead."""
    window: Annotated[int, Field(ge=1)] = 5
    """Logged steps over which a training metric is averaged before it is held to its limit; where a
    policy is judged, over those since the judgement before if they are fewer."""

    @property
    def watch(self) -> bool:
        """Whether there are any."""
        return bool(self.limits) or self.divergence is not None
