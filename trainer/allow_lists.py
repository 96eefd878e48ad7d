"""Which items may be recommended to whom: the recipe's conditions as lists of items.

Shape legend: A lists, V items of the catalogue, b users.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.evaluation import AllowConfig, RecommendConfig
from data_loaders.items import ItemFeature, item_feature


@dataclass(frozen=True)
class AllowLists:
    """Lists of items, and whose they are."""

    items: Tensor
    """[A, V + 1] bool, by item id: what may be offered."""
    of: Tensor
    """[b] int64, the list of each user."""


def allow_lists(config: RecommendConfig, data: str, users: Sequence[str]) -> AllowLists | None:
    """The lists of a recipe; None where everybody may get everything.

    There is one list for all users with the same conditions, and all ranks have the same lists,
    whoever their users are.

    Args:
        config: conditions for all and for some.
        data: the data set's URL.
        users: raw id of each user, b of them.

    Raises:
        ValueError: a feature, a category, or a column of the items table cannot be had.
    """
    numbers: dict[tuple[AllowConfig, ...], int] = {}
    for conditions in (config.allow, *config.allow_for.values()):
        numbers.setdefault(conditions, len(numbers))
    if set(numbers) == {()}:
        return None
    names = {condition.feature for conditions in numbers for condition in conditions}
    features = {name: item_feature(data, name) for name in sorted(names)}
    [size] = {len(feature.ids) for feature in features.values()}
    items = torch.ones(len(numbers), size, dtype=torch.bool)
    for conditions, number in numbers.items():
        for condition in conditions:
            items[number] &= _meet(features[condition.feature], condition)
    of = [numbers[config.allow_for.get(user, config.allow)] for user in users]
    return AllowLists(items, torch.tensor(of, dtype=torch.int64))


def _meet(feature: ItemFeature, condition: AllowConfig) -> Tensor:
    """[V + 1] bool, the items that meet a condition."""
    asked = f"recommend asks for {condition.feature}"
    if condition.values:
        met = feature.numbers(condition.values, asked)
    else:
        met = feature.between(condition.since, condition.before, asked)
    return torch.isin(feature.ids, torch.tensor(met, dtype=feature.ids.dtype))
