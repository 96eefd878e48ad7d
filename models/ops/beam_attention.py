"""Softmax attention of beams over their own paths of generated codes.

    o[n, w, h] = sum over p of softmax_p(q[n, w, h] . k_p / sqrt(Dh) + bias[h, p]) v_p

where k_p, v_p are what level p wrote for the ancestor of beam w.

Shape legend: N requests, W beams (W_p at level p), P positions of a path, H heads, G kv heads
(G divides H), Dh width of a head.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.ops import native

Written = Sequence[tuple[Tensor, Tensor]]
"""Of each level its keys and its values, [N, W_p, G, Dh] each."""


def beam_attention(q: Tensor, written: Written, ancestors: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of `q` [N, W, H, Dh] over P levels: [N, W, H, Dh].

    `ancestors` [N, W, P] int64, the beam of each level that a beam descends from; `bias` [H, P] or
    None. On the CPU in float32, without gradients, by a kernel that gathers nothing.
    """
    tensors = [q, *(each for pair in written for each in pair)]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    plain = any(x.dtype != torch.float32 for x in tensors) or not native.runs_native(*tensors)
    if plain or differentiable:
        return beam_attention_reference(q, written, ancestors, bias)
    return _native(q, written, ancestors, bias)


def beam_attention_reference(
    q: Tensor, written: Written, ancestors: Tensor, bias: Tensor | None
) -> Tensor:
    """`beam_attention` in plain PyTorch: gathers every beam's path."""
    keys, values = along_paths(written, ancestors)  # [N, W, P, G, Dh]
    groups = keys.shape[3]
    q = q.unflatten(2, (groups, -1)) / math.sqrt(q.shape[-1])  # [N, W, G, H/G, Dh]
    logits = (q[:, :, None] * keys[..., None, :]).sum(dim=-1)  # [N, W, P, G, H/G]
    if bias is not None:
        logits = logits + bias.t().unflatten(1, (groups, -1))
    weights = logits.softmax(dim=2).to(values.dtype)
    return (weights[..., None] * values[..., None, :]).sum(dim=2).flatten(2, 3)


def along_paths(written: Written, ancestors: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values along each beam's own path: [N, W, P, G, Dh] each."""
    request = torch.arange(ancestors.shape[0], device=ancestors.device)[:, None]
    paths = ancestors.unbind(2)
    k = [level[request, path] for (level, _), path in zip(written, paths, strict=True)]
    v = [level[request, path] for (_, level), path in zip(written, paths, strict=True)]
    return torch.stack(k, dim=2), torch.stack(v, dim=2)


def _native(q: Tensor, written: Written, ancestors: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel of csrc/beam_attention.cpp."""
    requests, beams, heads, width = q.shape
    groups = written[0][0].shape[2]
    queries, q_stride = native.token_rows(q.flatten(0, 1))
    kept, table = [], []  # copies, where there are any, live as long as their addresses are used
    for keys, values in written:
        k, stride = native.token_rows(keys.flatten(0, 1))
        v, v_stride = native.token_rows(values.flatten(0, 1))
        if stride != v_stride:
            k, v = k.contiguous(), v.contiguous()
            stride = groups * width
        kept.append((k, v))
        table.append((k.data_ptr(), v.data_ptr(), keys.shape[1], stride))
    out = torch.empty(q.shape)
    native.call(
        "tandem_beam_attention",
        *(queries, torch.tensor(table), ancestors.contiguous()),
        None if bias is None else bias.float().contiguous(),
        *(requests, beams, len(written), heads, groups, width, q_stride),
        *(torch.get_num_threads(), out),
    )
    return out
