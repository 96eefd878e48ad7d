"""Preference pairs and preference optimisation."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from configs.base import Config
from configs.training import CheckpointConfig, OptimizerConfig, ValidationConfig


class PreferenceRule(Config):
    """How pairs are read off the log.

    The context of a pair is the user's training history before the earlier of its two events; the
    winner is rated `liked_from` or higher, the loser `disliked_to` or lower, and both lie within
    `window` consecutive events of the user.
    """

    liked_from: float = 4.0
    disliked_to: float = 2.0
    window: PositiveInt = 20
    pairs_per_user: PositiveInt = 8
    min_context: PositiveInt = 3

    @model_validator(mode="after")
    def _thresholds_are_apart(self) -> "PreferenceRule":
        if self.disliked_to >= self.liked_from:
            raise ValueError(
                f"disliked_to={self.disliked_to} must be below liked_from={self.liked_from}"
            )
        return self


class DPOConfig(Config):
    """Direct preference optimisation with a supervised term (algorithms: DPO)."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    supervised_weight: NonNegativeFloat = 1.0
    """Weight of the next-item loss on winner and context; keeps the model from forgetting."""
    rule: PreferenceRule = PreferenceRule()
    pairs_per_step: PositiveInt = 256
    """Pairs of a global batch."""
    epochs: PositiveInt = 2
    sparse_lr_ratio: PositiveFloat = 1.0
    """Learning rate of sharded tables relative to pretraining's."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)
    validation: ValidationConfig | None = ValidationConfig()
    validation_share: float = Field(0.1, gt=0, lt=1)
    """Share of users whose pairs measure preference accuracy and are not trained on."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every_steps: PositiveInt = 5
