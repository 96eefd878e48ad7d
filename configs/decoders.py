"""Generative recommenders: models that write an item's semantic id code by code."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from configs.base import Config

POSITIVE_FROM = 4.0


class FeatureInputs(Config):
    """What a history token carries besides the codes of its item."""

    item_table: bool = False
    """Add a row of the (sharded) item table to each history token."""
    user_features: tuple[str, ...] = ()
    """User attributes (columns of the user table)."""
    side_features: tuple[str, ...] = ()
    """Event side features."""
    actions: bool = False
    """Add an embedding of the event's action."""
    times: bool = False
    """Add an embedding of the logarithm of the time between the event and the request."""
    dwell_times: bool = False
    """Add an embedding of the logarithm of the time that the user stayed with the event's item."""

    def check_events(self, *, rating: bool, action: bool, dwell: bool) -> None:
        """Raise ValueError where the model reads of events what the data do not hold."""
        if self.actions and not action:
            raise ValueError(_unread("actions", "an action", "action", "false"))
        if self.dwell_times and not dwell:
            raise ValueError(_unread("dwell_times", "a dwell time", "dwell", "false"))


class TIGERConfig(FeatureInputs):
    """TIGER (arXiv 2305.05065): T5-style encoder-decoder over code tokens."""

    kind: Literal["tiger"] = "tiger"
    width: PositiveInt = 128
    num_encoder_layers: PositiveInt = 4
    num_decoder_layers: PositiveInt = 4
    num_heads: PositiveInt = 6
    head_width: PositiveInt = 64
    feedforward_width: PositiveInt = 1024
    dropout: float = Field(0.1, ge=0, lt=1)
    history: PositiveInt = 20
    """Latest events that are read."""
    relative_buckets: PositiveInt = 32
    """Distances between codes that the encoder tells apart; far ones share a bucket."""
    relative_distance: PositiveInt = 128
    """Distance from which all share the last bucket."""

    @model_validator(mode="after")
    def _buckets_fit(self) -> "TIGERConfig":
        buckets, distance = self.relative_buckets, self.relative_distance
        if buckets < 4 or buckets % 2 or distance <= buckets // 2:
            raise ValueError(
                f"relative_buckets={buckets} must be even and at least 4, and "
                f"relative_distance={distance} must exceed half of it"
            )
        return self


class ExpertsConfig(Config):
    """Mixture of experts with loss-free balancing (OneRec 2506.13695, OneRec-V2 2508.20900)."""

    num_experts: PositiveInt = 24
    top_k: PositiveInt = 2
    num_shared: int = Field(0, ge=0)
    """Experts that every token passes."""
    expert_width: PositiveInt = 128
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """What weighs the chosen experts: their softmax scores over all experts (OneRec 2502.18965), or
    sigmoid scores divided by their sum (DeepSeek-V3)."""
    bias_rate: float = Field(1e-3, gt=0)
    """Step of the balancing bias towards experts that got too few tokens."""

    @model_validator(mode="after")
    def _enough_experts(self) -> "ExpertsConfig":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}")
        return self


class LifelongConfig(Config):
    """A long history compressed by learned queries (OneRec 2506.13695)."""

    history: PositiveInt = 2000
    num_queries: PositiveInt = 128
    num_layers: PositiveInt = 2


