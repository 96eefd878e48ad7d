"""HSTU attention over jagged sequences (arXiv 2402.17152): pointwise SiLU weights, no softmax.

    O[i] = sum over j <= i of SiLU(q[i] . k[j] + pos_weight[j - i + N - 1] + ts_weight[b(i, j)]) v[j] / N

b(i, j) is the logarithmic bucket of the time between event j and the *next* event of query i, which
is known when the request is made. N = max_len is the divisor whatever the length of the sequence.

Shape legend: B sequences, T total tokens, H heads, N max_len, Dqk and Dv widths of a head.
"""

from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor
from torch.nn import functional

from models.ops.jagged import jagged_to_padded, padded_to_jagged

TIME_BUCKETS = 129
_BUCKET_BASE = Decimal("0.301")
# Smallest integer |dt| that belongs to bucket 1, 2, .., 128. Integers make the bucket exact: a float
# logarithm would differ between devices and vector widths.
TIME_THRESHOLDS = tuple(
    int((_BUCKET_BASE * k).exp().to_integral_value(ROUND_CEILING)) for k in range(1, TIME_BUCKETS)
)


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
    return hstu_attention_reference(
        q, k, v, offsets, timestamps, next_timestamps, pos_weight, ts_weight, max_len
    )


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
    total = q.shape[0]
    if total == 0:
        return v * 0.0
    dtype = torch.promote_types(q.dtype, torch.float32)
    longest = int(offsets.diff().max())
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
    return padded_to_jagged((weights @ v_p).transpose(1, 2), offsets, total).to(v.dtype)


def time_buckets(elapsed: Tensor) -> Tensor:
    """clamp(floor(ln(max(|dt|, 1)) / 0.301), 0, 128) of int64 time differences, exactly."""
    thresholds = torch.tensor(TIME_THRESHOLDS, dtype=torch.int64, device=elapsed.device)
    return torch.bucketize(elapsed.abs(), thresholds, right=True)


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
