"""k-means against loops, and the same bits however the rows are split."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.tokenizers import ResidualKMeansConfig
from models.tokenizers.exact_sums import grid_step, on_grid, sum_by_code
from models.tokenizers.fit import fit_quantizer
from models.tokenizers.kmeans import (
    Grid,
    assign_and_sum,
    fit_kmeans,
    kmeans_plus_plus,
    lloyd_pass,
    reseed,
    total,
    update,
)
from models.tokenizers.nearest import by_blocks, costs, nearest
from models.tokenizers.shards import LocalShards, gather_rows, keyed_sample, measure
from tests.models.tokenizers.clouds import clouds


def test_a_step_equals_the_loop() -> None:
    rows, centroids = clouds(150, 5, 6, seed=1), clouds(4, 5, 4, seed=2)
    labels = torch.full((150,), -1)
    extent = measure(LocalShards.of(rows))
    part = assign_and_sum(rows, labels, centroids, Grid.of(extent))
    sums, counts, inertia = torch.zeros(4, 5, dtype=torch.float64), [0] * 4, 0.0
    for i in range(150):
        far = [float((rows[i].double() - c.double()).square().sum()) for c in centroids]
        best = min(range(4), key=far.__getitem__)
        assert int(labels[i]) == best
        sums[best] += rows[i].double()
        counts[best] += 1
        inertia += far[best]
    assert part.counts.tolist() == counts and part.changed == 150
    torch.testing.assert_close(part.sums, sums)
    assert part.inertia == pytest.approx(inertia, rel=1e-5)
    moved = update(centroids, part)
    for k in range(4):
        expected = sums[k] / counts[k] if counts[k] else centroids[k].double()
        torch.testing.assert_close(moved[k].double(), expected, rtol=1e-6, atol=1e-6)


@given(
    rows=st.integers(20, 1500),
    width=st.integers(1, 20),
    size=st.integers(2, 20),
    shards=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15)
def test_shards_give_the_bits_of_one(
    rows: int, width: int, size: int, shards: int, seed: int
) -> None:
    data = clouds(rows, width, 7, seed)
    data[: rows // 4] = data[rows // 2 : rows // 2 + rows // 4]  # twins
    one, many = LocalShards.of(data), LocalShards.of(data, shards)
    fitted = [
        fit_kmeans(where, size, iterations=6, rows_per_code=4, restarts=2, seed=seed)
        for where in (one, many)
    ]
    assert torch.equal(fitted[0].centroids, fitted[1].centroids)
    assert fitted[0].inertia == fitted[1].inertia
    assert torch.equal(fitted[0].counts, fitted[1].counts)
    labels = torch.cat([shard.labels for shard in many.shards])
    assert torch.equal(one.shards[0].labels, labels)
    assert torch.equal(by_blocks(lambda block: nearest(block, fitted[0].centroids), data), labels)


def test_the_error_falls_and_restarts_do_not_hurt() -> None:
    data = clouds(800, 8, 20, seed=3)
    losses: list[float] = []
    one = fit_kmeans(
        LocalShards.of(data), 16, iterations=20, progress=lambda s, n, loss: losses.append(loss)
    )
    assert len(losses) > 2
    assert all(after <= before + 1e-9 for before, after in pairwise(losses))
    assert fit_kmeans(LocalShards.of(data), 16, iterations=20, restarts=4).inertia <= one.inertia


def test_empty_codes_move_to_the_farthest_rows() -> None:
    data = torch.cat([clouds(50, 4, 1, seed=4, noise=0.01), torch.full((3, 4), 9.0)])
    data[-1] = -7.0
    shards = LocalShards.of(data, 2)
    centroids = torch.stack([data[0], torch.full((4,), 100.0), torch.full((4,), 200.0)])
    part = total(shards.map(lloyd_pass, centroids, Grid.of(measure(shards))))
    assert part.counts.tolist() == [53, 0, 0]
    moved = reseed(shards, centroids, update(centroids, part), part.counts)
    distances = (data - data[0]).square().sum(1)
    assert distances[50] != distances[52]
    # The two rows of nines are one place: the second empty code gets the other far row.
    assert {tuple(row) for row in moved[1:].tolist()} == {tuple([9.0] * 4), tuple([-7.0] * 4)}
    settled = fit_kmeans(shards, 3, iterations=10)
    assert settled.counts.sort().values.tolist() == [1, 2, 50]


def test_starting_points_are_rows_spread_out() -> None:
    data = clouds(300, 3, 4, seed=5, noise=0.01)
    start = kmeans_plus_plus(data, 4, seed=0)
    assert all((data == row).all(1).any() for row in start)
    assert torch.pdist(start).min() > 0.3  # one in each cloud
    assert torch.equal(start, kmeans_plus_plus(data, 4, seed=0))
    twins = torch.ones(5, 3)
    assert kmeans_plus_plus(twins, 4, seed=0).shape == (4, 3)


def test_the_sample_depends_on_row_ids_alone() -> None:
    data = torch.arange(5000.0)[:, None]
    one = keyed_sample(LocalShards.of(data), 500, 5000, seed=3)
    assert torch.equal(one, keyed_sample(LocalShards.of(data, 7), 500, 5000, seed=3))
    assert 400 < len(one) < 600 and len(one.unique()) == len(one)
    assert abs(float(one.mean()) - 2500) < 5 * 1443 / 500**0.5
    assert not torch.equal(one, keyed_sample(LocalShards.of(data), 500, 5000, seed=4))
    assert len(keyed_sample(LocalShards.of(data), 5000, 5000, seed=3)) == 5000
    ids = torch.tensor([4999, 3, 3, 2500])
    assert gather_rows(LocalShards.of(data, 3), ids)[:, 0].tolist() == ids.tolist()


@given(seed=st.integers(0, 1000), scale=st.floats(1e-6, 1e6))
@settings(max_examples=20)
def test_grid_sums_do_not_depend_on_order(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(999, 3, generator=generator) * scale
    codes = torch.randint(0, 4, (999,), generator=generator)
    step = grid_step(float(values.abs().max()), 999)
    order = torch.randperm(999, generator=generator)
    one = sum_by_code(values, codes, 4, step)
    assert torch.equal(one, sum_by_code(values[order], codes[order], 4, step))
    assert (on_grid(values, step) - values.double()).abs().max() <= step / 2 <= scale * 1e-9


def test_costs_order_codes_as_distances_do() -> None:
    rows, book = clouds(40, 7, 3, seed=6), clouds(9, 7, 3, seed=7)
    prices = torch.rand(9, generator=torch.Generator().manual_seed(0))
    distances = torch.cdist(rows, book).square() / 2

    def to_first(values: torch.Tensor) -> torch.Tensor:
        return values - values[:, :1]  # a constant of the row is free

    for extra in (torch.zeros(9), prices):
        found, expected = costs(rows, book, extra), distances + extra
        torch.testing.assert_close(to_first(found), to_first(expected), rtol=1e-4, atol=1e-4)


def test_what_lies_far_from_the_origin_finds_its_nearest_code() -> None:
    rows, book = clouds(500, 8, 4, seed=6) + 1e4, clouds(20, 8, 4, seed=7) + 1e4
    distances = torch.cdist(
        rows.double(), book.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert float((nearest(rows, book) == distances.argmin(1)).float().mean()) > 0.99


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("far", [1.0, 1e5, 1e6])
def test_one_far_code_spoils_no_others_choice(far: float, offset: float) -> None:
    rows, book = clouds(500, 8, 4, seed=6) + offset, clouds(40, 8, 4, seed=7) + offset
    book[0] *= far
    distances = torch.cdist(
        rows.double(), book.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert float((nearest(rows, book) == distances.argmin(1)).float().mean()) > 0.99


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_numbers_whose_squares_are_lost_are_refused(scale: float) -> None:
    data = clouds(50, 4, 3, seed=1) * scale
    config = ResidualKMeansConfig(codebook_size=4, iterations=2)
    with pytest.raises(ValueError, match="set normalize of tokenizer.embeddings to true"):
        fit_quantizer(LocalShards.of(data), 4, config)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="codebook_size=8 is more than the 5 items"):
        fit_kmeans(LocalShards.of(torch.randn(5, 2)), 8, iterations=1)
    for wrong in (float("nan"), float("inf")):
        data = torch.randn(20, 2)
        data[7, 1] = wrong
        with pytest.raises(ValueError, match="not finite"):
            fit_kmeans(LocalShards.of(data, 3), 2, iterations=1)
    with pytest.raises(ValueError, match="float32 matrix"):
        LocalShards.of(torch.randn(5, 2).double())
    with pytest.raises(ValueError, match="0 rows"):
        measure(LocalShards.of(torch.empty(0, 2)))
