"""Independent draws from a softmax over a catalogue, by two maxima in place of one.

The maximum of score + Gumbel noise over all items is a draw, but S draws of a query then cost S
hashes an item. Log-sum-exps of blocks of TILE items are scores, too: their noisy maximum draws the
block, and that of the block's items draws the item, with the same probabilities and V / TILE + TILE
hashes a draw. Blocks are the same whatever the chunks and the ranks, so that draws are, too.

Shape legend: r queries of one turn, S draws of a query, B blocks and c = B · TILE items of a chunk.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from models.generation.noise import extend_streams, gumbels
from sharding.sort_keys import sort_keys
from sharding.turns import TILE


def best_blocks(chunks: Iterable[tuple[int, Tensor]], streams: Tensor) -> Tensor:
    """Sort keys [r, S] of this rank's best block, by perturbed score; blocks count from 1.

    Args:
        chunks: first item id and scores [≥ r, c] of each chunk.
        streams: [r, S] int64, of each draw.
    """
    best = _nothing(streams)
    rows_at_once = max(1, TILE * TILE // streams.shape[1])  # a hash needs more than its result
    for first, scores in chunks:
        sums = scores[: streams.shape[0]].unflatten(1, (-1, TILE)).logsumexp(2)
        blocks = _block(first) + torch.arange(sums.shape[1], device=sums.device)
        for begin in range(0, streams.shape[0], rows_at_once):
            rows = slice(begin, begin + rows_at_once)
            noisy = sums[rows, None] + gumbels(streams[rows, :, None], blocks)
            best[rows] = best[rows].maximum(sort_keys(noisy, blocks).amax(2))
    return best


def best_items(chunks: Iterable[tuple[int, Tensor]], blocks: Tensor, streams: Tensor) -> Tensor:
    """Sort keys [r, S] of the best item, by perturbed score, of the blocks that this rank holds.

    Args:
        chunks: as `best_blocks` met them.
        blocks: [r, S] int64, the drawn blocks; 0 where there is none.
        streams: [r, S] int64, `item_streams`.
    """
    offsets = torch.arange(TILE, device=blocks.device)
    inside = streams.new_full((*blocks.shape, TILE), -torch.inf, dtype=torch.float32)
    for first, scores in chunks:
        of_blocks = scores[: blocks.shape[0]].unflatten(1, (-1, TILE))
        places = blocks - _block(first)
        here = (places >= 0) & (places < of_blocks.shape[1])
        taken = places.where(here, 0)[..., None].expand(-1, -1, TILE)
        inside = of_blocks.gather(1, taken).where(here[..., None], inside)
    ids = (blocks[..., None] - 1).clamp_(min=0) * TILE + 1 + offsets
    return sort_keys(inside + gumbels(streams[..., None], ids), ids).amax(2)


def item_streams(streams: Tensor, blocks: Tensor) -> Tensor:
    """Noise of the items of a draw's block: it must not be that of the blocks."""
    return extend_streams(streams, blocks)


def _block(first: int) -> int:
    """Number of the block that begins with this item."""
    return (first - 1) // TILE + 1


def _nothing(like: Tensor) -> Tensor:
    """Sort keys of no item."""
    none = torch.full(like.shape, -torch.inf, device=like.device)
    return sort_keys(none, torch.zeros_like(like))
