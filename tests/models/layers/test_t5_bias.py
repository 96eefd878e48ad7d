"""T5's buckets against the formula, and the two shapes of the bias against each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.layers.t5_bias import RelativeBias


def bucket(relative: int, count: int, most: int, bidirectional: bool) -> int:
    """Section 2.1: half of the buckets are exact, the others grow logarithmically."""
    if bidirectional:
        count //= 2
        offset, distance = (count if relative > 0 else 0), abs(relative)
    else:
        offset, distance = 0, max(-relative, 0)
    exact = count // 2
    if distance < exact:
        return offset + distance
    # A ratio of logarithms a hair below an integer is that integer.
    steps = math.log(distance / exact) / math.log(most / exact) * (count - exact)
    return offset + min(exact + math.floor(steps + 1e-9), count - 1)


@given(
    st.integers(2, 20).map(lambda half: 2 * half),
    st.integers(1, 200),
    st.booleans(),
    st.integers(-500, 500),
)
def test_buckets_equal_the_formula(
    count: int, extra: int, bidirectional: bool, relative: int
) -> None:
    most = count // 2 + extra
    layer = RelativeBias(1, count, most, bidirectional=bidirectional)
    got = int(layer.buckets(torch.tensor([relative]))[0])
    assert got == bucket(relative, count, most, bidirectional)
    assert 0 <= got < count


def test_the_defaults_of_t5() -> None:
    """32 buckets up to 128: exact to 7 in each direction, both ends in the last bucket."""
    layer = RelativeBias(1, 32, 128, bidirectional=True)
    places = torch.tensor([0, -1, -7, -8, -11, -12, -127, -128, -999, 1, 7, 8, 128])
    assert layer.buckets(places).tolist() == [0, 1, 7, 8, 8, 9, 15, 15, 15, 17, 23, 24, 31]


@pytest.mark.parametrize("bidirectional", [True, False])
def test_both_shapes_hold_the_same_numbers(bidirectional: bool) -> None:
    layer, size = RelativeBias(3, 8, 10, bidirectional=bidirectional), 7
    pairs, distances = layer(size), layer.distances(size)
    assert pairs.shape == (3, 7, 7) and distances.shape == (3, 13)
    for i in range(size):
        for j in range(size):
            assert torch.equal(pairs[:, i, j], distances[:, j - i + size - 1])
            expected = layer.buckets_to_heads.weight[bucket(j - i, 8, 10, bidirectional)]
            assert torch.equal(pairs[:, i, j], expected)
