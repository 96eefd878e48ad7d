"""Integer hashes in plain PyTorch, bit for bit equal to those of the native kernels.

Torch has no unsigned 64-bit arithmetic, but int64 products and sums wrap alike; only the right
shifts need their sign bits cut off. 32-bit words are held in int64 and masked after each step.
"""

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF
GOLDEN_64 = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: consecutive inputs land far apart
GOLDEN_32 = 0x9E3779B9


def as_signed(value: int) -> int:
    """The int64 whose bits are the lowest 64 bits of ``value``."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def mix64_int(value: int) -> int:
    """Finalizer of splitmix64 on one Python integer; unsigned result."""
    z = value & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)


def mix64(values: Tensor) -> Tensor:
    """Finalizer of splitmix64, elementwise on int64."""
    z = (values ^ _shift_right(values, 30)) * as_signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * as_signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def mix32(values: Tensor, second: Tensor) -> Tensor:
    """Two-word 32-bit hash of ``values`` and ``second`` (int64 tensors holding 32-bit words)."""
    z = values & _MASK_32
    z = ((z ^ (z >> 16)) * 0x21F0AAAD) & _MASK_32
    z = z ^ (z >> 15) ^ second
    z = (z * 0x735A2D97) & _MASK_32
    return z ^ (z >> 15)


def split_words(values: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32-bit words of int64 ``values``, each in 0 .. 2^32 - 1."""
    return values & _MASK_32, _shift_right(values, 32)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    return torch.bitwise_right_shift(values, bits) & ((1 << (64 - bits)) - 1)
