"""Optimisation of the dense half, duration, validation and checkpoints."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from configs.base import Config
from configs.locations import Location

Decay = Annotated[float, Field(ge=0, lt=1)]


class ScheduleConfig(Config):
    """Linear warm-up, then constant or cosine to `final_ratio` of the peak."""

    kind: Literal["constant", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    final_ratio: float = Field(0.0, ge=0, le=1)


class OptimizerConfig(Config):
    """AdamW of the dense half (and of replicated tables)."""

    lr: PositiveFloat = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: PositiveFloat | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    """Applies to both halves: the sparse learning rate follows the same curve."""


class ValidationConfig(Config):
    """Validation during training; the only place where selection happens."""

    every_epochs: PositiveInt = 1
    every_steps: PositiveInt | None = None
    """Also after so many updates, within epochs: where an epoch takes days, or guardrails of
    alignment are to speak before its end."""
    metric: str = "ndcg@10"
    """Larger is better."""
    patience: PositiveInt | None = None
    """Validations without a new best before training stops early."""
    max_users: PositiveInt | None = None
    """Validate on this many users (the first by id), for speed."""


class CheckpointConfig(Config):
    """When to save and how much to keep."""

    every_steps: PositiveInt | None = None
    every_epochs: PositiveInt | None = 1
    keep: int = Field(2, ge=2)
    behind_training: bool = True
    """Write a copy of the state while training goes on; costs the host memory of one more copy."""


class StartConfig(Config):
    """Begin with what the training of another run left, instead of with nothing.

    Weights and optimizer state of both halves are carried over; steps and schedule begin anew. Rows
    of tables follow the log's own names of items and categories, so that the data may have grown;
    rows and tables that are new begin as they would in a new model. Precision, ZeRO stage and
    placements may be others."""

    run: Location = Field(pattern=r"\S")
    """Output directory of that run, any URL that all nodes see. Its prepared data must still be
    there: grown data get an `output` of their own."""


class TrainingConfig(Config):
    """One training stage."""

    epochs: PositiveInt = 20
    max_steps: NonNegativeInt | None = None
    """0 trains nothing: what `start` names serves as it is, with new rows for what is new."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig | None = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every_steps: PositiveInt = 20
    start: StartConfig | None = None

    @model_validator(mode="after")
    def _something_is_served(self) -> "TrainingConfig":
        if self.max_steps == 0 and self.start is None:
            raise ValueError(
                "max_steps=0 trains nothing, and without start there is nothing to serve as it is: "
                "set start.run or more steps"
            )
        return self
