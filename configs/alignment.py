"""Preference optimisation."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from configs.base import Config
from configs.guardrails import GuardrailsConfig
from configs.preferences import PreferenceRule, RatingRule
from configs.training import CheckpointConfig, OptimizerConfig, ValidationConfig


class AlignmentBase(Config):
    """What every kind of alignment has."""

    rule: PreferenceRule = RatingRule()
    """Pairs that measure preference accuracy, and that offline kinds train on."""
    validation_share: float = Field(0.1, gt=0, lt=1)
    """Share of users whose pairs measure preference accuracy and are not trained on."""
    supervised_weight: NonNegativeFloat = 1.0
    """Weight of the supervised loss on contexts and winners; keeps the model from forgetting."""
    epochs: PositiveInt = 2
    sparse_lr_ratio: PositiveFloat = 1.0
    """Learning rate of sharded tables relative to pretraining's."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)
    validation: ValidationConfig | None = ValidationConfig()
    guardrails: GuardrailsConfig = GuardrailsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every_steps: PositiveInt = 5


class OfflineBase(AlignmentBase):
    """Preference optimisation on pairs of the log."""

    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference."""
    pairs_per_step: PositiveInt = 256
    """Pairs of a global batch."""


class DPOConfig(OfflineBase):
    """Direct preference optimisation (arXiv 2305.18290); several losers are averaged."""

    kind: Literal["dpo"] = "dpo"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round."""


class IPOConfig(OfflineBase):
    """Identity preference optimisation (arXiv 2310.12036): a margin of 1/(2β), and no more."""

    kind: Literal["ipo"] = "ipo"


class SoftmaxDPOConfig(OfflineBase):
    """S-DPO (arXiv 2406.09215): a winner against several losers at once, the Plackett-Luce way.

    `rule.rejected_per_chosen` says how many.
    """

    kind: Literal["s_dpo"] = "s_dpo"
    rule: PreferenceRule = RatingRule(rejected_per_chosen=3)


OfflineAlignment = DPOConfig | IPOConfig | SoftmaxDPOConfig
Alignment = Annotated[OfflineAlignment, Field(discriminator="kind")]
