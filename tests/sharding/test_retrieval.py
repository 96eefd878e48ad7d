"""Retrieval over a sharded catalogue against a dense, single-process reference."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharding.process_group import DistributedContext, current_context
from sharding.retrieval import Catalogue
from sharding.turns import TURN
from tests.harness import run_ranks
from tests.sharding.policies import Settings, make_batch, make_policy, train

ALONE = DistributedContext(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Case:
    """A catalogue, queries of all ranks, and which rank asks which."""

    keys: Tensor  # [V, D]
    queries: Tensor  # [B, D]
    targets: Tensor  # [B]
    seen: list[list[int]]
    allowed: Tensor  # [V + 1]
    owners: Tensor  # [B]
    chunk: int
    k: int

    def of_rank(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Rows that a rank asks, its queries, targets, seen ids and offsets."""
        rows = (self.owners == rank).nonzero().squeeze(1)
        lists = [self.seen[int(row)] for row in rows]
        offsets = torch.tensor([0, *np.cumsum([len(items) for items in lists], dtype=np.int64)])
        flat = torch.tensor([item for items in lists for item in items], dtype=torch.int64)
        return rows, self.queries[rows], self.targets[rows], flat, offsets


def make_case(seed: int, items: int, queries: int, width: int, world_size: int) -> Case:
    """Small integers throughout: scores are exact in any order of summation, and ties abound."""
    rng = np.random.default_rng(seed)
    seen = [rng.integers(1, items + 1, rng.integers(0, 2 * items + 1)) for _ in range(queries)]
    return Case(
        keys=torch.from_numpy(rng.integers(-2, 3, (items, width)).astype(np.float32)),
        queries=torch.from_numpy(rng.integers(-2, 3, (queries, width)).astype(np.float32)),
        targets=torch.from_numpy(rng.integers(1, items + 1, queries)),
        seen=[row.tolist() for row in seen],
        allowed=torch.from_numpy(rng.integers(0, 2, items + 1)).bool(),
        owners=torch.from_numpy(rng.integers(0, world_size, queries)),
        chunk=int(rng.integers(1, 100)),
        k=int(rng.integers(1, items + 5)),
    )


def reference(case: Case, row: int) -> tuple[int, list[int], list[int], float]:
    """Rank, top-k ids, those of the allowed items, and log-sum-exp, as their definitions say."""
    scores = (case.keys.double() @ case.queries[row].double()).tolist()
    target, seen = int(case.targets[row]), set(case.seen[row])
    items = range(1, len(scores) + 1)
    order = sorted(items, key=lambda item: (-scores[item - 1], item))
    rivals = [item for item in order if item not in seen or item == target]
    top = [item for item in order if item not in seen]
    allowed = [item for item in top if case.allowed[item]]
    top, allowed = ((x + [0] * case.k)[: case.k] for x in (top, allowed))
    exact = float(np.log(np.sum(np.exp(np.array(scores) / 0.7))))
    return 1 + rivals.index(target), top, allowed, exact


def check(case: Case, ctx: DistributedContext) -> None:
    """Compare this rank's answers with the reference; every rank raises if one of them differs."""
    catalogue = Catalogue.from_keys(
        ctx, lambda ids: case.keys[ids - 1], case.keys.shape[0], case.chunk
    )
    rows, queries, targets, seen, offsets = case.of_rank(ctx.rank)
    ranks = catalogue.ranks(queries, targets, seen, offsets)
    ids, scores = catalogue.top_k(queries, case.k, seen, offsets)
    some, _ = catalogue.top_k(queries, case.k, seen, offsets, case.allowed)
    sums = catalogue.log_sum_exp(queries, 0.7)
    expected = [reference(case, int(row)) for row in rows]
    good = (
        ranks.tolist() == [rank for rank, _, _, _ in expected]
        and ids.tolist() == [top for _, top, _, _ in expected]
        and some.tolist() == [allowed for _, _, allowed, _ in expected]
        and ids.shape == (len(rows), case.k)
        and np.allclose(sums.numpy(), [exact for _, _, _, exact in expected], rtol=1e-5, atol=1e-5)
    )
    dense = torch.cat([torch.full((len(rows), 1), -torch.inf), queries @ case.keys.T], dim=1)
    good = good and torch.equal(scores, dense.gather(1, ids))
    assert all(ctx.all_gather_object(good)), (case, ranks, ids, expected)


def explore(world_size: int, ctx: DistributedContext, examples: int) -> None:
    """Check random cases; derandomised, so that all ranks draw the same."""

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        seed=st.integers(0, 2**32 - 1),
        items=st.integers(1, 200),
        queries=st.integers(0, 12),
        width=st.integers(1, 5),
    )
    def run(seed: int, items: int, queries: int, width: int) -> None:
        check(make_case(seed, items, queries, width, world_size), ctx)

    run()


def explore_on_rank(examples: int) -> None:
    ctx = current_context("cpu")
    explore(ctx.world_size, ctx, examples)
    # more queries than one turn, on one rank only
    check(make_case(3, 130, 2 * TURN + 5, 4, 1), ctx)


def test_alone_equals_dense() -> None:
    explore(1, ALONE, 150)
    check(make_case(3, 130, 2 * TURN + 5, 4, 1), ALONE)


@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_equals_dense(world_size: int) -> None:
    run_ranks(world_size, explore_on_rank, 40)


