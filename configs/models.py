"""Architectures and their sizes."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from configs.base import Config


class HSTUConfig(Config):
    """HSTU retrieval (arXiv 2402.17152)."""

    kind: Literal["hstu"] = "hstu"
    width: PositiveInt = 50
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 1
    qk_width: PositiveInt = 50
    v_width: PositiveInt = 50
    dropout: float = Field(0.2, ge=0, lt=1)
    attention_slack: int = Field(11, ge=0)
    """Added to the loader's max_length to give N_max, the attention's divisor and bias range."""
    user_features: tuple[str, ...] = ()
    """User attributes (columns of the user table) looked up and added to every position."""
    side_features: tuple[str, ...] = ()
    """Event side features looked up and added at their position."""


class SASRecConfig(Config):
    """SASRec (arXiv 1808.09781), pre-norm transformer with softmax attention."""

    kind: Literal["sasrec"] = "sasrec"
    width: PositiveInt = 50
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 1
    feedforward_width: PositiveInt = 50
    dropout: float = Field(0.2, ge=0, lt=1)
    normalize: bool = True
    """Score by cosine (as HSTU does) instead of by inner product."""
    user_features: tuple[str, ...] = ()
    side_features: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "SASRecConfig":
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide width={self.width}; "
                "choose a divisor of the width"
            )
        return self


class HSTURankingConfig(Config):
    """HSTU ranking (arXiv 2402.17152; algorithms §2): what a user would do with given candidates.

    Histories carry the labels of their events; `data.source.columns.labels` maps them.
    """

    kind: Literal["hstu_ranking"] = "hstu_ranking"
    width: PositiveInt = 64
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 2
    qk_width: PositiveInt = 32
    v_width: PositiveInt = 32
    dropout: float = Field(0.1, ge=0, lt=1)
    mlp_width: PositiveInt = 256
    """Inner width of the networks over contents and actions."""
    action_width: PositiveInt = 16
    """Width of a label's row."""
    head_width: PositiveInt = 512
    user_features: tuple[str, ...] = ()
    """User attributes; each becomes a contextual token before the history."""
    side_features: tuple[str, ...] = ()
    """Event side features of the history; candidates have none."""


Model = Annotated[HSTUConfig | SASRecConfig, Field(discriminator="kind")]


class InitConfig(Config):
    """Initial values of embedding tables."""

    std: PositiveFloat = 0.02
