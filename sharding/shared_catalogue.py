"""The catalogue dealt out to the ranks, and log Σ exp over all of it with gradients.

Every rank answers for one contiguous range of item ids, and for the queries of all ranks: queries
are gathered, each rank sums over its own range, and the sums are added up. So a rank holds keys,
gradients of keys and logits of its range alone; what it holds of the other ranks are the queries of
a global micro batch, whose number the recipe sets, not the world size.

Shape legend: b queries of a rank, R those of all ranks (padded), D width, V items.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from sharding.process_group import DistributedContext


@dataclass(frozen=True)
class CatalogueShare:
    """The items first … first + size - 1, for which a rank answers."""

    first: int
    size: int
    """0 of the last ranks where there are more ranks than items."""

    @classmethod
    def of(cls, ctx: DistributedContext, num_items: int, block: int = 1) -> "CatalogueShare":
        """This rank's share of items 1 … V, of whole blocks of as many items."""
        most = cls.largest(ctx, num_items, block)
        first = 1 + ctx.rank * most
        return cls(first, max(0, min(num_items + 1 - first, most)))

    @staticmethod
    def largest(ctx: DistributedContext, num_items: int, block: int = 1) -> int:
        """Items of the largest share, that of rank 0."""
        return min(-(-num_items // (block * ctx.world_size)) * block, num_items)

    def ids(self, device: torch.device) -> Tensor:
        """Its items, [size] int64."""
        return torch.arange(self.first, self.first + self.size, device=device)


def log_partition(
    ctx: DistributedContext, queries: Tensor, of_share: Callable[[Tensor], Tensor]
) -> Tensor:
    """log Σ_v exp(score of v) over the whole catalogue: [b] float32. Collective, twice over.

    Differentiable in `queries`, and in what `of_share` reads; the backward is collective too, so
    that every rank must reach it, which it does where anything that `of_share` reads wants a
    gradient. The gradients of all ranks' losses meet in the rank that holds an item.

    Args:
        ctx: this rank.
        queries: [b, D] float32; b differs between ranks and may be 0.
        of_share: queries [R, D] → log Σ over this rank's share, [R] float32, -inf of an empty one.
    """
    if ctx.world_size == 1:
        return of_share(queries)
    count = queries.shape[0]
    most = int(ctx.all_reduce_max(torch.tensor(count)))  # on the CPU: no wait for the device
    mine = slice(ctx.rank * most, ctx.rank * most + count)
    shown: Tensor = _OfAllRanks.apply(pad(queries, (0, 0, 0, most - count)), ctx)
    sums: Tensor = _Together.apply(of_share(shown), ctx)
    return sums[mine]


class _OfAllRanks(torch.autograd.Function):
    """[b, D] of every rank → [world size · b, D]; backward, every rank's gradient of ours."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: DistributedContext) -> Tensor:
        ctx.ranks = ranks
        gathered = values.new_empty(ranks.world_size * values.shape[0], values.shape[1])
        dist.all_gather_into_tensor(gathered, values.contiguous(), group=ranks.group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ranks: DistributedContext = ctx.ranks
        mine = grads[0].new_empty(grads[0].shape[0] // ranks.world_size, grads[0].shape[1])
        dist.reduce_scatter_tensor(mine, grads[0].contiguous(), group=ranks.group)
        return mine, None


class _Together(torch.autograd.Function):
    """Logs of every rank's sums [R] → log of their sum; backward, each rank's share of it."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, ranks: DistributedContext) -> Tensor:
        top = ranks.all_reduce_max(sums.clone())
        whole = top + ranks.all_reduce_sum((sums - top).exp()).log()
        ctx.ranks = ranks
        ctx.save_for_backward(sums, whole)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sums, whole = ctx.saved_tensors
        ranks: DistributedContext = ctx.ranks
        of_all = ranks.all_reduce_sum(grads[0].clone())  # each rank has those of its own queries
        return of_all * (sums - whole).exp(), None
