"""Sampling from a sharded catalogue: exact, and the same for every world size."""

import pytest
import torch
from torch import Tensor

from models.generation.noise import gumbels, request_streams, sample_streams
from sharding.process_group import DistributedContext, current_context
from sharding.retrieval import TURN, Catalogue
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


def draw_on_rank(temperature: float) -> tuple[Tensor, Tensor]:
    """Every world_size-th query of this rank; the last rank of several asks nothing."""
    ctx = current_context("cpu")
    catalogue = catalogue_of(ctx, keys_of_items())
    queries, streams = all_queries()
    asking = max(ctx.world_size - 1, 1)
    mine = slice(ctx.rank, None, asking) if ctx.rank < asking else slice(0, 0)
    return catalogue.sample(queries[mine], K, streams[mine], temperature)


def test_is_the_top_k_of_perturbed_scores() -> None:
    queries, streams = all_queries()
    ids, scores = catalogue_of(ALONE, keys_of_items()).sample(queries, K, streams, 0.5)
    noise = gumbels(streams[:, None], torch.arange(1, ITEMS + 1))
    expected = (queries @ keys_of_items().T / 0.5 + noise).topk(K)
    assert torch.equal(ids, expected.indices + 1)
    torch.testing.assert_close(scores, expected.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_does_not_depend_on_the_world_size(world_size: int) -> None:
    queries, streams = all_queries()
    ids, scores = catalogue_of(ALONE, keys_of_items()).sample(queries, K, streams, 0.5)
    parts = run_ranks(world_size, draw_on_rank, 0.5)
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


def test_independent_draws_follow_the_softmax() -> None:
    """Pearson's χ² of 40,000 draws over 6 items; 5 degrees of freedom, 1 in 10^5 exceeds 30.9."""
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5])
    draws, temperature = 40_000, 0.7
    streams = sample_streams(torch.tensor([11]), draws)[0]
    catalogue = catalogue_of(ALONE, logits[:, None], chunk=3)
    ids, _ = catalogue.sample(torch.ones(draws, 1), 1, streams, temperature)
    expected = draws * (logits / temperature).softmax(0)
    counts = torch.bincount(ids[:, 0] - 1, minlength=6)
    assert float(((counts - expected).square() / expected).sum()) < 30.9


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
