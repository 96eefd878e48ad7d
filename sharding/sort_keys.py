"""Integers that order items by score, and by lower id where scores are equal.

So the best of several chunks, or ranks, are merged by one plain top-k, exact also between equals.

Shape legend: r queries, c items of a chunk, k results.
"""

import torch
from torch import Tensor

_LOW_BITS = (1 << 32) - 1


def best_of_chunk(scores: Tensor, first: int, k: int) -> Tensor:
    """[r, ≤ k] sort keys of the best of scores [r, c], exact also where scores are equal."""
    width = scores.shape[1]
    values, columns = scores.topk(min(k + 1, width))
    keys = sort_keys(values[:, :k], first + columns[:, :k]).sort(dim=1, descending=True).values
    if width > k:
        # topk chooses freely among equals; where the cut falls between equals, choose again.
        tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > -torch.inf)
        rows = tied.nonzero().squeeze(1)
        if rows.numel() > 0:
            ids = torch.arange(first, first + width, device=scores.device)
            keys[rows] = sort_keys(scores[rows], ids).topk(k).values
    return keys


def sort_keys(scores: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that order by score, then by lower id: score bits above, inverted id below."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, which it equals
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (_LOW_BITS - ids)


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and scores of sort keys; id 0 where the score is -inf."""
    ordered = (keys >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    ids = _LOW_BITS - (keys & _LOW_BITS)
    return ids.masked_fill(scores == -torch.inf, 0), scores
