"""Causal softmax attention over jagged sequences.

Shape legend: B sequences, T total tokens, N longest sequence, H heads, Dh width of a head.
"""

import torch.nn.functional as F
from torch import Tensor

from models.ops.jagged import jagged_to_padded, padded_to_jagged


def causal_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """softmax(q kᵀ / √Dh) v over each sequence's past and present: [T, H, Dh].

    `q`, `k`, `v` [T, H, Dh]; `offsets` [B + 1]. Padded on the right to the longest sequence, where
    the causal mask alone keeps padding out of every valid row. Costs a host synchronisation.
    """
    total = q.shape[0]
    longest = int(offsets.diff().max()) if offsets.numel() > 1 else 0
    q, k, v = (jagged_to_padded(x, offsets, max(longest, 1)).transpose(1, 2) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return padded_to_jagged(attended.transpose(1, 2), offsets, total)
