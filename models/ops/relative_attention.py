"""Softmax attention over all of each jagged sequence, with a bias by distance (T5's encoder).

    O[i] = sum over j of softmax_j(q[i] . k[j] / sqrt(Dh) + bias[j - i + S - 1]) v[j]

Shape legend: B sequences, T total tokens, S longest sequence, H heads, Dh width of a head.
"""

import math

import torch
from torch import Tensor

from models.ops.jagged import jagged_to_padded, padded_to_jagged


def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    """Bidirectional attention within each sequence: [T, H, Dh].

    ``q``, ``k``, ``v`` [T, H, Dh] float32 or bfloat16; ``bias`` [H, 2 S - 1] float32, entry
    j - i + S - 1 for query i and key j; ``offsets`` int64 [B + 1]; ``longest`` is S,
    at least 1.
    Differentiable in the four float tensors.
    """
    return relative_attention_reference(q, k, v, bias, offsets, longest)


def relative_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    """``relative_attention`` in plain PyTorch: pads to [B, H, S, S]."""
    total, size = q.shape[0], longest
    q, k, v = (
        jagged_to_padded(x, offsets, size).transpose(1, 2)
        for x in (q / math.sqrt(q.shape[-1]), k, v)
    )
    places = torch.arange(size, device=q.device)
    index = (places[None, :] - places[:, None] + size - 1).flatten()
    pairs = bias.index_select(1, index).view(-1, size, size)
    absent = places >= offsets.diff()[:, None]
    logits = q @ k.transpose(2, 3) + pairs
    # The lowest float instead of -inf: rows of an empty sequence stay numbers (and are not read).
    weights = logits.masked_fill(absent[:, None, None], torch.finfo(logits.dtype).min).softmax(-1)
    return padded_to_jagged((weights.to(v.dtype) @ v).transpose(1, 2), offsets, total)
