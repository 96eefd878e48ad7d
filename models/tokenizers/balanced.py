"""Codes with equally many items: ⌊n/K⌋ or ⌈n/K⌉ each, at a near-least sum of distances.

OneRec (arXiv 2502.18965, section 3.1) fills clusters one after the other, each with its nearest
unassigned items, so that the last ones take what is left. The sizes are the same here, but codes
have *prices* that steer items away from crowded ones: the dual of the transport problem, smoothed
by a temperature (Sinkhorn on the K prices), then a deferred acceptance that makes sizes exact.
The state of all workers together is O(K); each worker keeps one label and one key of a row.

Shape legend: n rows of a shard, N rows of all, W width, K codes, C rows of a block, m candidates.
"""

import torch
from torch import Tensor

from models.tokenizers.exact_sums import on_grid, sum_by_code
from models.tokenizers.kmeans import (
    Clusters,
    Grid,
    Partial,
    Progress,
    check_enough_rows,
    kmeans_plus_plus,
    lloyd_pass,
    no_progress,
    squared_distances,
    total,
    update,
)
from models.tokenizers.nearest import BLOCK_ROWS, costs, padded
from models.tokenizers.shards import Extent, Shard, Shards, keyed_sample, measure

FIRST_TEMPERATURE = 0.05
LAST_TEMPERATURE = 0.01
"""Of prices, in units of the mean squared distance of a row to its centroid."""
MOST_ROWS = 1 << 32
LOWEST_KEY = -(1 << 63)
MOST_EVICTED = 1 << 20
"""Rows of all codes that one round may move: bounds what a shard sends."""


