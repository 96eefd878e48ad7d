"""Quantizers: how an item's embedding becomes a semantic id of several codes."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from configs.base import Config

CodebookSize = Annotated[int, Field(ge=2)]


USAGE_DECAY = 0.97


class CodeConfig(Config):
    """Digits of a semantic id, and how many values each may take."""

    num_levels: PositiveInt = 3
    codebook_size: CodebookSize | tuple[CodebookSize, ...] = 256
    """Codes per level: one number for all of them, or one number each."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each level, first to last."""
        if isinstance(self.codebook_size, int):
            return (self.codebook_size,) * self.num_levels
        return self.codebook_size

    @model_validator(mode="after")
    def _a_size_for_each_level(self) -> "CodeConfig":
        if len(self.codebook_sizes) != self.num_levels:
            raise ValueError(
                f"codebook_size names {len(self.codebook_sizes)} levels and num_levels is "
                f"{self.num_levels}; give one number for all levels or one for each"
            )
        return self


class SinkhornConfig(Config):
    """Spread a batch evenly over the codes of the last level while training."""

    epsilon: PositiveFloat = 0.05
    """Temperature, in units of the batch's mean distance; small follows the distances more."""
    iterations: PositiveInt = 50


class RQVAEConfig(CodeConfig):
    """Residual-quantized autoencoder (TIGER, arXiv 2305.05065, section 3.1)."""

    kind: Literal["rq_vae"] = "rq_vae"
    code_width: PositiveInt = 32
    """Width of the latent that is quantized."""
    hidden: tuple[PositiveInt, ...] = (512, 256, 128)
    """Hidden widths of the encoder; the decoder mirrors them."""
    beta: NonNegativeFloat = 0.25
    """Weight of the commitment term."""
    epochs: PositiveFloat = 100
    """Rows drawn over the catalogue's size; below 1 trains on a part of a huge catalogue."""
    warmup_epochs: NonNegativeFloat = 10
    """First part of `epochs`: the autoencoder alone, so that k-means starts the codebooks from
    latents that mean something. 0 starts them from the untrained encoder."""
    batch_size: PositiveInt = 1024
    lr: PositiveFloat = 3e-3
    weight_decay: NonNegativeFloat = 0.0
    dead_code_threshold: float = Field(0.1, ge=0, lt=1)
    """A code used less than this share of an even use is re-seeded from the batch; 0 never."""
    usage_decay: float = Field(USAGE_DECAY, gt=0, lt=1)
    """Decay per step of the running use of codes."""
    sinkhorn: SinkhornConfig | None = None

    @model_validator(mode="after")
    def _batches_reach_every_code(self) -> "RQVAEConfig":
        if self.sinkhorn is not None and self.batch_size < self.codebook_sizes[-1]:
            raise ValueError(
                f"sinkhorn spreads a batch over all {self.codebook_sizes[-1]} codes of the last "
                f"level, but batch_size is {self.batch_size}; raise batch_size or remove sinkhorn"
            )
        return self

    @model_validator(mode="after")
    def _decay_is_read(self) -> "RQVAEConfig":
        if self.dead_code_threshold == 0 and self.usage_decay != USAGE_DECAY:
            raise ValueError(
                "usage_decay says how dead codes are told, but dead_code_threshold=0 re-seeds "
                "none: leave usage_decay out or raise the threshold"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> "RQVAEConfig":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs:g} leaves none of epochs={self.epochs:g} for "
                "the codebooks; lower it"
            )
        return self


class ResidualKMeansConfig(CodeConfig):
    """Residual k-means, plain (arXiv 2506.13695) or balanced (arXiv 2502.18965)."""

    kind: Literal["residual_kmeans"] = "residual_kmeans"
    iterations: PositiveInt = 25
    """Most Lloyd iterations of a level; it stops earlier when no item changes its code."""
    restarts: PositiveInt = 1
    """Runs from different starting points of which each level keeps the best."""
    rows_per_code: PositiveInt = 32
    """Size of the keyed sample from which k-means++ takes starting points, in rows per code."""
    balanced: bool = False
    """Every code of a level gets ⌊n/K⌋ or ⌈n/K⌉ items of the fitted catalogue."""
    price_rounds: PositiveInt = 8
    """Passes over the data that settle the prices of a level before sizes are made exact."""
    normalize_residuals: bool = False
    """Scale each residual to length one before its level."""

    @model_validator(mode="after")
    def _options_apply(self) -> "ResidualKMeansConfig":
        # Compared with the default: a dumped recipe, which workers read, sets every field.
        default = type(self).model_fields["price_rounds"].default
        if self.price_rounds != default and not self.balanced:
            raise ValueError("price_rounds only serves balanced=true; remove it or balance")
        if self.balanced and self.restarts > 1:
            raise ValueError(
                f"restarts={self.restarts} does not go with balanced=true, whose prices settle "
                "from one start; set restarts=1"
            )
        return self


class ProductQuantizerConfig(CodeConfig):
    """Product quantization: digits without order, one for each slice (RPG, arXiv 2506.05781)."""

    kind: Literal["product"] = "product"
    num_levels: PositiveInt = 16
    rotation: bool = True
    """Learn an orthogonal rotation before slicing (OPQ)."""
    rotation_rounds: PositiveInt = 100
    """Alternations between codebooks and rotation, on a keyed sample. Few leave it unsettled: 20 a
    tenth to a half of the error above that of 100, where coordinates come by their variance most;
    300 gain some percent on these."""
    iterations: PositiveInt = 25
    restarts: PositiveInt = 1
    rows_per_code: PositiveInt = 64
    """Size of the keyed sample for starting points and rotation, in rows per code."""

    @model_validator(mode="after")
    def _a_rotation_needs_slices(self) -> "ProductQuantizerConfig":
        if self.rotation and self.num_levels == 1:
            raise ValueError(
                "rotation turns coordinates between slices and does nothing with num_levels=1; "
                "set rotation=false or more levels"
            )
        default = type(self).model_fields["rotation_rounds"].default
        if self.rotation_rounds != default and not self.rotation:
            raise ValueError("rotation_rounds only serves rotation=true; remove it or rotate")
        return self


Quantizer = Annotated[
    RQVAEConfig | ResidualKMeansConfig | ProductQuantizerConfig, Field(discriminator="kind")
]
