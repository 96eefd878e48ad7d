"""Full-catalogue ranking metrics that merge over ranks through two plain tensors.

One relevant item a user (the held-out one), so recall@k is the hit rate and the ideal DCG is 1.
Protocol: algorithms reference §8; definitions as in the HSTU repository (arXiv 2402.17152, §4.1).

Shape legend: B users of a batch, K recommended items a user, V items of the catalogue.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.measured import GROUPS

BUCKETS = 128
"""Groups of users, by id, that sums are kept of: what they add to a metric before and after tells
how sure a change is, in numbers that grow neither with users nor with ranks."""


@dataclass(frozen=True)
class Measured:
    """What validation found."""

    metrics: dict[str, float]
    shares: dict[str, list[float]] = field(default_factory=dict)
    """What each of `BUCKETS` groups of users adds to a ranking metric."""


@dataclass(frozen=True)
class Popularity:
    """What kind of target an item is, by item id; row 0 is padding."""

    is_head: Tensor
    """[V+1] bool."""
    is_cold: Tensor
    """[V+1] bool."""

    @staticmethod
    def of(train_counts: Tensor, head_share: float) -> "Popularity":
        """From the occurrences [V] of items 1…V in training data; see `head_mask`."""
        is_cold = torch.cat([train_counts.new_zeros(1, dtype=torch.bool), train_counts == 0])
        return Popularity(head_mask(train_counts, head_share), is_cold)

    def to(self, device: torch.device | str) -> "Popularity":
        """The same on another device."""
        return Popularity(self.is_head.to(device), self.is_cold.to(device))


def head_mask(train_counts: Tensor, head_share: float) -> Tensor:
    """Mark the most popular items.

    Args:
        train_counts: [V] occurrences of items 1…V in training data.
        head_share: share of items (not of events) that is the head, in (0, 1).

    Returns:
        [V+1] bool by item id; id 0 is padding and never head. Equal counts: the lower id is first.
    """
    order = torch.argsort(train_counts, descending=True, stable=True)
    head = order[: max(1, round(head_share * train_counts.numel()))]
    mask = torch.zeros(train_counts.numel() + 1, dtype=torch.bool, device=train_counts.device)
    mask[head + 1] = True
    return mask


class RankingMetrics:
    """HR@k, NDCG@k, MRR (also by groups of targets) and catalogue coverage@k.

    A rank beyond every cut-off counts as a miss, whoever knows no better.

    Each rank updates its own object. Then, over all ranks, `sums()` is all-reduced by SUM and
    `covered()` by MAX, and `result(sums, covered)` holds the metrics of all users.
    """

    def __init__(self, ks: Sequence[int], popularity: Popularity) -> None:
        """Start empty.

        Args:
            ks: cut-offs, at most 255 distinct positive ones.
            popularity: of the targets; its device is where sums are kept.
        """
        self.ks = tuple(sorted(set(ks)))
        assert self.ks and self.ks[0] > 0 and len(self.ks) <= 255, f"bad cut-offs {ks}"
        self._popularity = popularity
        device = popularity.is_head.device
        self._cutoffs = torch.tensor(self.ks, device=device)
        columns = 2 + 2 * len(self.ks)  # users, 1/rank, hits per k, gains per k
        self._sums = torch.zeros(BUCKETS, len(GROUPS), columns, dtype=torch.float64, device=device)
        self._covered = torch.zeros(popularity.is_head.numel(), dtype=torch.uint8, device=device)

    @property
    def num_items(self) -> int:
        """V."""
        return self._popularity.is_head.numel() - 1

    def update(
        self,
        user_ids: Tensor,
        ranks: Tensor,
        target_ids: Tensor,
        top_ids: Tensor,
        liked: Tensor | None = None,
    ) -> None:
        """Add users.

        Args:
            user_ids: [B] int64, the same of a user in every validation.
            ranks: [B] int64, place of the target among the user's candidates, 1 = first.
            target_ids: [B] int64, held-out item, 1…V.
            top_ids: [B, K] int64, recommended items, best first; 0 = none left. Where K is below
                the largest cut-off (a small catalogue), coverage counts what is there.
            liked: [B] bool, users who liked their target; None where nobody knows.
        """
        device = self._sums.device
        ranks, target_ids, top_ids = (x.to(device) for x in (ranks, target_ids, top_ids))
        bucket = F.one_hot(user_ids.to(device) % BUCKETS, BUCKETS).to(torch.float64)  # [B, 128]
        place = ranks.to(torch.float64).unsqueeze(1)  # [B, 1]
        hits = (place <= self._cutoffs).to(torch.float64)  # [B, len(ks)]
        gains = hits / torch.log2(place + 1)
        terms = torch.cat([torch.ones_like(place), 1 / place, hits, gains], dim=1)
        head = self._popularity.is_head[target_ids].to(torch.float64)
        cold = self._popularity.is_cold[target_ids].to(torch.float64)
        wanted = torch.zeros_like(head) if liked is None else liked.to(head)
        groups = torch.stack([torch.ones_like(head), head, 1 - head, cold, wanted])  # [5, B]
        self._sums += torch.einsum("bu,gb,bt->ugt", bucket, groups, terms)
        self._cover(top_ids[:, : self.ks[-1]])

    def _cover(self, top_ids: Tensor) -> None:
        # An item's level is the number of cut-offs that include its best position so far, so that
        # one byte an item and one MAX over ranks give the coverage of every cut-off.
        position = torch.arange(1, top_ids.shape[1] + 1, device=top_ids.device)
        levels = (self._cutoffs >= position.unsqueeze(1)).sum(1).to(torch.uint8)  # [K]
        self._covered.scatter_reduce_(
            0, top_ids.reshape(-1), levels.expand(top_ids.shape).reshape(-1), "amax"
        )

    def sums(self) -> Tensor:
        """Copy of this rank's sums, [128, 5, 2 + 2·len(ks)] float64; add over ranks."""
        return self._sums.clone()

    def covered(self) -> Tensor:
        """Copy of this rank's coverage levels, [V+1] uint8; take the maximum over ranks."""
        return self._covered.clone()

    def result(self, sums: Tensor | None = None, covered: Tensor | None = None) -> dict[str, float]:
        """Metrics of the reduced tensors, or of this rank alone where they are not given.

        Returns:
            `users`, `mrr`, `hr@k`, `ndcg@k`, each also with the suffixes of `GROUPS` where that
            group has users, and `coverage@k` = distinct recommended items / V.

        Raises:
            ValueError: no user was measured.
        """
        table = (self._sums if sums is None else sums).sum(0).tolist()
        if table[0][0] == 0:
            raise ValueError(
                "no user was measured: the split leaves no target in this part of the data; "
                "check data.split, or evaluate another part"
            )
        result: dict[str, float] = {}
        for suffix, (users, *totals) in zip(GROUPS, table, strict=True):
            result[f"users{suffix}"] = users
            if users:
                named = zip(self._names, totals, strict=True)
                means = {f"{name}{suffix}": total / users for name, total in named}
                result.update(means)
        levels = (self._covered if covered is None else covered)[1:]
        for index, k in enumerate(self.ks):
            distinct = int((levels >= len(self.ks) - index).sum())
            result[f"coverage@{k}"] = distinct / self.num_items
        return result

    def shares(self, sums: Tensor) -> dict[str, list[float]]:
        """What each bucket of users adds to each ranking metric of the reduced sums."""
        # [128, 5, T], to the host at once; of a group without users, NaN
        means = (sums[..., 1:] / sums[..., :1].sum(0)).cpu()
        return {
            f"{name}{suffix}": means[:, group, column].tolist()
            for group, suffix in enumerate(GROUPS)
            for column, name in enumerate(self._names)
        }

    @property
    def _names(self) -> list[str]:
        """Of the columns after the users."""
        return ["mrr", *(f"hr@{k}" for k in self.ks), *(f"ndcg@{k}" for k in self.ks)]
