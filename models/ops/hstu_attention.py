"""HSTU attention over jagged sequences (arXiv 2402.17152): pointwise SiLU weights, no softmax.

    O[i] = 1/N sum over j <= i of SiLU(q[i] . k[j] + pos_weight[j - i + N - 1] + ts_weight[b]) v[j]

b(i, j) is the logarithmic bucket of the time between event j and the *next* event of query i, which
is known when the request is made. N = max_len is the divisor whatever the length of the sequence.

Shape legend: B sequences, T total tokens, H heads, N max_len, Dqk and Dv widths of a head.
"""

from decimal import ROUND_CEILING, Decimal
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from models.ops import native
from models.ops.jagged import jagged_to_padded, padded_to_jagged

TIME_BUCKETS = 129
_BUCKET_BASE = Decimal("0.301")
# Smallest integer |dt| of bucket 1, 2, .., 128. Integers make the bucket exact: a float
# logarithm would differ between devices and vector widths.
TIME_THRESHOLDS = tuple(
    int((_BUCKET_BASE * k).exp().to_integral_value(ROUND_CEILING)) for k in range(1, TIME_BUCKETS)
)
_THRESHOLDS = torch.tensor(TIME_THRESHOLDS, dtype=torch.int64)


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    next_timestamps: Tensor,
    pos_weight: Tensor,
    ts_weight: Tensor,
    max_len: int,
) -> Tensor:
    """Causal SiLU attention (the diagonal included) with position and time bias: [T, H, Dv].

    ``q``, ``k`` [T, H, Dqk] and ``v`` [T, H, Dv] float32 or bfloat16 (computed in float32);
    ``offsets`` int64 [B + 1]; ``timestamps`` int64 [T] of the events; ``next_timestamps`` int64 [T]
    of the events that follow them (for the last one the time of the request); ``pos_weight``
    [2 N - 1]; ``ts_weight`` [129]. Differentiable in the five float tensors.
    Raises ValueError when a sequence is longer than ``max_len``.
    """
    if not native.runs_native(q, k, v, pos_weight, ts_weight):
        return hstu_attention_reference(
            q, k, v, offsets, timestamps, next_timestamps, pos_weight, ts_weight, max_len
        )
    _check_arguments(q, k, v, offsets, pos_weight, ts_weight, max_len)
    out: Tensor = _NativeAttention.apply(
        q.float(),
        k.float(),
        v.float(),
        offsets,
        timestamps,
        next_timestamps,
        pos_weight.float(),
        ts_weight.float(),
        max_len,
    )
    return out.to(v.dtype)


def hstu_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    next_timestamps: Tensor,
    pos_weight: Tensor,
    ts_weight: Tensor,
    max_len: int,
) -> Tensor:
    """``hstu_attention`` in plain PyTorch: pads to [B, H, L, L], L the longest sequence."""
    _check_arguments(q, k, v, offsets, pos_weight, ts_weight, max_len)
    dtype = torch.promote_types(q.dtype, torch.float32)
    longest = int(offsets.diff().max()) if offsets.numel() > 1 else 0
    q_p, k_p, v_p = (
        jagged_to_padded(x.to(dtype), offsets, longest).transpose(1, 2) for x in (q, k, v)
    )
    positions = torch.arange(longest, device=q.device)
    relative = positions[None, :] - positions[:, None]  # j - i
    elapsed = (
        jagged_to_padded(next_timestamps, offsets, longest)[:, :, None]
        - jagged_to_padded(timestamps, offsets, longest)[:, None, :]
    )
    # index_select, whose gradient is one index_add, is many times faster than advanced indexing
    index = (relative + max_len - 1).flatten()
    position_bias = pos_weight.to(dtype).index_select(0, index).view_as(relative)
    buckets = time_buckets(elapsed).flatten()
    time_bias = ts_weight.to(dtype).index_select(0, buckets).view_as(elapsed)
    scores = q_p @ k_p.transpose(2, 3) + (position_bias + time_bias)[:, None]
    weights = functional.silu(scores) / max_len
    weights = weights.masked_fill(relative > 0, 0.0)
    return padded_to_jagged((weights @ v_p).transpose(1, 2), offsets, q.shape[0]).to(v.dtype)


def time_buckets(elapsed: Tensor) -> Tensor:
    """clamp(floor(ln(max(|dt|, 1)) / 0.301), 0, 128) of int64 time differences, exactly."""
    return torch.bucketize(elapsed.abs(), _THRESHOLDS.to(elapsed.device), right=True)


class _NativeAttention(torch.autograd.Function):
    """The kernels of csrc/hstu_attention.cpp; the backward pass recomputes the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: Tensor,
        timestamps: Tensor,
        next_timestamps: Tensor,
        pos_weight: Tensor,
        ts_weight: Tensor,
        max_len: int,
    ) -> Tensor:
        index = (offsets, timestamps, next_timestamps)
        tensors = (q, k, v, *(x.contiguous() for x in (*index, pos_weight, ts_weight)))
        ctx.save_for_backward(*tensors)
        ctx.max_len = max_len
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        native.call("tandem_hstu_forward", *_kernel_arguments(tensors, max_len), out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        d_q, d_k, d_v, d_pos, d_ts = (
            torch.empty_like(tensors[at], memory_format=torch.contiguous_format)
            for at in (0, 1, 2, 6, 7)
        )
        arguments = _kernel_arguments(tensors, ctx.max_len)
        d_out = grads[0].contiguous()
        native.call("tandem_hstu_backward", *arguments, d_out, d_q, d_k, d_v, d_pos, d_ts)
        return d_q, d_k, d_v, None, None, None, d_pos, d_ts, None


def _kernel_arguments(tensors: tuple[Tensor, ...], max_len: int) -> list[Tensor | int]:
    """The arguments that both kernels share, in their order."""
    q, k, v, offsets, *rest = tensors
    arguments: list[Tensor | int] = []
    for x in (q, k, v):
        arguments += native.token_rows(x)
    sizes = (offsets.numel() - 1, q.shape[1], q.shape[2], v.shape[2], max_len)
    return [*arguments, offsets, *rest, _THRESHOLDS, *sizes, torch.get_num_threads()]


def _check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    pos_weight: Tensor,
    ts_weight: Tensor,
    max_len: int,
) -> None:
    assert q.shape == k.shape and q.shape[:2] == v.shape[:2], (q.shape, k.shape, v.shape)
    assert pos_weight.shape == (2 * max_len - 1,), (pos_weight.shape, max_len)
    assert ts_weight.shape == (TIME_BUCKETS,), ts_weight.shape
    # Reading an accelerator's offsets would stall it; there the padding below fails instead.
    if offsets.device.type == "cpu" and offsets.numel() > 1:
        longest = int(offsets.diff().max())
        if longest > max_len:
            raise ValueError(
                f"a sequence of {longest} events exceeds max_len = {max_len}: "
                "shorten the sequences or raise max_len in the recipe"
            )
