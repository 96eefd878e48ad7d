"""Jagged ops against loops over sequences, including empty ones."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from models.ops.jagged import (
    jagged_to_padded,
    lengths_to_offsets,
    padded_to_jagged,
    positions_in_sequence,
    segment_ids,
)

LENGTHS = st.lists(st.integers(0, 7), max_size=6)


@given(LENGTHS)
def test_index_helpers_match_loops(lengths: list[int]) -> None:
    offsets = lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64))
    total = sum(lengths)
    assert offsets.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    assert segment_ids(offsets, total).tolist() == [
        b for b, n in enumerate(lengths) for _ in range(n)
    ]
    assert positions_in_sequence(offsets, total).tolist() == [i for n in lengths for i in range(n)]


@given(LENGTHS, st.integers(1, 9), st.sampled_from([(), (3,), (2, 2)]))
def test_padding_matches_loop_and_gradient(
    lengths: list[int], max_len: int, trailing: tuple[int, ...]
) -> None:
    offsets = lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64))
    values = torch.randn(sum(lengths), *trailing, requires_grad=True)
    expected = torch.zeros(len(lengths), max_len, *trailing)
    kept = torch.zeros(sum(lengths), *trailing)
    for b, n in enumerate(lengths):
        start = int(offsets[b])
        for i in range(min(n, max_len)):
            expected[b, i] = values[start + i].detach()
            kept[start + i] = 1.0
    padded = jagged_to_padded(values, offsets, max_len)
    assert torch.equal(padded, expected)
    (3.0 * padded).sum().backward()
    assert torch.equal(values.grad, 3.0 * kept)


@given(LENGTHS)
def test_padding_round_trip(lengths: list[int]) -> None:
    offsets = lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64))
    values = torch.randn(sum(lengths), 3)
    assert torch.equal(padded_to_jagged(jagged_to_padded(values, offsets, 7), offsets), values)
    padded = torch.randn(len(lengths), 7, 3, requires_grad=True)
    padded_to_jagged(padded, offsets, sum(lengths)).sum().backward()
    expected = torch.zeros_like(padded)
    for b, n in enumerate(lengths):
        expected[b, :n] = 1.0
    assert torch.equal(padded.grad, expected)
