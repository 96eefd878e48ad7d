"""What codes are worth: use, evenness, reconstruction, collisions, and kept neighbourhoods.

Counts add up over shards, so that a catalogue of any size is measured from sums.

Shape legend: n rows, q queried rows, m neighbours, D width, L code levels, K codes of a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.ops.hashing import GOLDEN_64, as_signed, mix64
from models.tokenizers.nearest import BLOCK_ROWS, costs

MOST_KEY = 1 << 62
QUERIES = 2000
"""Most items whose neighbours are looked for."""


@dataclass(frozen=True)
class LevelUse:
    """How one level's codes are used."""

    utilisation: float
    """Share of codes with at least one item."""
    entropy: float
    """Bits."""
    normalized_entropy: float
    """Entropy over log2 K: 1 where all codes are used alike."""
    gini: float
    """Inequality of sizes: 0 where all are alike, (K − 1) / K where one code has everything."""
    largest: int
    smallest: int


@dataclass(frozen=True)
class Collisions:
    """Items that share their whole semantic id with others."""

    unique_share: float
    """Distinct ids over items (1 where every item has its own)."""
    alone_share: float
    """Share of items whose id no other item has."""
    largest: int
    """Most items of one id."""


@dataclass(frozen=True)
class NeighbourAgreement:
    """Whether near items have like codes; beside it the same for items taken at random."""

    first_code: float
    """Share of an item's nearest neighbours that have its first code."""
    prefix_length: float
    """Mean number of leading codes shared with a nearest neighbour (ordered levels)."""
    equal_codes: float
    """Mean number of codes shared with a nearest neighbour at the same level."""
    random_first_code: float
    random_equal_codes: float


