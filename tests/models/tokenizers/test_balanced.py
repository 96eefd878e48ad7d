"""Balanced codes: exact sizes always, the same over shards, and near the least cost."""

from itertools import combinations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.tokenizers.balanced import (
    capacities,
    choose_first,
    fit_balanced,
    hold_keys,
    raise_prices,
    settle,
    smooth_demand,
)
from models.tokenizers.kmeans import Grid
from models.tokenizers.nearest import costs
from models.tokenizers.shards import LocalShards, measure
from tests.models.tokenizers.clouds import clouds


def labels_of(shards: LocalShards) -> Tensor:
    return torch.cat([shard.labels for shard in shards.shards])


@given(
    rows=st.integers(10, 300),
    size=st.integers(2, 10),
    width=st.integers(1, 9),
    shards=st.integers(2, 5),
    twins=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12)
def test_sizes_are_exact_and_shards_agree(
    rows: int, size: int, width: int, shards: int, twins: bool, seed: int
) -> None:
    data = clouds(rows, width, 5, seed)
    if twins:
        data[: rows * 2 // 3] = data[0]
    one, many = LocalShards.of(data), LocalShards.of(data, shards)
    fits = [
        fit_balanced(where, size, iterations=3, price_rounds=3, rows_per_code=4, seed=seed)
        for where in (one, many)
    ]
    labels = labels_of(one)
    sizes = torch.bincount(labels, minlength=size)
    assert torch.equal(sizes, fits[0].counts)
    assert set(sizes.tolist()) <= {rows // size, -(-rows // size)}
    assert torch.equal(labels, labels_of(many))
    assert torch.equal(fits[0].centroids, fits[1].centroids)
    assert torch.equal(fits[0].prices, fits[1].prices)


def acceptance_loop(priced: Tensor, places: Tensor) -> list[int]:
    """Deferred acceptance, one row at a time: a full code turns away who loses least by leaving."""
    rows, size = priced.shape
    keys = hold_keys(priced, torch.arange(rows)).tolist()
    turned_away: list[set[int]] = [set() for _ in range(rows)]
    held: list[list[int]] = [[] for _ in range(size)]
    waiting = list(range(rows))
    while waiting:
        row = waiting.pop()
        open_codes = [k for k in range(size) if k not in turned_away[row]]
        code = min(open_codes, key=lambda k: (float(priced[row, k]), k))
        held[code].append(row)
        if len(held[code]) > int(places[code]):
            weakest = min(held[code], key=lambda r: keys[r][code])
            held[code].remove(weakest)
            turned_away[weakest].add(code)
            waiting.append(weakest)
    return [next(k for k in range(size) if row in held[k]) for row in range(rows)]


@given(rows=st.integers(5, 80), size=st.integers(2, 5), seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_settling_equals_one_row_at_a_time(rows: int, size: int, seed: int) -> None:
    data, centroids = clouds(rows, 4, 3, seed), clouds(size, 4, 3, seed + 1)
    prices = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    shards = LocalShards.of(data, 2)
    places = capacities(rows, torch.stack(shards.map(choose_first, centroids, prices)).sum(0))
    settle(shards, centroids, prices, measure(shards))
    assert labels_of(shards).tolist() == acceptance_loop(costs(data, centroids, prices), places)


def test_keys_order_rows_by_what_they_lose() -> None:
    priced = torch.tensor([[1.0, 3.0, 2.0], [1.0, 1.0, 5.0], [0.0, 4.0, 9.0]])
    keys = hold_keys(priced, torch.tensor([7, 8, 9]))
    loss = torch.tensor([[1.0, -2.0, -1.0], [0.0, 0.0, -4.0], [4.0, -4.0, -9.0]])
    for column in range(3):
        assert keys[:, column].argsort().tolist() == loss[:, column].argsort().tolist()
    assert (hold_keys(priced[:1].expand(5, 3), torch.arange(5)).diff(dim=0) > 0).all()


def test_two_codes_get_the_least_cost() -> None:
    data, centroids = clouds(9, 3, 2, seed=1), clouds(2, 3, 2, seed=2)
    cost = (data[:, None] - centroids[None]).square().sum(2)
    shards = LocalShards.of(data)
    settle(shards, centroids, torch.zeros(2), measure(shards))
    labels = labels_of(shards)
    found = float(cost.gather(1, labels[:, None]).sum())
    first = int((labels == 0).sum())
    least = min(
        float(sum(cost[i, 0] if i in chosen else cost[i, 1] for i in range(9)))
        for chosen in combinations(range(9), first)
    )
    assert abs(found - least) < 1e-4


def greedy(data: Tensor, centroids: Tensor) -> float:
    """OneRec's assignment: each centroid in turn takes its nearest unassigned rows."""
    far = torch.cdist(data, centroids).square()
    places, spent = capacities(len(data), torch.ones(len(centroids))), 0.0
    for code, place in enumerate(places.tolist()):
        nearest = far[:, code].argsort()[:place]
        spent += float(far[nearest, code].sum())
        far[nearest] = float("inf")
    return spent


def test_cheaper_than_filling_codes_in_turn() -> None:
    data = clouds(960, 8, 12, seed=3)
    shards = LocalShards.of(data)
    fitted = fit_balanced(shards, 16, iterations=10, price_rounds=5)
    assert fitted.inertia < 0.9 * greedy(data, fitted.centroids)


def test_prices_even_out_the_demand() -> None:
    data, centroids = clouds(500, 6, 9, seed=4), clouds(8, 6, 9, seed=5)
    shards, prices = LocalShards.of(data, 3), torch.zeros(8)
    grid, spread = Grid.of(measure(shards)), []
    for _ in range(60):
        demand = torch.stack(shards.map(smooth_demand, centroids, prices, 0.5, grid)).sum(0)
        assert abs(float(demand.sum()) - 500) < 1e-3
        spread.append(float(demand.max() - demand.min()))
        prices = raise_prices(prices, demand, 500 / 8, 0.5)
    expected = torch.softmax(-costs(data, centroids, prices).double() / 0.5, 1).sum(0)
    assert spread[0] > 50 and spread[-1] < 1
    assert (expected - 500 / 8).abs().max() < 1


def test_capacities_sum_to_the_rows() -> None:
    assert capacities(10, torch.tensor([1, 5, 4])).tolist() == [3, 4, 3]
    assert capacities(9, torch.tensor([1, 5, 4])).tolist() == [3, 3, 3]
    assert capacities(2, torch.tensor([0, 1, 1])).tolist() == [0, 1, 1]
