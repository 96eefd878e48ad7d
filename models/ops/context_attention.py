"""Softmax attention of a request's queries over its own context, of any length.

Shape legend: N requests, G key-value heads, Q queries of a request and head (beams or positions,
and the heads that share a group), T tokens of all contexts, S longest context, Dh width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops import native
from models.ops.jagged import jagged_to_padded
from models.ops.masked_attention import masked_attention, visible_tokens


def context_attention(q: Tensor, keys: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """softmax(q kᵀ / √Dh) v over the tokens of each request's context: [N, G, Q, Dh] like ``q``.

    ``q`` [N, G, Q, Dh]; ``keys``, ``values`` [T, G, Dh]; ``offsets`` int64 [N + 1]. Reading an
    empty context gives 0. Float32 or bfloat16 on the CPU (the kernel computes in float32); see
    ``reads_jagged``. Differentiable.
    """
    out: Tensor = _NativeAttention.apply(q.float(), keys.float(), values.float(), offsets)
    return out.to(q.dtype)


def reads_jagged(keys: Tensor, values: Tensor) -> bool:
    """Whether ``context_attention`` takes these; elsewhere contexts are padded, once."""
    return native.runs_native(keys, values)


def context_attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    """``context_attention`` over rows padded to ``longest`` tokens, at least 1."""
    padded_keys, padded_values = (
        jagged_to_padded(x, offsets, longest).transpose(1, 2) for x in (keys, values)
    )
    return masked_attention(q, padded_keys, padded_values, visible_tokens(offsets.diff(), longest))


class _NativeAttention(torch.autograd.Function):
    """The kernels of csrc/context_attention.cpp; the backward pass recomputes the weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        inputs = [x.contiguous() for x in (q, keys, values, offsets)]
        out, lse = torch.empty_like(inputs[0]), q.new_empty(q.shape[:3])
        ctx.sizes = (*q.shape, torch.get_num_threads())
        native.call("tandem_context_forward", *inputs, *ctx.sizes, out, lse)
        ctx.save_for_backward(*inputs, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, values, offsets, out, lse = ctx.saved_tensors
        found = [torch.empty_like(x) for x in (q, keys, values)]
        inputs = (q, keys, values, offsets, out, lse, grads[0].contiguous())
        native.call("tandem_context_backward", *inputs, *ctx.sizes, *found)
        return *found, None
