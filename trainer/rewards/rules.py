"""Rewards that are rules: pure functions of a group, float32 [N, G], 0 where not valid.

A written id that the catalogue lacks is no item: it hits nothing, is neither novel nor diverse, and
takes no place in a quota. Formulas: algorithms reference §7.

Shape legend: N prompts, G candidates of a prompt, L code levels, V items, C classes.
"""

from typing import Literal

import torch
from torch import Tensor

from trainer.rewards.group import Group

Identity = Literal["item", "id"]


def hits(group: Group, by: Identity) -> Tensor:
    """Whether a candidate is the target, bool [N, G].

    By `id`, an item that shares the target's semantic id is; where there are no semantic ids, an
    item is its own id.
    """
    if by == "id" and group.codes is not None:
        assert group.target_codes is not None, "codes come with the target's"
        return group.legal & (group.codes == group.target_codes[:, None]).all(-1)
    return group.legal & (group.items == group.target_ids[:, None])


def hit(group: Group, by: Identity) -> Tensor:
    """1 for the target."""
    return hits(group, by).float()


def prefix(group: Group) -> Tensor:
    """Share of the target's levels that a candidate has before the first that differs.

    Of a model that scores items, whose items have one level, it is `hit`.
    """
    if group.codes is None:
        return hit(group, "item")
    assert group.target_codes is not None, "codes come with the target's"
    same = (group.codes == group.target_codes[:, None]).cumprod(-1).float().mean(-1)
    return same * group.valid


def rank(group: Group, by: Identity) -> Tensor:
    """Misses cost -(1 / log2(ρ + 2)) / Σ, the hit 0; nothing where the group has no hit.

    ρ = 0, 1, … is a candidate's place in its group by falling log π, where draws of one outcome
    share the best of theirs: else equal candidates would be worth different rewards. Σ runs over
    the misses of the group, so that what they cost adds up to 1 (ReRe, arXiv 2510.12211).
    """
    order = group.log_probs.masked_fill(~group.valid, -torch.inf)
    place = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    place = place[:, None].where(group.alike, place.shape[1]).amin(2)
    found = hits(group, by)
    missed = group.valid & ~found
    cost = missed / torch.log2(place.float() + 2.0)
    share = cost / cost.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(found.any(1, keepdim=True), -share, 0.0)


def legality(group: Group) -> Tensor:
    """1 for an item of the catalogue."""
    return group.legal.float()


def diversity(group: Group) -> Tensor:
    """1 / m for an item that m candidates are; a group's sum is its number of distinct items."""
    items, legal = group.items, group.legal
    same = (items[:, :, None] == items[:, None, :]) & legal[:, None, :]
    return legal / same.sum(2).clamp(min=1)


def novelty(group: Group, train_counts: Tensor) -> Tensor:
    """Self-information of an item among the training events, scaled to 0 … 1.

    -log((c + 1) / (Σc + V)) / log(Σc + V): 1 for an item that no event has.

    Args:
        group: N prompts.
        train_counts: [V] int64 occurrences of items 1 … V.
    """
    total = train_counts.sum() + train_counts.numel()
    counts = train_counts[(group.items - 1).clamp(min=0)] + 1
    information = 1.0 - counts.double().log() / total.double().log()
    return information.float() * group.legal


def over_represented(group: Group, classes: Tensor, largest_share: float) -> Tensor:
    """Candidates of a class with a quota that has more than its share of the group: bool [N, G].

    Args:
        group: N prompts.
        classes: [V + 1] integer class of each item by item id; below 0 without a quota.
        largest_share: of a group's legal items.
    """
    own, legal = classes[group.items], group.legal
    same = (own[:, :, None] == own[:, None, :]) & legal[:, None, :]
    number = legal.sum(1, keepdim=True)
    # float64 quotients are rounded once, as the share was: equal ones are equal, unlike products.
    return legal & (own >= 0) & (same.sum(2).double() / number > largest_share)


def with_quota(classes: Tensor, limited: Tensor) -> Tensor:
    """`classes` [V + 1] of items, -1 of those that are none of `limited` [n]."""
    return torch.where(torch.isin(classes, limited), classes, -1)


def popularity_classes(train_counts: Tensor, classes: int) -> Tensor:
    """Class of each item by id, [V + 1] int64: 0 holds the most popular V / C items. Row 0 is -1.

    Items of equal counts are in the order of their ids.
    """
    order = train_counts.argsort(descending=True, stable=True)
    result = torch.full((train_counts.numel() + 1,), -1, device=train_counts.device)
    places = torch.arange(train_counts.numel(), device=train_counts.device)
    result[order + 1] = places * classes // train_counts.numel()
    return result
