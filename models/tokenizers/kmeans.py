"""Lloyd's k-means as maps over shards and sums of what they return.

The same centroids, bit for bit, however the rows are split: the starting points come from a keyed
sample, a row's distances do not depend on its neighbours (nearest.py), and sums do not depend on
their order (exact_sums.py).

Shape legend: n rows of a shard, W width, K codes, C rows of a block, m candidates.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from models.tokenizers.exact_sums import grid_step, on_grid, sum_by_code
from models.tokenizers.nearest import BLOCK_ROWS, nearest, padded
from models.tokenizers.shards import Extent, Shard, Shards, keyed_sample, measure

Progress = Callable[[int, int, float], None]
"""progress(step, total steps, loss), called after each step."""

MOST_RESEEDED = 64
"""Empty codes that one iteration may re-seed: bounds what a shard sends."""


def no_progress(step: int, total: int, loss: float) -> None:
    """A progress callback that does nothing."""


@dataclass(frozen=True)
class Grid:
    """Steps on which sums of coordinates, squared distances and shares are exact."""

    coordinate: float
    distance: float
    share: float

    @classmethod
    def of(cls, extent: Extent) -> "Grid":
        """Grid for all rows of `extent`."""
        farthest = 4 * extent.width * extent.largest**2
        sizes = ((extent.largest, extent.rows), (farthest, extent.rows), (1.0, extent.rows))
        return cls(*(grid_step(largest, terms) for largest, terms in sizes))


@dataclass(frozen=True)
class Partial:
    """What a pass over some rows adds up to; sums of parts are the pass over all of them."""

    sums: Tensor
    """[K, W] float64 of rows per code."""
    counts: Tensor
    """[K] int64."""
    inertia: float
    """Sum of squared distances to the assigned centroids."""
    changed: int
    """Rows whose code is another than before."""

    def __add__(self, other: "Partial") -> "Partial":
        return Partial(
            self.sums + other.sums,
            self.counts + other.counts,
            self.inertia + other.inertia,
            self.changed + other.changed,
        )


@dataclass(frozen=True)
class Clusters:
    """A fitted level. Each shard's `labels` are the codes of its rows."""

    centroids: Tensor
    """[K, W] float32."""
    inertia: float
    counts: Tensor
    """[K] int64."""
    prices: Tensor
    """[K] float32 added to half squared distances; zeros unless sizes were balanced."""


