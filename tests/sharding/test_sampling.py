"""Sampling from a sharded catalogue: exact, and the same for every world size."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from models.generation.noise import gumbels, request_streams, sample_streams
from sharding.process_group import DistributedContext, current_context
from sharding.retrieval import Catalogue
from sharding.turns import TILE, TURN
from tests.harness import run_ranks

ALONE = DistributedContext(0, 1, torch.device("cpu"))
ITEMS, QUERIES, WIDTH, K = 157, TURN + 21, 4, 9


def keys_of_items() -> Tensor:
    return torch.randn(ITEMS, WIDTH, generator=torch.Generator().manual_seed(1))


def catalogue_of(ctx: DistributedContext, keys: Tensor, chunk: int = 64) -> Catalogue:
    return Catalogue.from_keys(ctx, lambda ids: keys[ids - 1], keys.shape[0], chunk)


def all_queries() -> tuple[Tensor, Tensor]:
    queries = torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(2))
    return queries, request_streams(torch.arange(QUERIES) * 7)[:, 0]


Method = Literal["sample", "draw"]


def asked(catalogue: Catalogue, method: Method, mine: slice) -> tuple[Tensor, Tensor]:
    """K items of some of the queries, without replacement or independent of each other."""
    queries, streams = (each[mine] for each in all_queries())
    if method == "sample":
        return catalogue.sample(queries, K, streams, 0.5)
    return catalogue.draw(queries, K, streams, 0.5)


def asked_on_rank(method: Method, chunk: int) -> tuple[Tensor, Tensor]:
    """Every world_size-th query of this rank; the last rank of several asks nothing."""
    ctx = current_context("cpu")
    asking = max(ctx.world_size - 1, 1)
    mine = slice(ctx.rank, None, asking) if ctx.rank < asking else slice(0, 0)
    return asked(catalogue_of(ctx, keys_of_items(), chunk), method, mine)


def test_is_the_top_k_of_perturbed_scores() -> None:
    queries, streams = all_queries()
    ids, scores = catalogue_of(ALONE, keys_of_items()).sample(queries, K, streams, 0.5)
    noise = gumbels(streams[:, None], torch.arange(1, ITEMS + 1))
    expected = (queries @ keys_of_items().T / 0.5 + noise).topk(K)
    assert torch.equal(ids, expected.indices + 1)
    torch.testing.assert_close(scores, expected.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "world_size", "chunk"),
    [
        ("sample", 2, 64),
        ("sample", 3, 64),
        ("draw", 1, 64),
        ("draw", 2, 64),
        ("draw", 3, 128),
        ("draw", 4, 64),
    ],
)
def test_does_not_depend_on_world_and_chunks(method: Method, world_size: int, chunk: int) -> None:
    """Three blocks: the last of four ranks holds no item."""
    ids, scores = asked(catalogue_of(ALONE, keys_of_items(), 1024), method, slice(None))
    parts = run_ranks(world_size, asked_on_rank, method, chunk)
    asking = max(world_size - 1, 1)
    for rank in range(asking):
        assert torch.equal(parts[rank][0], ids[rank::asking])
        assert torch.equal(parts[rank][1], scores[rank::asking])
    assert all(part[0].shape == (0, K) for part in parts[asking:])


def test_more_than_the_catalogue_has() -> None:
    ids, scores = catalogue_of(ALONE, keys_of_items()[:3]).sample(
        torch.zeros(2, WIDTH), 5, torch.arange(2), 1.0
    )
    assert ids[:, :3].sort().values.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert (ids[:, 3:] == 0).all() and (scores[:, 3:] == -torch.inf).all()


def chi_square(ids: Tensor, probabilities: Tensor) -> float:
    """Pearson's χ² of drawn ids; outcomes that are seldom are counted as one."""
    counts = torch.bincount(ids.flatten() - 1, minlength=probabilities.numel()).float()
    expected = ids.numel() * probabilities
    seldom = expected < 20
    counts = torch.cat([counts[~seldom], counts[seldom].sum()[None]])
    expected = torch.cat([expected[~seldom], expected[seldom].sum()[None]]).clamp(min=1e-9)
    return float(((counts - expected).square() / expected).sum())


