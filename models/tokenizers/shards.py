"""A catalogue's embeddings in one or many places, and passes over them.

Fitting is a driver that never holds the data: it maps a function over shards and adds up what
they return. `LocalShards` does so in this process; a cluster maps over workers that each hold one
`Shard`. Tasks are module-level functions `task(shard, *arguments)`, so that they can be shipped.

Shape legend: n rows of a shard, N rows of all shards, D width, L code levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from models.ops.hashing import GOLDEN_64, as_signed, mix64

UNIT_BITS = 62


@dataclass
class Shard:
    """Rows first_row … first_row + n - 1 of the catalogue, and what fitting keeps beside them."""

    first_row: int
    rows: Tensor
    """[n, D] float32 embeddings; never changed."""
    work: Tensor = field(init=False)
    """[n, W] float32 what the current level quantizes: a residual or a slice."""
    rotated: Tensor = field(init=False)
    """[n, D] float32 rotated embeddings, while product quantization is fitted."""
    labels: Tensor = field(init=False)
    """[n] int64 code of the current level; -1 before the first assignment."""
    keys: Tensor = field(init=False)
    """[n] int64 how strongly a row holds its code (balanced assignment)."""
    codes: Tensor = field(init=False)
    """[n, 0…L] int64 codes of finished levels."""

    def __post_init__(self) -> None:
        if self.rows.dim() != 2 or self.rows.dtype != torch.float32:
            raise ValueError(
                f"embeddings must be a float32 matrix, got {self.rows.dtype} of shape "
                f"{tuple(self.rows.shape)}; convert them before they are sharded"
            )
        self.work = self.rotated = self.rows
        self.labels = torch.full((len(self.rows),), -1, device=self.rows.device)
        self.keys = torch.zeros_like(self.labels)
        self.codes = self.labels.new_empty(len(self.rows), 0)

    @property
    def row_ids(self) -> Tensor:
        """[n] int64 places in the whole catalogue."""
        last = self.first_row + len(self.rows)
        return torch.arange(self.first_row, last, device=self.rows.device)


class Shards(Protocol):
    """Where the shards live; results come back in the order of their rows."""

    def map(self, task: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`task(shard, *arguments)` of every shard. Tensors in results are on the CPU."""


class LocalShards:
    """Shards of this process."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)

    @classmethod
    def of(cls, rows: Tensor, count: int = 1) -> "LocalShards":
        """Cut `rows` [N, D] float32 into `count` shards (rows of a shard differ by at most one)."""
        bounds = [len(rows) * index // count for index in range(count + 1)]
        return cls([Shard(first, rows[first:last]) for first, last in pairwise(bounds)])

    def map(self, task: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`task(shard, *arguments)` of every shard, one after the other."""
        return [task(shard, *arguments) for shard in self.shards]


@dataclass(frozen=True)
class Extent:
    """What the driver knows of the data before a level."""

    rows: int
    width: int
    largest: float
    """Largest absolute number in `work`."""


def measure(shards: Shards) -> Extent:
    """Size and range of the current `work`.

    Raises:
        ValueError: there are no rows, shards differ in width, or a number is not finite.
    """
    parts = shards.map(_shape_and_range)
    rows, widths = sum(part[0] for part in parts), {part[1] for part in parts}
    largest = max((part[2] for part in parts), default=0.0)
    if not rows or len(widths) != 1:
        raise ValueError(
            f"a tokenizer needs embeddings of one width, got {rows} rows of widths {sorted(widths)}"
        )
    if not largest < float("inf"):
        raise ValueError("embeddings hold numbers that are not finite; repair or drop those items")
    return Extent(rows, widths.pop(), largest)


def _shape_and_range(shard: Shard) -> tuple[int, int, float]:
    largest = float(shard.work.abs().max()) if shard.work.numel() else 0.0
    return len(shard.work), shard.work.shape[1], largest if largest == largest else float("inf")


def keyed_sample(shards: Shards, count: int, total: int, seed: int) -> Tensor:
    """About `count` rows of `work`, chosen by a hash of (seed, row id), in row order: [≈count, W].

    All rows where the catalogue has no more than `count`. Depends on no split over shards.
    """
    share = 1.0 if count >= total else count / total
    return torch.cat(shards.map(_rows_below, seed, int(share * (1 << UNIT_BITS))))


def _rows_below(shard: Shard, seed: int, threshold: int) -> Tensor:
    hashed = mix64(mix64(shard.row_ids) + as_signed((seed + 1) * GOLDEN_64))
    return shard.work[(hashed & ((1 << UNIT_BITS) - 1)) < threshold].cpu()


def take_rows(shard: Shard, row_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Task: where in `row_ids` [m] this shard's rows are asked for, and those embeddings."""
    local = row_ids.to(shard.rows.device) - shard.first_row
    here = ((local >= 0) & (local < len(shard.rows))).nonzero().view(-1)
    return here.cpu(), shard.rows[local[here]].cpu()


def take_codes(shard: Shard) -> Tensor:
    """Task: codes [n, L] that fitting gave to the shard's rows."""
    return shard.codes.cpu()


def gather_rows(shards: Shards, row_ids: Tensor) -> Tensor:
    """Embeddings [m, D] of `row_ids` [m] (int64, repeats allowed), wherever they lie."""
    parts = shards.map(take_rows, row_ids)
    result = torch.empty(len(row_ids), parts[0][1].shape[1])
    for places, rows in parts:
        result[places] = rows
    return result
