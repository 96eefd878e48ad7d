"""Dropout whose mask is a pure function of keys, not of a generator's state.

A token's key comes from (seed, step, sample id, position); whether channel c of that token is kept
is a hash of (key, salt, c). So the mask is the same for every world size, batching and packing, on
every device, and the backward pass recomputes it instead of storing it.

Shape legend: B sequences, T total tokens, C channels (product of the trailing dimensions).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops import native
from models.ops.hashing import GOLDEN_32, GOLDEN_64, as_signed, mix32, mix64, mix64_int, split_words
from models.ops.jagged import positions_in_sequence, segment_ids


def token_keys(seed: int, step: int, sample_ids: Tensor, offsets: Tensor) -> Tensor:
    """One dropout key per token: int64 [T], a pure function of its four arguments.

    ``sample_ids`` int64 [B] names each sequence independently of the batch that it sits in.
    """
    stream = mix64_int(mix64_int(seed + GOLDEN_64) + step * GOLDEN_64)
    sample_keys = mix64(mix64(sample_ids) ^ as_signed(stream))
    total = int(offsets[-1])
    positions = positions_in_sequence(offsets, total)
    return mix64(sample_keys[segment_ids(offsets, total)] + (positions + 1) * as_signed(GOLDEN_64))


def sub_keys(keys: Tensor, count: int) -> Tensor:
    """Keys of the ``count`` parts of each token (its codes, say): int64 [T, count]."""
    parts = torch.arange(1, count + 1, device=keys.device) * as_signed(GOLDEN_64)
    return mix64(keys[:, None] + parts)


def keyed_dropout(x: Tensor, keys: Tensor, p: float, salt: int) -> Tensor:
    """Zero each entry of ``x`` [T, ...] with probability ``p`` and scale the rest by 1 / (1 - p).

    ``keys`` int64 [T] (see ``token_keys``); ``salt`` tells the dropout sites of one model apart.
    ``p`` must lie in [0, 1); ``p`` = 0 returns ``x`` itself. Call it in training only.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    if p == 0.0:
        return x
    if not native.runs_native(x):
        return keyed_dropout_reference(x, keys, p, salt)
    out: Tensor = _NativeDropout.apply(x, _salted(keys, salt), p)
    return out


def keyed_relu_dropout(x: Tensor, keys: Tensor, p: float, salt: int) -> Tensor:
    """``keyed_dropout`` of max(``x``, 0) in one pass over memory.

    The output tells which entries passed, so nothing else is kept for the backward pass.
    """
    if p == 0.0 or not native.runs_native(x):
        return keyed_dropout(x.relu(), keys, p, salt)
    out: Tensor = _NativeReluDropout.apply(x, _salted(keys, salt), p)
    return out


def keyed_dropout_reference(x: Tensor, keys: Tensor, p: float, salt: int) -> Tensor:
    """``keyed_dropout`` in plain PyTorch."""
    mask = keep_mask(keys, x[0].numel() if x.shape[0] else 0, p, salt)
    return torch.where(mask.view(x.shape), x * (1.0 / (1.0 - p)), torch.zeros_like(x))


def keep_mask(keys: Tensor, channels: int, p: float, salt: int) -> Tensor:
    """The mask itself: bool [T, C]."""
    low, high = split_words(_salted(keys, salt))
    channel = torch.arange(channels, device=keys.device) * GOLDEN_32
    return mix32(low[:, None] + channel, high[:, None]) >= drop_threshold(p)


def drop_threshold(p: float) -> int:
    """A 32-bit hash below this value drops its entry."""
    return round(p * 2**32)


def _salted(keys: Tensor, salt: int) -> Tensor:
    return mix64(keys + as_signed(salt * GOLDEN_64))


class _NativeDropout(torch.autograd.Function):
    """The kernel of csrc/keyed_dropout.cpp, which is its own derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, salted_keys: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(salted_keys)
        ctx.p = p
        return _apply_mask(x, salted_keys, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (salted_keys,) = ctx.saved_tensors
        return _apply_mask(grads[0], salted_keys, ctx.p), None, None


class _NativeReluDropout(torch.autograd.Function):
    """The kernels of csrc/keyed_random.cpp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, salted_keys: Tensor, p: float) -> Tensor:
        out = _apply_mask(x, salted_keys, p, "tandem_keyed_relu_dropout")
        ctx.save_for_backward(out)
        ctx.scale = 1.0 / (1.0 - p)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        d_x = torch.empty_like(out)
        sizes = (out.numel(), ctx.scale, torch.get_num_threads())
        kernel = _kernel_for(out, "tandem_keyed_relu_dropout_backward")
        native.call(kernel, out, grads[0].contiguous(), *sizes, d_x)
        return d_x, None, None


def _apply_mask(
    x: Tensor, salted_keys: Tensor, p: float, kernel: str = "tandem_keyed_dropout"
) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    tokens = x.shape[0]
    channels = x.numel() // max(tokens, 1)
    native.call(
        _kernel_for(x, kernel),
        *(x, salted_keys, tokens, channels, drop_threshold(p), 1.0 / (1.0 - p)),
        *(torch.get_num_threads(), out),
    )
    return out


def _kernel_for(x: Tensor, kernel: str) -> str:
    """bfloat16 is scaled in float32 and rounded once, as the reference's product is."""
    return f"{kernel}_bfloat16" if x.dtype == torch.bfloat16 else kernel
