"""Softmax attention over all of each jagged sequence, with a bias by distance (T5's encoder).

    O[i] = sum over j of softmax_j(q[i] . k[j] / sqrt(Dh) + bias[j - i + S - 1]) v[j]

Shape legend: B sequences, T total tokens, S longest sequence, H heads, Dh width of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops import native
from models.ops.jagged import jagged_to_padded, padded_to_jagged


def relative_attention(qkv: Tensor, bias: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Bidirectional attention within each sequence: [T, H, Dh].

    ``qkv`` [T, 3, H, Dh] float32 or bfloat16 (the kernel computes in float32), queries, keys and
    values of one projection; ``bias`` [H, 2 S - 1] float32, entry j - i + S - 1 for query i and
    key j; ``offsets`` int64 [B + 1]; ``longest`` is S, at least 1 and no less than any length.
    Differentiable in the float tensors.
    """
    if not native.runs_native(qkv, bias):
        return relative_attention_reference(qkv, bias, offsets, longest)
    assert bias.shape == (qkv.shape[2], 2 * longest - 1), (bias.shape, longest)
    assert offsets.numel() < 2 or int(offsets.diff().max()) <= longest, "a sequence is too long"
    out: Tensor = _NativeAttention.apply(qkv.float(), bias.float(), offsets, longest)
    return out.to(qkv.dtype)


def relative_attention_reference(
    qkv: Tensor, bias: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    """``relative_attention`` in plain PyTorch: pads to [B, H, S, S]."""
    padded = jagged_to_padded(qkv, offsets, longest).permute(2, 0, 3, 1, 4)
    q, k, v = padded.unbind()  # [B, H, S, Dh]
    places = torch.arange(longest, device=q.device)
    index = (places[None, :] - places[:, None] + longest - 1).flatten()
    pairs = bias.index_select(1, index).view(-1, longest, longest)
    absent = places >= offsets.diff()[:, None]
    logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3) + pairs
    # The lowest float instead of -inf: rows of an empty sequence stay numbers (and are not read).
    weights = logits.masked_fill(absent[:, None, None], torch.finfo(logits.dtype).min).softmax(-1)
    mixed = (weights.to(v.dtype) @ v).transpose(1, 2)
    return padded_to_jagged(mixed, offsets, qkv.shape[0])


class _NativeAttention(torch.autograd.Function):
    """The kernels of csrc/relative_attention.cpp; the backward pass recomputes the weights."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, offsets: Tensor, longest: int) -> Tensor:
        qkv, bias, offsets = qkv.contiguous(), bias.contiguous(), offsets.contiguous()
        tokens, _, heads, width = qkv.shape
        out, lse = qkv.new_empty(tokens, heads, width), qkv.new_empty(tokens, heads)
        ctx.sizes = (offsets.numel() - 1, heads, width, longest, torch.get_num_threads())
        native.call("tandem_relative_forward", qkv, offsets, bias, *ctx.sizes, out, lse)
        ctx.save_for_backward(qkv, bias, offsets, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, offsets, out, lse = ctx.saved_tensors
        d_qkv, d_bias = torch.empty_like(qkv), torch.empty_like(bias)
        arguments = (qkv, offsets, bias, out, lse, grads[0].contiguous(), *ctx.sizes)
        native.call("tandem_relative_backward", *arguments, d_qkv, d_bias)
        return d_qkv, d_bias, None, None