def assign_and_sum(rows: Tensor, labels: Tensor, centroids: Tensor, grid: Grid) -> Partial:
    """One Lloyd pass over `rows` [n, W]: writes the nearest codes into `labels` [n], adds up."""
    size = len(centroids)
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    distance = torch.zeros((), dtype=torch.float64, device=rows.device)
    changed = torch.zeros((), dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        codes = nearest(padded(block), centroids)[: len(block)]
        previous = labels[start : start + BLOCK_ROWS]
        changed += (codes != previous).sum()
        previous.copy_(codes)
        sums += sum_by_code(block, codes, size, grid.coordinate)
        distance += _grid_sum(squared_distances(block, centroids, codes), grid.distance)
    counts = torch.bincount(labels, minlength=size)
    return Partial(sums.cpu(), counts.cpu(), float(distance), int(changed))


def squared_distances(rows: Tensor, centroids: Tensor, codes: Tensor) -> Tensor:
    """‖x − c‖² of each row to the centroid of its code: float32 [n]."""
    return (rows - centroids[codes]).square().sum(1)


def _grid_sum(values: Tensor, step: float) -> Tensor:
    return on_grid(values, step).sum()


def lloyd_pass(shard: Shard, centroids: Tensor, grid: Grid) -> Partial:
    """Task: `assign_and_sum` of a shard's `work`, its `labels` updated."""
    return assign_and_sum(shard.work, shard.labels, centroids.to(shard.work.device), grid)


def farthest_rows(shard: Shard, centroids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Task: the `count` rows farthest from their centroids: distances [m], ids [m], rows [m, W]."""
    distances = squared_distances(shard.work, centroids.to(shard.work.device), shard.labels)
    order = distances.argsort(descending=True, stable=True)[:count]
    found = (distances[order], order + shard.first_row, shard.work[order])
    return found[0].cpu(), found[1].cpu(), found[2].cpu()


def total(parts: Iterable[Partial]) -> Partial:
    """The sum of all parts."""
    return reduce(Partial.__add__, parts)


def update(centroids: Tensor, part: Partial) -> Tensor:
    """Means of the codes' rows: float32 [K, W]; a code without rows keeps its centroid."""
    means = (part.sums / part.counts.clamp(min=1)[:, None]).float()
    return torch.where(part.counts[:, None] > 0, means, centroids)


def reseed(shards: Shards, centroids: Tensor, means: Tensor, counts: Tensor) -> Tensor:
    """`means` with codes that have no rows moved to the rows farthest from their centroids.

    Different rows for different codes; at most `MOST_RESEEDED` codes at once.
    """
    empty = (counts == 0).nonzero().view(-1)[:MOST_RESEEDED]
    if not len(empty):
        return means
    parts = shards.map(farthest_rows, centroids, MOST_RESEEDED)
    distances, ids, rows = (torch.cat([part[i] for part in parts]) for i in range(3))
    order = ids.argsort(stable=True)
    order = order[distances[order].argsort(descending=True, stable=True)][:MOST_RESEEDED]
    rows = rows[order]
    repeats = (rows[:, None] == rows[None]).all(-1).tril(-1).any(1)
    chosen = rows[~repeats][: len(empty)]
    means = means.clone()
    means[empty[: len(chosen)]] = chosen
    return means


def kmeans_plus_plus(sample: Tensor, size: int, seed: int) -> Tensor:
    """Starting centroids [K, W] from rows of `sample` [m, W] (CPU), by D² sampling.

    Where the sample has fewer distinct rows than `size`, some centroids are repeated.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(size, generator=generator, dtype=torch.float64)
    lengths = sample.square().sum(1)
    chosen = [min(int(draws[0] * len(sample)), len(sample) - 1)]
    left = torch.full((len(sample),), float("inf"))
    for draw in draws[1:]:
        last = chosen[-1]
        distances = torch.addmv(lengths, sample, sample[last], alpha=-2).add_(lengths[last])
        left = torch.minimum(left, distances.clamp_(min=0))
        left[last] = 0  # exactly, whatever the subtraction left over
        mass = left.double().cumsum(0)
        place = int(torch.searchsorted(mass, draw * mass[-1], right=True))
        chosen.append(min(place, len(sample) - 1))
    return sample[torch.tensor(chosen)]


def fit_kmeans(
    shards: Shards,
    size: int,
    *,
    iterations: int,
    restarts: int = 1,
    rows_per_code: int = 32,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Clusters:
    """k-means of all shards' `work` with `size` codes; the best of `restarts` runs.

    `progress` is called with the mean squared distance after each iteration.

    Raises:
        ValueError: fewer rows than codes, or numbers that are not finite.
    """
    extent = measure(shards)
    check_enough_rows(extent, size)
    best: Clusters | None = None
    for restart in range(restarts):
        run_seed = seed + restart * 1_000_003
        sample = keyed_sample(shards, max(size, 64) * rows_per_code, extent.rows, run_seed)
        start = kmeans_plus_plus(sample, size, run_seed)
        first = restart * iterations

        def report(iteration: int, loss: float, first: int = first) -> None:
            progress(first + iteration, restarts * iterations, loss)

        part, centroids = _lloyd(shards, start, Grid.of(extent), iterations, report)
        if best is None or part.inertia < best.inertia:
            best = Clusters(centroids, part.inertia, part.counts, torch.zeros(size))
    assert best is not None
    if restarts > 1:  # labels are still those of the last run
        shards.map(lloyd_pass, best.centroids, Grid.of(extent))
    return best


def check_enough_rows(extent: Extent, size: int) -> None:
    """Raises ValueError where a level has more codes than the catalogue has rows."""
    if extent.rows < size:
        raise ValueError(
            f"codebook_size={size} is more than the {extent.rows} items to tokenize; choose fewer"
        )


def _lloyd(
    shards: Shards,
    centroids: Tensor,
    grid: Grid,
    iterations: int,
    report: Callable[[int, float], None],
) -> tuple[Partial, Tensor]:
    for iteration in range(iterations):
        part = total(shards.map(lloyd_pass, centroids, grid))
        report(iteration + 1, part.inertia / int(part.counts.sum()))
        if part.changed == 0 and bool((part.counts > 0).all()):
            break
        centroids = reseed(shards, centroids, update(centroids, part), part.counts)
    return total(shards.map(lloyd_pass, centroids, grid)), centroids
