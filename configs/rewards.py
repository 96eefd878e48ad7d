"""What a generated item is worth. A recipe lists rewards; their weighted sum is optimised.

Formulas: algorithms reference §7. The functions are in `trainer/rewards/`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import (
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from configs.base import Config
from configs.locations import Location

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class RewardTerm(Config):
    """What all rewards share."""

    weight: FiniteFloat = 1.0
    """Factor in the sum."""


class HitReward(RewardTerm):
    """1 for the item that the user took next."""

    kind: Literal["hit"] = "hit"
    by: Literal["item", "id"] = "item"
    """Whether an item that shares the target's semantic id counts as the target."""


class PrefixReward(RewardTerm):
    """Share of the target's code levels, from the first on, that a generated id has."""

    kind: Literal["prefix"] = "prefix"


class RankReward(RewardTerm):
    """Rank-aware penalty of misses (ReRe, arXiv 2510.12211): likely misses cost more."""

    kind: Literal["rank"] = "rank"
    by: Literal["item", "id"] = "item"


class LegalityReward(RewardTerm):
    """1 for an id that the catalogue has."""

    kind: Literal["legality"] = "legality"


class DiversityReward(RewardTerm):
    """1 / m for an item that m candidates of the group are; sums to the distinct items."""

    kind: Literal["diversity"] = "diversity"


class NoveltyReward(RewardTerm):
    """-log of an item's share of the training events, scaled to 0 … 1: rare items are worth 1."""

    kind: Literal["novelty"] = "novelty"


class QuotaReward(Config):
    """Positive sums of rewards are multiplied by α for items of a class the group has too many of.

    It comes after the weighted sum, wherever it stands in the list.
    """

    kind: Literal["quota"] = "quota"
    feature: str | None = None
    """Item feature (data.source.item_text.features) whose categories are the classes; null takes
    classes of popularity. Items without a category have no quota."""
    classes: PositiveInt = 10
    """Popularity classes of equal numbers of items; class 0 is the most popular."""
    limited: tuple[int | str, ...] | None = None
    """Classes that have a quota: numbers of popularity classes, or names of categories. null: the
    most popular class, or every category."""
    largest_share: float = Field(0.5, ge=0, lt=1)
    """Of a group's items; a class with more is over-represented."""
    alpha: float = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _classes_exist(self) -> "QuotaReward":
        if self.feature is not None:
            if self.classes != type(self).model_fields["classes"].default:
                raise ValueError(
                    f"classes={self.classes} are of popularity, but feature={self.feature!r} makes "
                    "the classes: leave one of the two out"
                )
            return self
        for number in self.limited or ():
            if not isinstance(number, int) or not 0 <= number < self.classes:
                raise ValueError(
                    f"limited names class {number!r}, but classes={self.classes} are numbered "
                    f"0 … {self.classes - 1}; names are those of a feature's categories"
                )
        return self


class ModelReward(RewardTerm):
    """What a reward model expects of an item: the weighted sum of its outputs."""

    kind: Literal["model"] = "model"
    run: Location
    """Output directory of the run that trained the reward model, any URL."""
    tasks: dict[str, PositiveFloat] = Field(min_length=1)
    """Output of the reward model (a task, or `p_score`) → its weight."""


class FunctionReward(RewardTerm):
    """A function of the user's own, called with a `trainer.rewards.group.Group`."""

    kind: Literal["function"] = "function"
    path: str
    """`package.module:function`, importable on every node; with cluster.address=local also from the
    directory where tandem is started."""

    @field_validator("path")
    @classmethod
    def _names_a_function(cls, path: str) -> str:
        if not _DOTTED.fullmatch(path):
            raise ValueError(f"{path!r} names no function: write it `package.module:function`")
        return path


Reward = Annotated[
    HitReward
    | PrefixReward
    | RankReward
    | LegalityReward
    | DiversityReward
    | NoveltyReward
    | QuotaReward
    | ModelReward
    | FunctionReward,
    Field(discriminator="kind"),
]


def check_codes_are_written(rewards: Sequence[Reward], model_kind: str) -> None:
    """Refuse what tells semantic ids apart for models that score items, which have none.

    Raises:
        ValueError: names the reward.
    """
    for at, reward in enumerate(rewards):
        by_id = isinstance(reward, HitReward | RankReward) and reward.by == "id"
        if isinstance(reward, PrefixReward) or by_id:
            told = "kind=prefix" if isinstance(reward, PrefixReward) else "by=id"
            raise ValueError(
                f"alignment.rewards.{at}.{told} compares semantic ids, and model.kind="
                f"{model_kind!r} scores items: use kind=hit by item"
            )


def reward_names(rewards: Sequence[Reward]) -> tuple[str, ...]:
    """What each reward of a list is called: its kind, numbered where that stands there again."""
    repeated, seen, names = Counter(each.kind for each in rewards), Counter[str](), []
    for kind in (each.kind for each in rewards):
        seen[kind] += 1
        names.append(f"{kind}_{seen[kind]}" if repeated[kind] > 1 else kind)
    return tuple(names)
