"""Cross entropy of the next item against sampled negatives.

    loss[t] = log(1 + Σ_r exp(s[t, r] − log q[r] − s[t, positive]))
    s[t, e] = query[t] · key[e] / τ

A negative that is the position's own positive is left out. With `log q`, the log of the expected
number of times that the sampler draws item r, the sum estimates the softmax over the catalogue
without bias. The positive is there with probability one and is not corrected (arXiv 2507.09331).

Shape legend: T tokens, B sequences, U rows, D width, R negatives, C tokens of a block, K blocks.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.ops.jagged import positions_in_sequence, segment_ids
from models.ops.softmax_loss import runs_fused, sampled_softmax_loss

Sharing = Literal["batch", "sequence", "position"]
_LEFT_OUT = -1e30  # finite, so that a position whose negatives are all left out has zero gradient
_BLOCK_TOKENS = 64
_CHUNK_TOKENS = 512


def sampled_softmax(
    queries: Tensor,
    keys: Tensor,
    offsets: Tensor,
    positives: Tensor,
    negatives: Tensor,
    shared: Sharing,
    temperature: float,
    negative_logq: Tensor | None = None,
) -> Tensor:
    """Loss of each position: [T] float32, differentiable in `queries` and `keys`.

    Args:
        queries: [T, D] float32.
        keys: [U, D] float32.
        offsets: [B+1] of the sequences.
        positives: [T] rows of `keys`; below 0 the position predicts nothing and its loss is 0.
        negatives: rows of `keys`, [R] shared by the batch, [B, R] by a sequence, or [T, R].
        shared: which of the three.
        temperature: τ.
        negative_logq: log of the expected count of each negative, broadcast to `negatives`; equal
            for equal rows.
    """
    if not runs_fused(queries, keys):
        return sampled_softmax_by_products(
            queries, keys, offsets, positives, negatives, shared, temperature, negative_logq
        )
    groups = None
    if shared == "batch":
        groups, negatives = torch.zeros_like(positives), negatives[None]
    elif shared == "sequence":
        groups = segment_ids(offsets, queries.shape[0])
    correction = None if negative_logq is None else _of_keys(negative_logq, negatives, keys)
    return sampled_softmax_loss(
        queries, keys, positives, negatives, temperature, groups=groups, correction=correction
    )


def sampled_softmax_by_products(
    queries: Tensor,
    keys: Tensor,
    offsets: Tensor,
    positives: Tensor,
    negatives: Tensor,
    shared: Sharing,
    temperature: float,
    negative_logq: Tensor | None = None,
) -> Tensor:
    """`sampled_softmax` by matrix products in PyTorch, for devices without the fused kernel."""
    valid = positives >= 0
    positives = positives.clamp(min=0)
    positive_scores = (queries * F.embedding(positives, keys)).sum(-1) / temperature
    # Autocast may have rounded the products; everything after them is float32.
    scores = negative_scores(queries, keys, offsets, negatives, shared).float() / temperature
    if negative_logq is not None:
        scores = scores - _of_tokens(negative_logq.expand(negatives.shape), shared, offsets, scores)
    collides = _of_tokens(negatives, shared, offsets, scores) == positives[:, None]
    scores = scores.masked_fill(collides, _LEFT_OUT)
    losses = F.softplus(torch.logsumexp(scores, dim=-1) - positive_scores)
    return losses.masked_fill(~valid, 0.0)


def negative_scores(
    queries: Tensor, keys: Tensor, offsets: Tensor, negatives: Tensor, shared: Sharing
) -> Tensor:
    """query · key of each position's negatives: [T, R], never holding [T, R, D] rows."""
    if shared == "batch":
        return queries @ F.embedding(negatives, keys).T
    if shared == "sequence":
        return _sequence_scores(queries, keys, offsets, negatives)
    chunks = zip(queries.split(_CHUNK_TOKENS), negatives.split(_CHUNK_TOKENS), strict=True)
    scores = [
        checkpoint(_position_scores, query, keys, rows, use_reentrant=False)
        for query, rows in chunks
    ]
    return torch.cat(scores)


def _position_scores(queries: Tensor, keys: Tensor, negatives: Tensor) -> Tensor:
    return torch.bmm(F.embedding(negatives, keys), queries[:, :, None])[:, :, 0]


def _sequence_scores(queries: Tensor, keys: Tensor, offsets: Tensor, negatives: Tensor) -> Tensor:
    """One product per block of C tokens of a sequence: a sequence wastes less than one block."""
    total, sequences = queries.shape[0], offsets.numel() - 1
    blocks_end = torch.div(offsets.diff() + _BLOCK_TOKENS - 1, _BLOCK_TOKENS, rounding_mode="floor")
    blocks_end = blocks_end.cumsum(0)
    most = total // _BLOCK_TOKENS + sequences  # a bound that needs no host synchronisation
    blocks_start = F.pad(blocks_end, (1, 0))[:-1]
    place = blocks_start[segment_ids(offsets, total)] * _BLOCK_TOKENS
    place = place + positions_in_sequence(offsets, total)
    padded = queries.new_zeros(most * _BLOCK_TOKENS, queries.shape[1]).index_copy(0, place, queries)
    owner = torch.searchsorted(blocks_end, torch.arange(most, device=offsets.device), right=True)
    rows = negatives[owner.clamp(max=sequences - 1)]
    scores = torch.bmm(
        padded.unflatten(0, (most, _BLOCK_TOKENS)), F.embedding(rows, keys).transpose(1, 2)
    )
    return scores.flatten(0, 1).index_select(0, place)


def _of_keys(negative_logq: Tensor, negatives: Tensor, keys: Tensor) -> Tensor:
    """The correction of each row of `keys`, [U]; rows that are no negatives do not matter."""
    if negative_logq.dim() == 0:
        return negative_logq.expand(keys.shape[0])
    spread = negative_logq.expand(negatives.shape).flatten()
    return keys.new_zeros(keys.shape[0]).index_put((negatives.flatten(),), spread)


def _of_tokens(values: Tensor, shared: Sharing, offsets: Tensor, scores: Tensor) -> Tensor:
    """What belongs to each token of a quantity shaped like the negatives, broadcast to [T, R]."""
    if shared == "batch":
        return values[None]
    return values[segment_ids(offsets, scores.shape[0])] if shared == "sequence" else values
