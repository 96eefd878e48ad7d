"""Measures of codes against loops and by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.tokenizers.quality import (
    code_counts,
    collisions,
    id_numbers,
    level_use,
    merge_nearest,
    nearest_rows,
    neighbour_agreement,
    relative_error,
    sampled_rows,
    squared_errors,
)
from tests.models.tokenizers.clouds import clouds


def test_use_of_a_level_by_hand() -> None:
    use = level_use(torch.tensor([4, 0, 2, 2]))
    assert (use.utilisation, use.largest, use.smallest) == (0.75, 4, 0)
    assert use.entropy == pytest.approx(1.5) and use.normalized_entropy == pytest.approx(0.75)
    differences = sum(abs(a - b) for a in (4, 0, 2, 2) for b in (4, 0, 2, 2))
    assert use.gini == pytest.approx(differences / (2 * 4 * 8))
    even, single = level_use(torch.full((8,), 5)), level_use(torch.tensor([0, 0, 0, 9]))
    assert even.gini == pytest.approx(0) and even.normalized_entropy == pytest.approx(1)
    assert single.gini == pytest.approx(0.75) and single.entropy == 0
    with pytest.raises(ValueError, match="empty catalogue"):
        level_use(torch.zeros(3, dtype=torch.int64))


@given(
    rows=st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=1, max_size=30),
    size=st.sampled_from([2, 1 << 25, 1 << 40]),
)
def test_collisions_equal_the_loop(rows: list[tuple[int, ...]], size: int) -> None:
    codes = torch.tensor(rows) * (size - 1)
    found = collisions(codes, (size,) * 3)
    counts = [rows.count(row) for row in set(rows)]
    assert found.unique_share == len(counts) / len(rows)
    assert found.alone_share == counts.count(1) / len(rows)
    assert found.largest == max(counts)
    numbers = id_numbers(codes, (size,) * 3).tolist()
    for i in range(len(rows)):
        assert [n == numbers[i] for n in numbers] == [row == rows[i] for row in rows]


def test_counts_of_codes() -> None:
    counts = code_counts(torch.tensor([[0, 1], [0, 2], [1, 2]]), (2, 4))
    assert [level.tolist() for level in counts] == [[2, 1], [0, 1, 2, 0]]


def test_relative_error_adds_up_over_shards() -> None:
    rows, rebuilt = clouds(50, 4, 3, seed=1) + 5, clouds(50, 4, 3, seed=2) + 5
    expected = (rows - rebuilt).square().sum() / (rows - rows.mean(0)).square().sum()
    for cuts in ([50], [10, 40], [1, 0, 49]):
        pairs = zip(rows.split(cuts), rebuilt.split(cuts), strict=True)
        found = relative_error([squared_errors(*pair) for pair in pairs])
        assert found == pytest.approx(float(expected), rel=1e-5)
    mean = rows.mean(0).expand(50, 4)
    assert relative_error([squared_errors(rows, mean)]) == pytest.approx(1, rel=1e-5)
    assert relative_error([squared_errors(rows, rows)]) == 0


def test_agreement_equals_the_loop() -> None:
    rows = clouds(60, 5, 4, seed=3)
    codes = torch.randint(0, 3, (60, 3), generator=torch.Generator().manual_seed(0))
    found = neighbour_agreement(rows, codes, neighbours=4, queries=60)
    first = prefix = equal = 0
    for i in range(60):
        near = sorted(set(range(60)) - {i}, key=lambda j: float((rows[i] - rows[j]).norm()))
        for j in near[:4]:
            same = (codes[i] == codes[j]).tolist()
            first += same[0]
            equal += sum(same)
            prefix += next((n for n, match in enumerate(same) if not match), 3)
    assert found.first_code == pytest.approx(first / 240)
    assert found.prefix_length == pytest.approx(prefix / 240)
    assert found.equal_codes == pytest.approx(equal / 240)
    chance = [sum(((codes[:, c] == k).sum() / 60) ** 2 for k in range(3)) for c in range(3)]
    assert found.random_first_code == pytest.approx(float(chance[0]))
    assert found.random_equal_codes == pytest.approx(float(sum(chance)))


def test_twins_and_few_rows() -> None:
    twins, codes = torch.ones(40, 3), torch.zeros(40, 2, dtype=torch.int64)
    found = neighbour_agreement(twins, codes, neighbours=5)
    assert found.first_code == 1 and found.prefix_length == 2
    two = neighbour_agreement(torch.eye(2), torch.tensor([[0], [1]]), neighbours=5)
    assert two.first_code == 0 and math.isclose(two.random_first_code, 0.5)
    with pytest.raises(ValueError, match="two items"):
        neighbour_agreement(twins[:1], codes[:1])


def test_neighbours_merge_over_shards() -> None:
    rows = clouds(3000, 5, 9, seed=4)
    queries = rows[sampled_rows(3000, 20, seed=1)]
    expected = torch.cdist(queries.double(), rows.double()).argsort(1)[:, :7]
    assert torch.equal(nearest_rows(rows, queries, 7)[1], expected)
    parts = [nearest_rows(rows[a:b], queries, 7) for a, b in ((0, 1300), (1300, 3000))]
    shifted = [(far, places + first) for (far, places), first in zip(parts, (0, 1300), strict=True)]
    assert torch.equal(merge_nearest(shifted, 7), expected)
    sample = sampled_rows(3000, 20, seed=1)
    assert len(sample.unique()) == 20 and not torch.equal(sample, sampled_rows(3000, 20, seed=2))