def code_counts(codes: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Items of each code: for each level int64 [K], from `codes` int64 [n, L]."""
    levels = zip(codes.unbind(1), sizes, strict=True)
    return [torch.bincount(level, minlength=size) for level, size in levels]


def level_use(counts: Tensor) -> LevelUse:
    """Use of a level from the items of each code, int64 [K].

    Raises:
        ValueError: no items at all.
    """
    items, size = int(counts.sum()), len(counts)
    if not items:
        raise ValueError("the use of codes is not defined for an empty catalogue")
    share = counts.double() / items
    entropy = -float(torch.special.xlogy(share, share).sum()) / 0.6931471805599453
    even = float(torch.tensor(size, dtype=torch.float64).log2())
    rank = torch.arange(1, size + 1, dtype=torch.float64)
    gini = float((2 * rank - size - 1) @ share.sort().values.cpu()) / size
    return LevelUse(
        utilisation=float((counts > 0).double().mean()),
        entropy=entropy,
        normalized_entropy=entropy / even if size > 1 else 1.0,
        gini=gini,
        largest=int(counts.max()),
        smallest=int(counts.min()),
    )


def id_numbers(codes: Tensor, sizes: Sequence[int]) -> Tensor:
    """One int64 [n] per row, equal exactly where all codes [n, L] are.

    Numbers compare within one call only; ids with more values than int64 are renumbered on the way.
    """
    number, values = torch.zeros(len(codes), dtype=torch.int64, device=codes.device), 1
    for level, size in zip(codes.unbind(1), sizes, strict=True):
        if values * size > MOST_KEY:
            number, values = torch.unique(number, return_inverse=True)[1], len(codes)
        number, values = number * size + level, values * size
    return number


def collisions(codes: Tensor, sizes: Sequence[int]) -> Collisions:
    """Collisions of whole ids, from `codes` int64 [n, L], n > 0."""
    counts = torch.unique(id_numbers(codes, sizes), return_counts=True)[1]
    alone = int((counts == 1).sum())
    return Collisions(len(counts) / len(codes), alone / len(codes), int(counts.max()))


def squared_errors(rows: Tensor, rebuilt: Tensor) -> tuple[float, float, Tensor, int]:
    """Sums that `relative_error` needs, of some rows [n, D] and their reconstruction.

    Returns:
        Σ‖x − x̂‖², Σ‖x‖², Σ x [D] float64, n; those of several shards add up.
    """
    error = float((rows - rebuilt).double().square().sum())
    return error, float(rows.double().square().sum()), rows.double().sum(0).cpu(), len(rows)


def relative_error(parts: Sequence[tuple[float, float, Tensor, int]]) -> float:
    """Mean squared error over the variance of the rows: 0 is perfect, 1 is the mean of all rows."""
    error, square = sum(part[0] for part in parts), sum(part[1] for part in parts)
    rows = sum(part[3] for part in parts)
    mean = torch.stack([part[2] for part in parts]).sum(0) / rows
    variance = square - rows * float(mean.square().sum())
    return error / variance if variance > 0 else float(error > 0)


def sampled_rows(rows: int, count: int, seed: int) -> Tensor:
    """Places of at most `count` of `rows` rows, chosen by a hash of (seed, place): sorted int64."""
    places = torch.arange(rows)
    hashed = mix64(mix64(places) + as_signed((seed + 1) * GOLDEN_64))
    return hashed.argsort(stable=True)[:count].sort().values


def nearest_rows(rows: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` rows [n, D] nearest to each query [q, D].

    Returns:
        half squared distances up to a constant of the query [q, ≤ count], and places [q, ≤ count],
        nearest first. Those of several shards merge by `merge_nearest`.
    """
    found: tuple[Tensor, Tensor] | None = None
    middle = queries.median(0).values  # one for all blocks and shards, whose costs are compared
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        far = costs(queries, block, middle=middle)
        places = torch.arange(start, start + len(block), device=rows.device).expand_as(far)
        found = (far, places) if found is None else _joined((found, (far, places)))
        found = _closest(*found, count)
    assert found is not None, "there are no rows to look among"
    return found


def merge_nearest(found: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Places [q, count] of the nearest rows among those found in several shards."""
    return _closest(*_joined(found), count)[1]


def _joined(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([far for far, _ in found], 1), torch.cat([places for _, places in found], 1)


def _closest(far: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    best = far.topk(min(count, far.shape[1]), dim=1, largest=False)
    return best.values, places.gather(1, best.indices)


def neighbour_agreement(
    rows: Tensor, codes: Tensor, *, neighbours: int = 10, queries: int = QUERIES, seed: int = 0
) -> NeighbourAgreement:
    """Compare codes of sampled items with those of their nearest neighbours in embedding space.

    Args:
        rows: [n, D] float32 embeddings, n ≥ 2.
        codes: [n, L] int64.
        neighbours: how many, without the item itself.
        queries: sampled items (all where there are fewer).
        seed: of the sample.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError("neighbours need at least two items")
    asked = sampled_rows(len(rows), queries, seed).to(rows.device)
    found = [nearest_rows(rows, rows[part], neighbours + 1)[1] for part in asked.split(BLOCK_ROWS)]
    places = torch.cat(found)
    others = places != asked[:, None]
    # An item with more than `neighbours` twins may not find itself; then the farthest is dropped.
    others[:, -1] &= ~others.all(1)
    equal = codes[places] == codes[asked][:, None]
    prefix = equal.long().cumprod(2)

    def mean(values: Tensor) -> float:
        return float(values.double()[others].mean())

    by_chance = [float((c.double() / len(codes)).square().sum()) for c in _level_counts(codes)]
    return NeighbourAgreement(
        first_code=mean(equal[:, :, 0]),
        prefix_length=mean(prefix.sum(2)),
        equal_codes=mean(equal.sum(2)),
        random_first_code=by_chance[0],
        random_equal_codes=sum(by_chance),
    )


def _level_counts(codes: Tensor) -> list[Tensor]:
    return [torch.bincount(level) for level in codes.unbind(1)]
