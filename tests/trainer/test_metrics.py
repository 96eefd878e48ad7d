"""Ranking metrics against a loop over users written from the definitions."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics import Popularity, RankingMetrics, head_mask


@dataclass(frozen=True)
class User:
    rank: int
    target: int
    top: list[int]
    liked: bool = False


@st.composite
def populations(draw: st.DrawFn) -> tuple[int, list[int], set[int], list[User]]:
    num_items = draw(st.integers(3, 30))
    ks = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True))
    head = draw(st.sets(st.integers(1, num_items), max_size=num_items))
    width = min(max(ks), num_items)
    tops = st.permutations(range(1, num_items + 1)).map(lambda order: order[:width])
    user = st.builds(
        User, st.integers(1, num_items), st.integers(1, num_items), tops, st.booleans()
    )
    return num_items, ks, head, draw(st.lists(user, min_size=1, max_size=12))


def cold_items(num_items: int, head: set[int]) -> set[int]:
    """Some of the tail: every third item."""
    return {item for item in range(3, num_items + 1, 3) if item not in head}


def loop(
    num_items: int,
    ks: list[int],
    head: set[int],
    users: list[User],
    cold: set[int] | None = None,
) -> dict[str, float]:
    """The definitions, one user at a time; `cold` as `measure` has it unless given."""
    cold = cold_items(num_items, head) if cold is None else cold
    result: dict[str, float] = {}
    groups = {
        "": users,
        "/head": [u for u in users if u.target in head],
        "/tail": [u for u in users if u.target not in head],
        "/cold": [u for u in users if u.target in cold],
        "/liked": [u for u in users if u.liked],
    }
    for suffix, group in groups.items():
        result[f"users{suffix}"] = len(group)
        if not group:
            continue
        result[f"mrr{suffix}"] = sum(1 / u.rank for u in group) / len(group)
        for k in ks:
            hits = [u for u in group if u.rank <= k]
            result[f"hr@{k}{suffix}"] = len(hits) / len(group)
            gain = sum(1 / math.log2(u.rank + 1) for u in hits)
            result[f"ndcg@{k}{suffix}"] = gain / len(group)
    for k in ks:
        distinct = {item for u in users for item in u.top[:k]}
        result[f"coverage@{k}"] = len(distinct) / num_items
    return result


def measure(
    num_items: int, ks: list[int], head: set[int], users: list[User], batch: int
) -> RankingMetrics:
    is_head = torch.zeros(num_items + 1, dtype=torch.bool)
    is_head[list(head)] = True
    is_cold = torch.zeros(num_items + 1, dtype=torch.bool)
    is_cold[list(cold_items(num_items, head))] = True
    metrics = RankingMetrics(ks, Popularity(is_head, is_cold))
    for start in range(0, len(users), batch):
        part = users[start : start + batch]
        metrics.update(
            torch.arange(start, start + len(part)),
            torch.tensor([u.rank for u in part]),
            torch.tensor([u.target for u in part]),
            torch.tensor([u.top for u in part]),
            torch.tensor([u.liked for u in part]),
        )
    return metrics


@settings(max_examples=60, deadline=None)
@given(populations(), st.integers(1, 5))
def test_equals_the_loop_over_users(
    population: tuple[int, list[int], set[int], list[User]], batch: int
) -> None:
    assert measure(*population, batch).result() == pytest.approx(loop(*population), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(populations(), st.integers(2, 4))
def test_two_reductions_merge_ranks(
    population: tuple[int, list[int], set[int], list[User]], world_size: int
) -> None:
    num_items, ks, head, users = population
    ranks = [measure(num_items, ks, head, users[r::world_size], 3) for r in range(world_size)]
    sums = torch.stack([r.sums() for r in ranks]).sum(0)
    covered = torch.stack([r.covered() for r in ranks]).amax(0)
    for rank in ranks:  # every rank reads the same result, also one without users
        assert rank.result(sums, covered) == pytest.approx(loop(*population), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(populations(), st.integers(1, 5))
def test_shares_of_groups_of_users_add_up_to_the_metrics(
    population: tuple[int, list[int], set[int], list[User]], batch: int
) -> None:
    metrics, expected = measure(*population, batch), loop(*population)
    shares = metrics.shares(metrics.sums())
    ranking = [name for name in expected if name.startswith(("hr", "ndcg", "mrr"))]
    assert {name: sum(shares[name]) for name in ranking} == pytest.approx(
        {name: expected[name] for name in ranking}, abs=1e-12
    )
    users, k = population[3], population[1][0]  # user i is in group i, as they are few
    hits = [float(user.rank <= k) / len(users) for user in users]
    assert shares[f"hr@{k}"][: len(users)] == pytest.approx(hits, abs=1e-12)


def test_reading_does_not_change_what_is_read() -> None:
    metrics = measure(4, [2], {1}, [User(1, 1, [1, 2])], 1)
    metrics.sums().zero_()
    metrics.covered().zero_()
    assert metrics.result()["hr@2"] == 1
    assert metrics.result()["coverage@2"] == 0.5


def test_padding_of_short_recommendations_covers_nothing() -> None:
    metrics = measure(4, [1, 3], set(), [User(2, 4, [3, 0, 0])], 1)
    result = metrics.result()
    assert result["coverage@1"] == result["coverage@3"] == 0.25
    assert "hr@1/head" not in result and result["users/head"] == 0


def test_empty_batches_are_welcome_and_no_user_is_a_sentence() -> None:
    metrics = RankingMetrics([10], Popularity.of(torch.ones(4), 0.5))
    metrics.update(
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, 10, dtype=torch.int64),
    )
    with pytest.raises(ValueError, match=r"no user was measured.*data\.split"):
        metrics.result()


def test_head_is_the_most_popular_share_with_stable_ties() -> None:
    counts = torch.tensor([5, 9, 5, 5, 0, 1, 2, 0, 0, 0])
    assert head_mask(counts, 0.3).nonzero().flatten().tolist() == [1, 2, 3]
    assert not head_mask(counts, 0.3)[0]
    assert head_mask(counts, 0.07).sum() == 1  # a head is never empty


def test_cold_is_what_no_training_event_has() -> None:
    popularity = Popularity.of(torch.tensor([3, 0, 1, 0]), 0.25)
    assert popularity.is_cold.tolist() == [False, False, True, False, True]
    assert popularity.is_head.tolist() == [False, True, False, False, False]
