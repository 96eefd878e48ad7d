"""log Σ over a catalogue that ranks share, and its gradients, against one process's plain one."""

import pytest
import torch
from torch import Tensor

from sharding.process_group import DistributedContext, current_context
from sharding.shared_catalogue import CatalogueShare, log_partition
from tests.harness import run_ranks

WIDTH = 5
Found = tuple[Tensor, Tensor, Tensor, tuple[int, int]]


def all_inputs(items: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of items 0 … V, queries, and what each query's log Z weighs in the loss."""
    generator = torch.Generator().manual_seed(items)
    table = torch.randn(items + 1, WIDTH, generator=generator, dtype=torch.float64)
    asked = 3.0 * torch.randn(queries, WIDTH, generator=generator, dtype=torch.float64)
    return table.requires_grad_(), asked, torch.randn(queries, generator=generator).double()


def on_rank(items: int, queries: int) -> Found:
    """This rank's values, the gradient of its queries, its part of the table's, and the share.

    Rank r asks every world_size-th query; the last of several asks nothing.
    """
    ctx = current_context("cpu")
    table, asked, weights = all_inputs(items, queries)
    asking = max(ctx.world_size - 1, 1)
    mine = slice(ctx.rank, None, asking) if ctx.rank < asking else slice(0, 0)
    own = asked[mine].clone().requires_grad_()
    share, shown = CatalogueShare.of(ctx, items), []

    def of_share(queries: Tensor) -> Tensor:
        shown.append(queries.shape[0])
        keys = table[share.ids(ctx.device)]
        return (queries @ keys.T).logsumexp(1)

    values = log_partition(ctx, own, of_share)
    (values * weights[mine]).sum().backward()
    assert own.grad is not None and table.grad is not None
    return values.detach(), own.grad, table.grad, (share.size, shown[0])


@pytest.mark.parametrize(("world_size", "items"), [(1, 7), (2, 7), (3, 37), (3, 2)])
def test_equals_one_process(world_size: int, items: int) -> None:
    """Also where a rank has no items, and where one has no queries."""
    queries, asking = 11, max(world_size - 1, 1)
    table, asked, weights = all_inputs(items, queries)
    asked.requires_grad_()
    expected = (asked @ table[1:].T).logsumexp(1)
    (expected * weights).sum().backward()
    assert asked.grad is not None and table.grad is not None
    found: list[Found] = run_ranks(world_size, on_rank, items, queries)
    for rank in range(asking):
        torch.testing.assert_close(found[rank][0], expected[rank::asking].detach())
        torch.testing.assert_close(found[rank][1], asked.grad[rank::asking])
    torch.testing.assert_close(torch.stack([part[2] for part in found]).sum(0), table.grad)
    for rank, (_, _, gradient, _) in enumerate(found):  # what a rank does not hold it leaves alone
        ctx = DistributedContext(rank, world_size, torch.device("cpu"))
        elsewhere = torch.ones(items + 1, dtype=torch.bool)
        elsewhere[CatalogueShare.of(ctx, items).ids(ctx.device)] = False
        assert not gradient[elsewhere].any()
    sizes, seen = zip(*(part[3] for part in found), strict=True)
    assert sum(sizes) == items and max(sizes) == -(-items // world_size)
    assert set(seen) == {world_size * -(-queries // asking) if world_size > 1 else queries}