class OneRecConfig(FeatureInputs):
    """OneRec V1 (arXiv 2502.18965, 2506.13695): encoder over pathways, decoder with experts."""

    kind: Literal["onerec"] = "onerec"
    width: PositiveInt = 128
    num_encoder_layers: PositiveInt = 2
    num_decoder_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    feedforward_width: PositiveInt = 256
    dropout: float = Field(0.1, ge=0, lt=1)
    history: PositiveInt = 20
    """Short-term pathway: latest events."""
    positive_history: PositiveInt | None = None
    """Positive-feedback pathway: latest events whose feedback is positive; None leaves it out."""
    positive_from: float = POSITIVE_FROM
    """Rating from which feedback is positive (where ratings are mapped)."""
    positive_actions: tuple[str, ...] = ()
    """Actions that are positive feedback (where actions are mapped)."""
    lifelong: LifelongConfig | None = None
    experts: ExpertsConfig | None = None
    """Feed-forward of the decoder's blocks; None is a dense one."""
    session_items: PositiveInt = 1
    """Items written per request, each after a BOS of its own; 1 is point-wise."""

    @model_validator(mode="after")
    def _fits(self) -> "OneRecConfig":
        _heads_divide_width(self.num_heads, self.width)
        if self.positive_actions and self.positive_history is None:
            raise ValueError("positive_actions says what positive_history reads, which is null")
        if self.positive_from != POSITIVE_FROM and self.positive_history is None:
            raise ValueError("positive_from says what positive_history reads, which is null")
        return self

    def check_events(self, *, rating: bool, action: bool, dwell: bool) -> None:
        """As of any decoder; and the positive-feedback pathway finds what it reads."""
        super().check_events(rating=rating, action=action, dwell=dwell)
        if self.positive_actions and not action:
            raise ValueError(_unread("positive_actions", "an action", "action", "()"))
        if self.positive_from != POSITIVE_FROM and not rating:
            raise ValueError(_unread("positive_from", "a rating", "rating", f"{POSITIVE_FROM}"))
        if self.positive_history is not None and not rating and not self.positive_actions:
            either = "a rating, nor an action that model.positive_actions names"
            raise ValueError(_unread("positive_history", either, "rating", "null"))


class LazyDecoderConfig(FeatureInputs):
    """OneRec-V2's lazy decoder (arXiv 2508.20900): cross-attention without K/V projections."""

    kind: Literal["lazy_decoder"] = "lazy_decoder"
    width: PositiveInt = 128
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    feedforward_width: PositiveInt = 256
    dropout: float = Field(0.1, ge=0, lt=1)
    history: PositiveInt = 50
    kv_layers: PositiveInt = 1
    """L_kv: distinct key-value sets of the context; block i reads set ⌊i·L_kv / num_layers⌋."""
    kv_split: Literal[1, 2] = 1
    """S_kv: 1 shares one vector as key and value, 2 keeps them apart."""
    kv_heads: PositiveInt = 1
    """G_kv: key-value heads (grouped queries)."""
    dense_layers: int = Field(2, ge=0)
    """First blocks whose feed-forward is dense even with experts; without, all are."""
    experts: ExpertsConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> "LazyDecoderConfig":
        _heads_divide_width(self.num_heads, self.width)
        if self.num_heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide num_heads={self.num_heads}")
        if self.kv_layers > self.num_layers:
            raise ValueError(
                f"kv_layers={self.kv_layers} exceeds num_layers={self.num_layers}: "
                "no block would read the rest"
            )
        if self.experts is None and self.dense_layers != 2:
            raise ValueError(
                f"dense_layers={self.dense_layers} says which blocks are without experts, but "
                "experts is null: leave dense_layers out or set experts"
            )
        if self.experts is not None and self.dense_layers >= self.num_layers:
            raise ValueError(
                f"dense_layers={self.dense_layers} leaves none of num_layers={self.num_layers} "
                "blocks to the experts: lower it or set experts to null"
            )
        return self


class HSTUDecoderConfig(FeatureInputs):
    """HSTU over semantic ids: HSTU reads items as sums of their codes, a small causal decoder at
    every position writes the next item's codes."""

    kind: Literal["hstu_decoder"] = "hstu_decoder"
    width: PositiveInt = 64
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 1
    qk_width: PositiveInt = 64
    v_width: PositiveInt = 64
    dropout: float = Field(0.2, ge=0, lt=1)
    attention_slack: int = Field(11, ge=0)
    decoder_layers: PositiveInt = 1
    decoder_heads: PositiveInt = 2
    decoder_feedforward: PositiveInt = 256

    @model_validator(mode="after")
    def _fits(self) -> "HSTUDecoderConfig":
        if self.width % self.decoder_heads:
            raise ValueError(
                f"decoder_heads={self.decoder_heads} must divide width={self.width}; "
                "choose a divisor of the width"
            )
        return self


def _unread(key: str, what: str, column: str, off: str) -> str:
    return (
        f"model.{key} reads it, but the events have not {what}: map data.source.columns.{column} "
        f"where the log has it, or set model.{key} to {off}"
    )


def _heads_divide_width(num_heads: int, width: int) -> None:
    if width % num_heads:
        raise ValueError(
            f"num_heads={num_heads} must divide width={width}; choose a divisor of the width"
        )


Decoder = Annotated[
    TIGERConfig | OneRecConfig | LazyDecoderConfig | HSTUDecoderConfig,
    Field(discriminator="kind"),
]