def equal_keys(world_size: int) -> None:
    """All items have one key: only ids decide, although the scores are rounded."""
    ctx = current_context("cpu") if world_size > 1 else ALONE
    generator = torch.Generator().manual_seed(5)
    for asked, items in ((300, 1000), (7, 37), (2, 3706)):  # kernels differ by shape
        key = torch.randn(50, generator=generator)
        queries = torch.randn(asked, 50, generator=generator)
        targets = torch.randint(1, items + 1, (asked,), generator=generator)
        catalogue = Catalogue.from_keys(ctx, lambda ids, key=key: key.expand(len(ids), 50), items)
        nothing = targets[:0], torch.zeros(asked + 1, dtype=torch.int64)
        assert torch.equal(catalogue.ranks(queries, targets, *nothing), targets)
        assert (catalogue.top_k(queries, 7, *nothing)[0] == torch.arange(1, 8)).all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equal_keys_rank_by_id(world_size: int) -> None:
    if world_size == 1:
        equal_keys(1)
    else:
        run_ranks(world_size, equal_keys, world_size)


def test_a_broken_model_ranks_last() -> None:
    catalogue = Catalogue.from_keys(ALONE, lambda ids: torch.full((ids.numel(), 2), torch.nan), 9)
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    assert catalogue.ranks(torch.ones(1, 2), torch.tensor([4]), *nothing).tolist() == [9]


def test_keys_are_fetched_in_chunks_and_each_once() -> None:
    asked: list[Tensor] = []

    def keys(ids: Tensor) -> Tensor:
        asked.append(ids)
        return ids[:, None].to(torch.bfloat16)

    catalogue = Catalogue.from_keys(ALONE, keys, 10, chunk=4)
    assert [ids.tolist() for ids in asked] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    ids, scores = catalogue.top_k(torch.ones(1, 1), 3, *nothing)
    assert ids.tolist() == [[10, 9, 8]] and scores.tolist() == [[10.0, 9.0, 8.0]]


def lookups_of_a_rank() -> int:
    """Number of collective lookups; 130 items leave the last of 4 ranks without any."""
    ctx = current_context("cpu")
    calls = 0

    def keys(ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return ids[:, None].log()

    catalogue = Catalogue.from_keys(ctx, keys, 130, chunk=50)
    found = catalogue.log_sum_exp(torch.ones(1, 1), 1.0).item()
    assert found == pytest.approx(math.log(130 * 131 / 2))
    return calls


def test_every_rank_makes_the_same_lookups() -> None:
    assert run_ranks(4, lookups_of_a_rank) == [2, 2, 2, 2]


def ask_a_model(variants: list[Settings]) -> None:
    """Each rank asks for the next items of its own batch's users."""
    ctx = current_context("cpu")
    for variant in variants:
        policy = make_policy(ctx, variant)
        train(policy, 1)
        batch = make_batch(5, ctx)
        queries, keys = policy.query(batch), policy.item_keys(torch.arange(1, 38))
        catalogue = Catalogue(policy, 37, chunk=7)
        nothing = batch.item_ids[:0], torch.zeros(len(queries) + 1, dtype=torch.int64)
        scores = queries @ keys.T
        own = scores.gather(1, batch.target_ids[:, None] - 1)
        ranks = 1 + (scores > own).sum(1)
        assert torch.equal(catalogue.ranks(queries, batch.target_ids, *nothing), ranks)
        best = scores.topk(5)
        ids, found = catalogue.top_k(queries, 5, *nothing)
        assert torch.equal(ids, 1 + best.indices) and torch.allclose(found, best.values)
        sums = catalogue.log_sum_exp(queries, 0.05)
        assert torch.allclose(sums, (scores / 0.05).logsumexp(1), rtol=1e-5)


def test_a_model_answers_like_its_own_keys() -> None:
    variants = [Settings(), Settings(placement="replicated", zero_stage=3)]
    run_ranks(2, ask_a_model, variants)


def ask_for_a_bad_target() -> str:
    ctx = current_context("cpu")
    catalogue = Catalogue.from_keys(ctx, lambda ids: ids[:, None].float(), 5)
    offsets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError) as error:
        catalogue.ranks(torch.ones(1, 1), torch.tensor([1 + 5 * ctx.rank]), offsets[:0], offsets)
    return str(error.value)


def test_a_bad_target_on_one_rank_stops_all() -> None:
    assert run_ranks(2, ask_for_a_bad_target) == ["rank 1: a target is not in 1…5"] * 2


def test_bad_shapes_are_refused() -> None:
    catalogue = Catalogue.from_keys(ALONE, lambda ids: ids[:, None].float(), 5)
    offsets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="width 1"):
        catalogue.top_k(torch.ones(2, 3), 1, offsets[:0], offsets)
    with pytest.raises(ValueError, match="number of queries"):
        catalogue.top_k(torch.ones(1, 1), 1, offsets[:0], offsets)
    with pytest.raises(ValueError, match="seen_ids"):
        catalogue.top_k(torch.ones(2, 1), 1, offsets, offsets)


def test_memory_does_not_grow_with_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """No score matrix is wider than a chunk."""
    widths: list[int] = []
    scores = Catalogue._scores

    def spy(self: Catalogue, turn: object) -> object:
        for first, chunk in scores(self, turn):  # type: ignore[arg-type]
            widths.append(chunk.shape[1])
            yield first, chunk

    monkeypatch.setattr(Catalogue, "_scores", spy)
    catalogue = Catalogue.from_keys(ALONE, lambda ids: ids[:, None].float(), 10_000, chunk=512)
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    assert catalogue.ranks(torch.ones(1, 1), torch.tensor([9_990]), *nothing).tolist() == [11]
    assert max(widths) <= 512 and len(widths) == 20
