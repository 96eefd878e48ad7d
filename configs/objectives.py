"""Training objectives of pretraining."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from configs.base import Config


class SampledSoftmaxConfig(Config):
    """Cross entropy of the next item against sampled negatives."""

    kind: Literal["sampled_softmax"] = "sampled_softmax"
    temperature: PositiveFloat = 0.05
    negatives: Literal["uniform", "in_batch", "mixed"] = "uniform"
    num_negatives: PositiveInt = 128
    """Uniform negatives per group that shares them (uniform and mixed)."""
    shared: Literal["batch", "sequence", "position"] = "position"
    """Who shares one uniform draw: every position of the global batch, of a sequence, or nobody.
    In-batch negatives are shared by all positions of the global batch."""
    in_batch_negatives: PositiveInt = 512
    """Positives of the global batch taken as negatives (in_batch and mixed)."""
    logq_correction: bool = False
    """Subtract log of the expected count of each negative under its sampler."""

    @model_validator(mode="after")
    def _in_batch_is_shared(self) -> "SampledSoftmaxConfig":
        if self.negatives == "in_batch" and self.shared != "batch":
            raise ValueError(
                f"negatives='in_batch' are the positives of the whole batch, which all positions "
                f"share: shared={self.shared!r} cannot be; add objective.shared=batch, or take "
                "negatives='mixed', whose uniform part may be drawn per sequence or position"
            )
        return self


class FullSoftmaxConfig(Config):
    """Cross entropy over the whole catalogue; for catalogues that fit one rank's memory."""

    kind: Literal["full_softmax"] = "full_softmax"
    temperature: PositiveFloat = 0.05
    chunk_tokens: PositiveInt = 1024
    """Positions scored at once; bounds memory at chunk × catalogue."""
    max_catalogue: PositiveInt = 200_000


ItemObjective = SampledSoftmaxConfig | FullSoftmaxConfig
"""Objectives of models that score items."""


class NextCodeConfig(Config):
    """Cross entropy of the next item's codes, each given those before it; mean over levels."""

    kind: Literal["next_code"] = "next_code"
    normalization: Literal["codebook", "catalogue"] = "catalogue"
    """What a code competes with: the codes that continue an item of the catalogue, as in generation
    (training, search and evaluation share one definition), or every code of its level."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread evenly over the codes that compete."""
    windows_per_user: PositiveInt | None = None
    """Windows that a model supervised at its last position cuts from a user's sequence in a step
    (sliding-window augmentation), drawn anew in each epoch; null takes every one."""


Objective = Annotated[
    SampledSoftmaxConfig | FullSoftmaxConfig | NextCodeConfig, Field(discriminator="kind")
]
