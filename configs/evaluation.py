"""What is measured and how."""

from pydantic import Field, PositiveInt, field_validator, model_validator

from configs.base import Config

DEFAULT_CHUNK = 65536
"""Items."""


class EvaluationConfig(Config):
    """Full-catalogue ranking metrics."""

    ks: tuple[PositiveInt, ...] = Field((1, 5, 10, 50, 200), min_length=1, max_length=64)

    @field_validator("ks")
    @classmethod
    def _each_once(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(ks)) < len(ks):
            raise ValueError("must name each cut-off once")
        return tuple(sorted(ks))

    filter_seen: bool = True
    """Items of the user's history are not recommended."""
    head_share: float = Field(0.2, gt=0, lt=1)
    """The most popular share of items is the head, the rest the tail."""
    users_per_batch: PositiveInt = 256
    catalogue_chunk: int = Field(DEFAULT_CHUNK, ge=1, le=1 << 23)
    """Items scored at once by one rank."""


class AllowConfig(Config):
    """Items of some categories alone. A model that writes ids can write no other then."""

    feature: str
    """Of data.source.item_text.features."""
    values: tuple[str, ...] = Field(min_length=1)


class RecommendConfig(Config):
    """Recommendations printed at the end of a run."""

    users: tuple[str, ...] = ()
    """Raw user ids; none means the first `num_users`."""
    num_users: PositiveInt = 3
    top_k: PositiveInt = 10
    allow: AllowConfig | None = None
    """What may be recommended; null allows every item."""

    @model_validator(mode="after")
    def _users_are_named_or_counted(self) -> "RecommendConfig":
        if self.users and self.chosen("num_users"):
            raise ValueError(
                f"num_users={self.num_users} is for the first ones, and users names them: leave "
                "one of the two out"
            )
        return self
