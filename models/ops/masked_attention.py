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
    if q.device.type != "cpu" or k.shape[2] > _FEW_KEYS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
    absent = torch.zeros(visible.shape, dtype=logits.dtype, device=q.device)
    weights = (logits + absent.masked_fill(~visible, -torch.inf)).softmax(dim=-1)
    return weights.to(v.dtype) @ v
