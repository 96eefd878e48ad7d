"""Softmax attention over all of each jagged sequence.

Shape legend: B sequences, T total tokens, S longest sequence, H heads, Dh width of a head.
"""

import torch
from torch import Tensor

from models.ops import native
from models.ops.jagged import jagged_to_padded, padded_to_jagged
from models.ops.masked_attention import masked_attention, visible_tokens
from models.ops.relative_attention import relative_attention


def jagged_self_attention(qkv: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """softmax(q kᵀ / √Dh) v of every token and every token of its sequence: [T, H, Dh].

    ``qkv`` [T, 3, H, Dh], queries, keys and values of one projection; ``offsets`` int64 [B + 1];
    no sequence is longer than ``longest``, at least 1. Differentiable.

    On the CPU the kernel that reads jagged rows; elsewhere the fused one over padded rows.
    """
    if native.runs_native(qkv):
        no_bias = torch.zeros(qkv.shape[2], 2 * longest - 1)
        return relative_attention(qkv, no_bias, offsets, longest)
    padded = jagged_to_padded(qkv, offsets, longest)
    q, k, v = padded.permute(2, 0, 3, 1, 4).unbind()  # [B, H, S, Dh] each
    attended = masked_attention(q, k, v, visible_tokens(offsets.diff(), longest))
    return padded_to_jagged(attended.transpose(1, 2), offsets, qkv.shape[0])
