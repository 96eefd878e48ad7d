"""Distances to codebooks, the same bits for a row wherever it stands in the data.

Matrix products may round a row differently by its place and by the number of rows beside it.
All go through blocks of one shape here, padded to widths that every kernel treats alike; so codes
depend neither on chunking nor on how a catalogue is split over workers.

Shape legend: n rows, C rows of a block, D width, K codes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 1024
ALIGNMENT = 16


def by_blocks(apply: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`apply(*blocks)` → [BLOCK_ROWS, ...] on padded blocks of `tensors` [n, ·]; cut to [n, ...].

    An empty input is computed on one block of zeros, so that the result has its shape and type.
    """
    results = []
    for start in range(0, max(len(tensors[0]), 1), BLOCK_ROWS):
        blocks = [padded(tensor[start : start + BLOCK_ROWS]) for tensor in tensors]
        results.append(apply(*blocks)[: len(tensors[0]) - start])
    return torch.cat(results)


def padded(block: Tensor) -> Tensor:
    """`block` [≤ BLOCK_ROWS, ·] with rows of zeros up to BLOCK_ROWS."""
    return F.pad(block, (0, 0, 0, BLOCK_ROWS - len(block)))


def costs(
    rows: Tensor,
    codebook: Tensor,
    prices: Tensor | None = None,
    *,
    middle: Tensor | None = None,
) -> Tensor:
    """Half squared distances up to a constant of the row, plus prices: float32 [C, K].

    ‖c‖²/2 − x·c for `rows` [C, D] and `codebook` [K, D], both less `middle` [D] (of the codes):
    far from the origin, products would round distances away. Its order over k is that of
    distances. `prices` [K] raise the cost of codes (see balanced.py).
    """
    middle = codebook.median(0).values if middle is None else middle  # which no far code moves
    rows, codebook = rows - middle, codebook - middle
    size, width = codebook.shape
    more_width, more_codes = -width % ALIGNMENT, -size % ALIGNMENT
    even = F.pad(codebook, (0, more_width, 0, more_codes))
    offsets = even.square().sum(1) / 2
    if prices is not None:
        offsets = offsets + F.pad(prices, (0, more_codes))
    wide = F.pad(rows, (0, more_width))
    return torch.addmm(offsets, wide, even.T, alpha=-1)[:, :size]


def turned(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows` [C, D] times `matrix` [D, W], on padded widths: float32 [C, W]."""
    more_width, more_columns = -matrix.shape[0] % ALIGNMENT, -matrix.shape[1] % ALIGNMENT
    wide = F.pad(rows, (0, more_width)) if more_width else rows.contiguous()
    return (wide @ F.pad(matrix, (0, more_columns, 0, more_width)))[:, : matrix.shape[1]]


def nearest(rows: Tensor, codebook: Tensor, prices: Tensor | None = None) -> Tensor:
    """Cheapest code of each row: int64 [C]; the lowest of several equal ones."""
    return costs(rows, codebook, prices).argmin(1)
