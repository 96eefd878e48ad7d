"""The queries that a rank shows to all others, a turn at a time (see `sharding.retrieval`).

Shape legend: r queries of one turn, D width, S seen items.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

TURN = 256
"""Queries scored at once."""
TILE = 64
"""Matrix sides are multiples of this: kernels for odd edges round differently, and then equal keys
would score unequally, and ranks would depend on the world size. So are the shares of the ranks:
items 1 … TILE, and so on, are blocks that no rank and no chunk cuts."""


@dataclass(frozen=True)
class Turn:
    """The queries of one turn, on every rank, and the (query, item) pairs that do not compete."""

    queries: Tensor
    """[r rounded up to TILE, D] float32, zeros beyond r."""
    target_ids: Tensor
    """[r] int64; 0 where there is none."""
    masked_rows: Tensor
    """[M] int64, query of a pair."""
    masked_ids: Tensor
    """[M] int64, item of a pair, ascending."""
    streams: Tensor
    """[r] int64, noise of each query; nothing reads it where nothing is sampled."""

    @property
    def size(self) -> int:
        """r."""
        return self.target_ids.numel()


def split_turns(
    queries: Tensor, target_ids: Tensor, seen_ids: Tensor, seen_offsets: Tensor, streams: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """This rank's turns as they are sent: queries [r, D], and all integers of a turn in one."""
    turns = []
    for begin in range(0, queries.shape[0], TURN):
        targets = target_ids[begin : begin + TURN]
        edges = seen_offsets[begin : begin + TURN + 1]
        rows = torch.arange(targets.numel(), device=queries.device)
        seen_rows = rows.repeat_interleave(edges[1:] - edges[:-1])
        ids, order = torch.cat([seen_ids[edges[0] : edges[-1]], targets]).sort()
        noise = streams[begin : begin + TURN]
        numbers = torch.cat([noise, targets, torch.cat([seen_rows, rows])[order], ids])
        turns.append((queries[begin : begin + TURN].float().contiguous(), numbers))
    return turns


def received_turn(queries: Tensor, numbers: Tensor) -> Turn:
    """A turn of what `split_turns` sent."""
    rows = queries.shape[0]
    pairs = (numbers.numel() - 2 * rows) // 2
    streams, targets, masked_rows, masked_ids = numbers.split([rows, rows, pairs, pairs])
    padded = pad(queries, (0, 0, 0, rounded_up(rows) - rows))
    return Turn(padded, targets, masked_rows, masked_ids, streams)


def rounded_up(size: int) -> int:
    """The next multiple of TILE."""
    return -(-size // TILE) * TILE
