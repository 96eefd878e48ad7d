"""Jagged tensors: B sequences of unequal length stored back to back without padding.

Shape legend: B sequences, T total tokens, N padded length, ``...`` any trailing shape.
``offsets`` is int64 [B + 1]: sequence b owns rows ``offsets[b]:offsets[b + 1]`` of the values.
Every function works on any device, needs no host synchronisation unless said otherwise, and
accepts T = 0, empty sequences and B = 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lengths_to_offsets(lengths: Tensor) -> Tensor:
    """Exclusive running sum of ``lengths`` [B] with the total appended: int64 [B + 1]."""
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, dim=0, out=offsets[1:])
    return offsets


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """Sequence index of each of the ``total`` tokens: int64 [T]. ``total`` is ``offsets[-1]``."""
    sequences = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(sequences, offsets.diff(), output_size=total)


def positions_in_sequence(offsets: Tensor, total: int) -> Tensor:
    """Position of each of the ``total`` tokens inside its own sequence: int64 [T]."""
    starts = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=total)
    return torch.arange(total, device=offsets.device) - starts


def jagged_to_padded(values: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    """Spread ``values`` [T, ...] over zero-padded rows [B, N, ...], N = ``max_len``.

    Padding is on the right. Tokens at positions >= ``max_len`` are left out (and get no gradient).
    """
    batch, total = offsets.numel() - 1, values.shape[0]
    positions = positions_in_sequence(offsets, total)
    rows = segment_ids(offsets, total) * max_len + positions
    surplus = batch * max_len  # one extra row collects what does not fit
    rows = torch.where(positions < max_len, rows, surplus)
    padded = values.new_zeros((surplus + 1, *values.shape[1:])).index_copy(0, rows, values)
    return padded[:surplus].reshape(batch, max_len, *values.shape[1:])


def padded_to_jagged(padded: Tensor, offsets: Tensor, total: int | None = None) -> Tensor:
    """Collect the valid rows of ``padded`` [B, N, ...] into [T, ...], dropping the padding.

    ``total`` is ``offsets[-1]``; leaving it out costs a host synchronisation on an accelerator.
    No sequence may be longer than N.
    """
    batch, max_len = padded.shape[:2]
    total = int(offsets[-1]) if total is None else total
    rows = segment_ids(offsets, total) * max_len + positions_in_sequence(offsets, total)
    return take_distinct(padded.reshape(batch * max_len, *padded.shape[2:]), rows)


def take_distinct(values: Tensor, rows: Tensor) -> Tensor:
    """``values[rows]`` for ``rows`` int64 [M] without repetition: [M, ...].

    Its backward writes where ``index_select`` would add, which is several times as fast on a CPU.
    """
    taken: Tensor = _TakeDistinct.apply(values, rows)
    return taken


class _TakeDistinct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = values.shape
        return values.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, rows, grads[0]), None
