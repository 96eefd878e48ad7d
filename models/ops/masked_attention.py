"""Softmax attention over padded keys of which some are not there.

Shape legend: N requests, H heads, Q queries, S keys, Dh width of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_KEYS = 64  # up to here plain products beat the fused kernel on a CPU, up to thrice


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """softmax(q kᵀ / √Dh) v over visible keys: [N, H, Q, Dh].

    `q` [N, H, Q, Dh]; `k`, `v` [N, H, S, Dh]; `visible` [N, 1, 1, S] bool, at least one a request.
    """
    # The fused kernel's backward in bfloat16 takes three to four times as long as plain products.
    slow = q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if q.device.type != "cpu" or (k.shape[2] > _FEW_KEYS and not slow):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
    absent = torch.zeros(visible.shape, dtype=logits.dtype, device=q.device)
    weights = (logits + absent.masked_fill(~visible, -torch.inf)).softmax(dim=-1)
    return weights.to(v.dtype) @ v


def visible_tokens(lengths: Tensor, size: int) -> Tensor:
    """Which of `size` padded tokens are there: bool [N, 1, 1, S]; at least the first one always."""
    places = torch.arange(size, device=lengths.device)
    return (places < lengths.clamp(min=1)[:, None])[:, None, None]
