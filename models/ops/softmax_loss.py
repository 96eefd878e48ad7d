"""Softmax cross entropy of next-item prediction, fused with the products that make its logits.

    loss[t] = -log( exp(s[t, pos]) / (exp(s[t, pos]) + sum over negatives r of exp(s[t, r])) )
    s[t, e] = queries[t] . keys[e] / temperature, less correction[e] where e is a negative

Shape legend: T tokens, P keys (a pool of looked-up items or the whole catalogue), D width,
R negatives of a group, G groups.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from models.ops import native

_MAX_NATIVE_WIDTH = 256
_REFERENCE_TOKENS = 1024
"""Tokens whose [T, R, D] or [T, P] intermediates the plain versions hold at once."""


def sampled_softmax_loss(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float,
    *,
    groups: Tensor | None = None,
    correction: Tensor | None = None,
) -> Tensor:
    """Loss of each token against its positive and its group's sampled negatives: [T].

    Args:
        queries: [T, D] float32 or bfloat16 (computed in float32).
        keys: [P, D], rows that ``positives`` and ``negatives`` point at.
        positives: int64 [T] rows of ``keys``; below 0 the token has no target: loss 0, no gradient.
        negatives: int64 [G, R] rows of ``keys``. One that equals the token's positive is left out.
        temperature: divides the products, > 0.
        groups: int64 [T], the row of ``negatives`` that each token uses; None: G = T, its own.
            ``segment_ids`` shares the negatives of a sequence, zeros those of a batch.
        correction: float32 [P] subtracted from the logits of negatives, log of the expected number
            of times a row is drawn (logQ), so that their sum estimates that over all rows. The
            positive is there with probability one. No gradient flows into it.

    Differentiable in ``queries`` and ``keys``.
    """
    if not runs_fused(queries, keys):
        return sampled_softmax_loss_reference(
            queries, keys, positives, negatives, temperature, groups=groups, correction=correction
        )
    loss: Tensor = _SampledSoftmax.apply(
        queries.float(), keys.float(), positives, negatives, groups, correction, 1.0 / temperature
    )
    return loss


def runs_fused(queries: Tensor, keys: Tensor) -> bool:
    """Whether ``sampled_softmax_loss`` takes its kernel for these."""
    return native.runs_native(queries, keys) and queries.shape[1] <= _MAX_NATIVE_WIDTH


def sampled_softmax_loss_reference(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float,
    *,
    groups: Tensor | None = None,
    correction: Tensor | None = None,
) -> Tensor:
    """``sampled_softmax_loss`` in plain PyTorch, some tokens at a time."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    keys = keys.to(dtype)
    losses = []
    for token in torch.arange(queries.shape[0], device=queries.device).split(_REFERENCE_TOKENS):
        target = positives[token]
        rows = negatives[token if groups is None else groups[token]]
        rows = torch.cat([target.clamp(min=0)[:, None], rows], dim=1)
        query = queries[token].to(dtype)
        candidates = keys.index_select(0, rows.flatten()).view(*rows.shape, keys.shape[1])
        logits = torch.einsum("td,trd->tr", query, candidates) / temperature
        if correction is not None:
            shift = correction.detach()[rows]
            shift[:, 0] = 0.0
            logits = logits - shift
        collides = rows == target[:, None]
        collides[:, 0] = False
        logits = logits.masked_fill(collides, -torch.inf)
        losses.append(-functional.log_softmax(logits, dim=1)[:, 0] * (target >= 0))
    return torch.cat(losses)


def full_softmax_loss(
    queries: Tensor, keys: Tensor, positives: Tensor, temperature: float
) -> Tensor:
    """Loss of each token against all P keys: [T]. Arguments as in ``sampled_softmax_loss``.

    Memory grows with T + P, not with T * P.
    """
    if not native.runs_native(queries, keys) or keys.shape[0] == 0:
        return full_softmax_loss_reference(queries, keys, positives, temperature)
    loss: Tensor = _FullSoftmax.apply(queries.float(), keys.float(), positives, 1.0 / temperature)
    return loss


def full_softmax_loss_reference(
    queries: Tensor, keys: Tensor, positives: Tensor, temperature: float
) -> Tensor:
    """``full_softmax_loss`` in plain PyTorch."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    logits = queries.to(dtype) @ keys.to(dtype).T / temperature
    return functional.cross_entropy(
        logits, positives.clamp(min=-1), reduction="none", ignore_index=-1
    )


class _SampledSoftmax(torch.autograd.Function):
    """csrc/softmax_loss.cpp; keeps the [T, R + 1] probabilities for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        positives: Tensor,
        negatives: Tensor,
        groups: Tensor | None,
        correction: Tensor | None,
        inverse_temperature: float,
    ) -> Tensor:
        tensors = [x.contiguous() for x in (queries, keys, positives, negatives)]
        groups = None if groups is None else groups.contiguous()
        tokens, count = queries.shape[0], negatives.shape[1]
        probabilities = queries.new_empty(tokens, count + 1)
        loss = queries.new_empty(tokens)
        ctx.sizes = (tokens, *keys.shape, count, inverse_temperature)
        ctx.save_for_backward(*tensors, groups, probabilities)
        native.call(
            "tandem_sampled_softmax_forward",
            *(tensors[0], tensors[1], None if correction is None else correction.contiguous()),
            *(tensors[2], tensors[3], groups, *ctx.sizes, torch.get_num_threads()),
            *(probabilities, loss),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        d_queries, d_keys = torch.empty_like(tensors[0]), torch.empty_like(tensors[1])
        native.call(
            "tandem_sampled_softmax_backward",
            *(*tensors, grads[0].contiguous(), *ctx.sizes, torch.get_num_threads()),
            *(d_queries, d_keys),
        )
        return d_queries, d_keys, None, None, None, None, None


class _FullSoftmax(torch.autograd.Function):
    """csrc/softmax_loss.cpp; keeps one number per token and recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, positives: Tensor, inverse_temperature: float
    ) -> Tensor:
        tensors = [x.contiguous() for x in (queries, keys, positives)]
        log_sums, loss = queries.new_empty(2, queries.shape[0]).unbind()
        ctx.sizes = (queries.shape[0], *keys.shape, inverse_temperature)
        ctx.save_for_backward(*tensors, log_sums)
        arguments = (*tensors, *ctx.sizes, torch.get_num_threads(), log_sums, loss)
        native.call("tandem_full_softmax_forward", *arguments)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        d_queries, d_keys = torch.empty_like(tensors[0]), torch.empty_like(tensors[1])
        arguments = (*tensors, grads[0].contiguous(), *ctx.sizes, torch.get_num_threads())
        native.call("tandem_full_softmax_backward", *arguments, d_queries, d_keys)
        return d_queries, d_keys, None, None