def capacities(rows: int, demand: Tensor) -> Tensor:
    """Exact sizes [K] int64 that sum to `rows`; the odd rows go to the most demanded codes [K]."""
    size = len(demand)
    result = torch.full((size,), rows // size)
    result[demand.argsort(descending=True, stable=True)[: rows % size]] += 1
    return result


def fit_balanced(
    shards: Shards,
    size: int,
    *,
    iterations: int,
    price_rounds: int,
    rows_per_code: int = 32,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Clusters:
    """Balanced k-means of all shards' `work` with `size` codes.

    An iteration moves prices by one pass at a falling temperature, makes sizes exact, and moves
    centroids to the means of what they got. (Centroids of unequal sizes would run away from the
    prices.) The last one moves prices by `price_rounds` passes, so that they fit its centroids.

    Raises:
        ValueError: fewer rows than codes, or numbers that are not finite.
    """
    extent = measure(shards)
    check_enough_rows(extent, size)
    grid, steps = Grid.of(extent), iterations + 1
    sample = keyed_sample(shards, max(size, 64) * rows_per_code, extent.rows, seed)
    centroids, prices = kmeans_plus_plus(sample, size, seed), torch.zeros(size)
    part = total(shards.map(lloyd_pass, centroids, grid))
    scale = part.inertia / extent.rows or 1.0
    for step in range(steps):
        fall = (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** (step / iterations)
        temperature = scale * FIRST_TEMPERATURE * fall
        for _ in range(1 if step < iterations else price_rounds):
            demand = torch.stack(shards.map(smooth_demand, centroids, prices, temperature, grid))
            prices = raise_prices(prices, demand.sum(0), extent.rows / size, temperature)
        settle(shards, centroids, prices, extent)
        part = total(shards.map(sum_labels, centroids, grid))
        centroids = update(centroids, part)
        progress(step + 1, steps, part.inertia / extent.rows)
    part = total(shards.map(sum_labels, centroids, grid))
    return Clusters(centroids, part.inertia, part.counts, prices)


def raise_prices(prices: Tensor, demand: Tensor, capacity: float, temperature: float) -> Tensor:
    """Sinkhorn's update of the K potentials: float32 [K] with mean zero."""
    raised = prices.double() + temperature * (demand.clamp(min=1e-9) / capacity).log()
    return (raised - raised.mean()).float()


def smooth_demand(
    shard: Shard, centroids: Tensor, prices: Tensor, temperature: float, grid: Grid
) -> Tensor:
    """Task: Σ_rows softmax_k(−cost / temperature), float64 [K]."""
    rows = shard.work
    centroids, prices = centroids.to(rows.device), prices.to(rows.device)
    demand = torch.zeros(len(prices), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        priced = costs(padded(block), centroids, prices)[: len(block)]
        demand += on_grid(torch.softmax(priced / -temperature, dim=1), grid.share).sum(0)
    return demand.cpu()


def sum_labels(shard: Shard, centroids: Tensor, grid: Grid) -> Partial:
    """Task: sums, counts and squared distances of the rows under their present `labels`."""
    rows, labels = shard.work, shard.labels
    centroids = centroids.to(rows.device)
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    distance = torch.zeros((), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), BLOCK_ROWS):
        block, codes = rows[start : start + BLOCK_ROWS], labels[start : start + BLOCK_ROWS]
        sums += sum_by_code(block, codes, len(centroids), grid.coordinate)
        distance += on_grid(squared_distances(block, centroids, codes), grid.distance).sum()
    counts = torch.bincount(labels, minlength=len(centroids))
    return Partial(sums.cpu(), counts.cpu(), float(distance), 0)


def settle(shards: Shards, centroids: Tensor, prices: Tensor, extent: Extent) -> int:
    """Make the sizes of `labels` exact by deferred acceptance; returns the number of rounds.

    Every row asks for its cheapest code. A code with too many rows turns away those that lose
    least by leaving (their next choice costs little more; ties by row id) and its *cutoff* rises
    above them; they ask for their cheapest code among those whose cutoff they clear. Cutoffs only
    rise and there are as many places as rows, so it ends with every code exactly full.

    Raises:
        ValueError: more than 2^32 rows, whose ids no longer fit beside a key.
    """
    if extent.rows >= MOST_ROWS:
        raise ValueError(f"balanced codes are made for fewer than 2^32 items, not {extent.rows}")
    size = len(prices)
    cutoffs = torch.full((size,), LOWEST_KEY)
    counts = torch.stack(shards.map(choose_first, centroids, prices)).sum(0)
    places = capacities(extent.rows, counts)
    most = max(MOST_EVICTED // size, 1)
    rounds = 0
    while bool((counts > places).any()):
        leaving = (counts - places).clamp(0, most)
        parts = shards.map(weakest_rows, leaving)
        codes, keys = (torch.cat([part[i] for part in parts]) for i in range(2))
        first, codes, keys = _lowest_per_code(codes, keys, leaving)
        last = first + leaving - 1
        over = leaving > 0
        cutoffs[over] = keys[last[over]] + 1
        counts = torch.stack(shards.map(choose_again, centroids, prices, cutoffs)).sum(0)
        rounds += 1
    assert torch.equal(counts, places)
    return rounds


def choose_first(shard: Shard, centroids: Tensor, prices: Tensor) -> Tensor:
    """Task: cheapest code and key of every row; returns counts [K]."""
    no_cutoffs = torch.full((len(prices),), LOWEST_KEY)
    every = torch.arange(len(shard.work), device=shard.work.device)
    return _choose(shard, every, centroids, prices, no_cutoffs)


def choose_again(shard: Shard, centroids: Tensor, prices: Tensor, cutoffs: Tensor) -> Tensor:
    """Task: rows below their code's cutoff take the cheapest code they clear; counts [K]."""
    below = (shard.keys < cutoffs.to(shard.keys.device)[shard.labels]).nonzero().view(-1)
    return _choose(shard, below, centroids, prices, cutoffs)


def _choose(
    shard: Shard, places: Tensor, centroids: Tensor, prices: Tensor, cutoffs: Tensor
) -> Tensor:
    device = shard.work.device
    centroids, prices, cutoffs = centroids.to(device), prices.to(device), cutoffs.to(device)
    for start in range(0, len(places), BLOCK_ROWS):
        rows = places[start : start + BLOCK_ROWS]
        priced = costs(padded(shard.work[rows]), centroids, prices)[: len(rows)]
        keys = hold_keys(priced, rows + shard.first_row)
        allowed = keys >= cutoffs
        assert bool(allowed.any(1).all()), "a row fits nowhere, though places equal rows"
        chosen = priced.masked_fill(~allowed, float("inf")).argmin(1)
        shard.labels[rows] = chosen
        shard.keys[rows] = keys.gather(1, chosen[:, None])[:, 0]
    return torch.bincount(shard.labels, minlength=len(prices)).cpu()


def hold_keys(priced: Tensor, row_ids: Tensor) -> Tensor:
    """How strongly each row holds each code: int64 [C, K], all different within a code.

    The order is that of what a row loses when it takes its best other code: min_{j≠k} cost_j −
    cost_k for `priced` [C, K] float32; equal losses are ordered by `row_ids` [C].
    """
    two = priced.topk(2, dim=1, largest=False)
    best_other = two.values[:, :1].repeat(1, priced.shape[1])
    best_other.scatter_(1, two.indices[:, :1], two.values[:, 1:])
    bits = (best_other - priced + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # order of floats as integers
    return (ordered << 32) | row_ids[:, None]


def weakest_rows(shard: Shard, leaving: Tensor) -> tuple[Tensor, Tensor]:
    """Task: of each code k the `leaving[k]` rows that hold it least: codes [m] and keys [m]."""
    leaving = leaving.to(shard.labels.device)
    asked = (leaving[shard.labels] > 0).nonzero().view(-1)
    _, codes, keys = _lowest_per_code(shard.labels[asked], shard.keys[asked], leaving)
    return codes.cpu(), keys.cpu()


def _lowest_per_code(codes: Tensor, keys: Tensor, most: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The `most[k]` lowest keys of each code: their start per code [K], codes [m], keys [m]."""
    order = keys.argsort(stable=True)
    order = order[codes[order].argsort(stable=True)]
    codes, keys = codes[order], keys[order]
    counts = torch.bincount(codes, minlength=len(most))
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(codes), device=codes.device) - starts[codes]
    kept = rank < most[codes]
    left = torch.minimum(counts, most)
    return left.cumsum(0) - left, codes[kept], keys[kept]
