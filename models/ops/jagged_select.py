"""Choosing from and joining jagged sequences.

Shape legend: B sequences, T total tokens, M chosen tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.ops.jagged import segment_ids


@dataclass(frozen=True)
class Selection:
    """Some tokens of each sequence, in their order."""

    indices: Tensor
    """[M] int64, positions among the T tokens."""
    offsets: Tensor
    """[B + 1] int64; sequence b has the chosen tokens offsets[b]:offsets[b + 1]."""
    recency: Tensor
    """[M] int64, chosen tokens behind each one in its sequence; 0 is the latest."""


def select_latest(offsets: Tensor, total: int, limit: int, wanted: Tensor | None) -> Selection:
    """The latest `limit` tokens of each sequence, or of those that are `wanted` ([T] bool).

    `offsets` int64 [B + 1] with offsets[-1] = `total`. Costs a host synchronisation on an
    accelerator where something may be left out.
    """
    if wanted is None:
        wanted = torch.ones(total, dtype=torch.bool, device=offsets.device)
    counted = _running_count(wanted)
    ends = counted[offsets[1:]]
    behind = ends[segment_ids(offsets, total)] - counted[1:]
    kept = wanted & (behind < limit)
    indices = kept.nonzero().squeeze(1)
    return Selection(indices, _running_count(kept)[offsets], behind[indices])


def recency(offsets: Tensor, total: int) -> Tensor:
    """Tokens behind each one in its sequence: int64 [T], 0 for the latest."""
    ends = torch.repeat_interleave(offsets[1:], offsets.diff(), output_size=total)
    return ends - 1 - torch.arange(total, device=offsets.device)


def concatenate(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sequence b of the result is sequence b of every part, one behind the other.

    `parts` are values [T_i, D] and offsets [B + 1]; so is the result.
    """
    if len(parts) == 1:
        return parts[0]
    offsets = torch.stack([part_offsets for _, part_offsets in parts]).sum(0)
    before = offsets[:-1]
    places = []
    for values, own in parts:
        shift = before - own[:-1]
        place = torch.arange(values.shape[0], device=values.device)
        places.append(place + shift[segment_ids(own, values.shape[0])])
        before = before + own.diff()
    joined = torch.cat([values for values, _ in parts])
    return torch.empty_like(joined).index_copy(0, torch.cat(places), joined), offsets


def repeated_offsets(count: int, each: int, device: torch.device) -> Tensor:
    """Offsets of `count` sequences of `each` tokens: int64 [count + 1]."""
    return torch.arange(count + 1, device=device) * each


def longest_sequence(offsets: Tensor, bound: int) -> int:
    """Length to pad to: the longest sequence on the CPU, elsewhere `bound` without waiting."""
    if offsets.device.type != "cpu" or offsets.numel() < 2:
        return bound
    return int(offsets.diff().max())


def _running_count(marks: Tensor) -> Tensor:
    """[T] bool → [T + 1] int64: how many of the first t are marked."""
    count = torch.zeros(marks.numel() + 1, dtype=torch.int64, device=marks.device)
    torch.cumsum(marks, dim=0, out=count[1:])
    return count