def test_independent_draws_follow_the_softmax() -> None:
    """40,000 draws over 6 items; 5 degrees of freedom, 1 in 10^5 exceeds 30.9."""
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5])
    queries, streams = torch.ones(400, 1), request_streams(torch.arange(400))[:, 0]
    ids, _ = catalogue_of(ALONE, logits[:, None], chunk=3).draw(queries, 100, streams, 0.7)
    assert chi_square(ids, (logits / 0.7).softmax(0)) < 30.9


@pytest.mark.parametrize("sharpness", [0.0, 2.0, 30.0])
def test_independent_draws_of_many_blocks_follow_the_softmax(sharpness: float) -> None:
    """Over 5 blocks, the last not full: at most 300 degrees of freedom, 1 in 10^5 exceeds 414."""
    items = 4 * TILE + 45
    logits = sharpness * torch.randn(items, generator=torch.Generator().manual_seed(3))
    queries, streams = torch.ones(500, 1), request_streams(torch.arange(500))[:, 0]
    catalogue = catalogue_of(ALONE, logits[:, None], chunk=2 * TILE)
    ids, scores = catalogue.draw(queries, 200, streams, 1.0)
    assert chi_square(ids, logits.softmax(0)) < 414
    torch.testing.assert_close(scores, logits[ids - 1], rtol=1e-5, atol=1e-4)
    pairs = (ids[:, 1:] == ids[:, :-1]).float().mean()  # of one query's draws, one after the other
    same = logits.softmax(0).square().sum()
    assert abs(float(pairs - same)) < 5 * float((same * (1 - same) / pairs.numel()).sqrt())


def test_a_draw_is_the_same_among_few_and_many() -> None:
    queries, streams = all_queries()
    catalogue = catalogue_of(ALONE, keys_of_items())
    many, _ = catalogue.draw(queries, 40, streams, 1.0)
    few, _ = catalogue.draw(queries[40:41], 7, streams[40:41], 1.0)
    assert torch.equal(many[40:41, :7], few)


def test_only_items_with_a_probability_are_drawn() -> None:
    """One item holds it all; a query without any finite score draws nothing."""
    logits = torch.full((200, 1), -torch.inf)
    logits[150] = 3.0
    catalogue, streams = catalogue_of(ALONE, logits), torch.arange(2)
    ids, scores = catalogue.draw(torch.ones(2, 1), 4, streams, 1.0)
    assert (ids == 151).all()
    torch.testing.assert_close(scores, torch.full((2, 4), 3.0))
    nothing = catalogue_of(ALONE, torch.full((200, 1), -torch.inf))
    ids, scores = nothing.draw(torch.ones(2, 1), 4, streams, 1.0)
    assert (ids == 0).all() and (scores == -torch.inf).all()


def test_draws_without_replacement_follow_plackett_luce() -> None:
    """Ordered pairs of distinct items: p_i · p_j / (1 - p_i); 5 degrees of freedom."""
    p = torch.tensor([0.5, 0.3, 0.2])
    draws = 30_000
    streams = sample_streams(torch.tensor([5]), draws)[0]
    catalogue = catalogue_of(ALONE, p.log()[:, None])
    ids, _ = catalogue.sample(torch.ones(draws, 1), 2, streams, 1.0)
    pairs = p[:, None] * p[None, :] / (1 - p[:, None])
    pairs.fill_diagonal_(0.0)
    expected = draws * pairs.flatten()
    counts = torch.bincount(((ids[:, 0] - 1) * 3 + ids[:, 1] - 1), minlength=9)
    assert (counts[expected == 0] == 0).all()
    there = expected > 0
    assert float(((counts - expected).square()[there] / expected[there]).sum()) < 30.9


def test_a_query_draws_the_same_in_any_company() -> None:
    queries, streams = all_queries()
    catalogue = catalogue_of(ALONE, keys_of_items())
    together, _ = catalogue.sample(queries, K, streams, 1.0)
    alone, _ = catalogue.sample(queries[40:41], K, streams[40:41], 1.0)
    assert torch.equal(together[40:41], alone)
