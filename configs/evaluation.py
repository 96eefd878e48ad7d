"""What is measured and how."""

from typing import Any

from pydantic import Field, PositiveInt, field_validator, model_validator

from configs.base import Config
from configs.data import epoch_seconds
from configs.schema import closest

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

    def check_for_candidates(self, kind: str) -> None:
        """Refuse what is said of a ranked catalogue to a model (of this kind) that ranks none.

        Raises:
            ValueError: names what to remove.
        """
        for name in self.chosen("ks", "filter_seen", "head_share", "catalogue_chunk"):
            raise ValueError(
                f"evaluation.{name} is of rankings of the catalogue, and model.kind={kind!r} is "
                "measured on logged events: remove it"
            )


class AllowConfig(Config):
    """A condition that items meet by one of their features: its category is among some, or it lies
    between two bounds (fresh items: those released `since` a date). An item of which the feature is
    not known meets none. A model that writes ids can write no other items then."""

    feature: str
    """Of data.source.item_text.features."""
    values: tuple[str, ...] = ()
    since: str | float | None = None
    """The lowest number or the first ISO date (UTC unless it says otherwise) that meets it."""
    before: str | float | None = None
    """The lowest number or the first ISO date that does so no more."""

    @model_validator(mode="after")
    def _asks_one_thing(self) -> "AllowConfig":
        bounds = [bound for bound in (self.since, self.before) if bound is not None]
        if bool(self.values) == bool(bounds):
            raise ValueError(
                f"the condition on {self.feature!r} needs either values, or since and before"
            )
        if len({isinstance(bound, str) for bound in bounds}) == 2:
            raise ValueError(
                f"since={self.since!r} and before={self.before!r} must both be numbers, or both "
                "ISO dates"
            )
        seconds = [epoch_seconds(bound) for bound in bounds]
        if len(seconds) == 2 and seconds[0] >= seconds[1]:
            raise ValueError(f"before={self.before!r} must lie after since={self.since!r}")
        return self


class RecommendConfig(Config):
    """Recommendations printed at the end of a run."""

    users: tuple[str, ...] = ()
    """Raw user ids; none means the first `num_users`."""
    num_users: PositiveInt = 3
    top_k: PositiveInt = 10
    allow: tuple[AllowConfig, ...] = ()
    """What may be recommended: items that meet every condition (one may stand without a list)."""
    allow_for: dict[str, tuple[AllowConfig, ...]] = Field(default={})
    """Some of `users` → their own conditions, in place of `allow`; an empty list allows all."""

    @field_validator("allow", mode="before")
    @classmethod
    def _one_or_several(cls, allow: Any) -> Any:
        return _listed(allow)

    @field_validator("allow_for", mode="before")
    @classmethod
    def _one_or_several_each(cls, allow_for: Any) -> Any:
        if not isinstance(allow_for, dict):
            return allow_for
        return {user: _listed(allow) for user, allow in allow_for.items()}

    @model_validator(mode="after")
    def _lists_are_of_users(self) -> "RecommendConfig":
        for user in self.allow_for:
            if user not in self.users:
                guess = closest(user, self.users)
                hint = f"; did you mean {guess!r}?" if guess is not None else ""
                raise ValueError(f"allow_for.{user} is of a user that `users` does not name{hint}")
        return self

    def check_features(self, known: tuple[str, ...]) -> None:
        """Refuse conditions on features that items do not have.

        Raises:
            ValueError: names the condition and the mend.
        """
        lists = {"allow": self.allow}
        lists |= {f"allow_for.{user}": each for user, each in self.allow_for.items()}
        for place, conditions in lists.items():
            for number, condition in enumerate(conditions):
                if condition.feature not in known:
                    raise ValueError(
                        f"recommend.{place}.{number}.feature={condition.feature!r} is none of "
                        f"data.source.item_text.features {list(known)}: name its column there"
                    )

    @model_validator(mode="after")
    def _users_are_named_or_counted(self) -> "RecommendConfig":
        if self.users and self.chosen("num_users"):
            raise ValueError(
                f"num_users={self.num_users} is for the first ones, and users names them: leave "
                "one of the two out"
            )
        return self


def _listed(allow: Any) -> Any:
    """Conditions as a list; null is none."""
    if allow is None:
        return ()
    return (allow,) if isinstance(allow, dict | AllowConfig) else allow
