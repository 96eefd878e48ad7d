"""Sums whose bits do not depend on the order of addition.

Terms are rounded to a power-of-two grid that is fine enough to lose nothing of note and coarse
enough that float64 adds all of them without rounding. Any split over workers, any order of
atomics on a GPU, gives the same sum.

Shape legend: n rows, D width, K codes.
"""

import math

import torch
from torch import Tensor

EXACT_BITS = 52


def grid_step(largest: float, terms: int) -> float:
    """Finest power of two on which `terms` numbers of at most `largest` add exactly in float64.

    With 10^8 terms it is 2^-25 of the largest, finer than float32 holds numbers of that size.
    """
    if largest == 0 or terms == 0:
        return 1.0
    return math.ldexp(1.0, math.ceil(math.log2(largest)) + math.ceil(math.log2(terms)) - EXACT_BITS)


def on_grid(values: Tensor, step: float) -> Tensor:
    """`values` rounded to multiples of `step`, float64."""
    return values.double().mul_(1 / step).round_().mul_(step)


def sum_by_code(values: Tensor, codes: Tensor, size: int, step: float) -> Tensor:
    """Sums of `values` [n, D] per code (`codes` int64 [n]): float64 [K, D], exact on the grid."""
    total = torch.zeros(size, values.shape[1], dtype=torch.float64, device=values.device)
    return total.index_add_(0, codes, on_grid(values, step))
