"""Choosing from jagged sequences and joining them, against loops over lists."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.jagged_select import (
    concatenate,
    longest_sequence,
    recency,
    repeated_offsets,
    select_latest,
)

SEQUENCES = st.lists(st.lists(st.booleans(), max_size=6), max_size=5)


def offsets_of(lists: list[list]) -> torch.Tensor:
    return torch.tensor([0, *(len(x) for x in lists)]).cumsum(0)


@given(marks=SEQUENCES, limit=st.integers(1, 7), all_wanted=st.booleans())
@settings(deadline=None, max_examples=60)
def test_selection_equals_slices(marks: list[list[bool]], limit: int, all_wanted: bool) -> None:
    offsets, flat = offsets_of(marks), [mark for own in marks for mark in own]
    wanted = None if all_wanted else torch.tensor(flat, dtype=torch.bool)
    chosen = select_latest(offsets, len(flat), limit, wanted)
    expected, recencies, start = [], [], 0
    for own in marks:
        kept = [start + at for at, mark in enumerate(own) if mark or all_wanted][-limit:]
        expected.append(kept)
        recencies += list(range(len(kept)))[::-1]
        start += len(own)
    assert chosen.indices.tolist() == [t for kept in expected for t in kept]
    assert chosen.offsets.tolist() == offsets_of(expected).tolist()
    assert chosen.recency.tolist() == recencies


@given(parts=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=3))
@settings(deadline=None, max_examples=40)
def test_concatenation_equals_lists(parts: list[list[int]]) -> None:
    counter, jagged, lists = 0, [], []
    for lengths in parts:
        own = [
            [counter + i for i in range(sum(lengths[:b]), sum(lengths[: b + 1]))] for b in range(4)
        ]
        counter += sum(lengths)
        lists.append(own)
        values = torch.tensor([x for row in own for x in row], dtype=torch.float32)
        jagged.append((values[:, None].requires_grad_(), offsets_of(own)))
    values, offsets = concatenate(jagged)
    rows = [[x for own in lists for x in own[b]] for b in range(4)]
    assert values[:, 0].tolist() == [x for row in rows for x in row]
    assert offsets.tolist() == offsets_of(rows).tolist()
    (values * values).sum().backward()
    for part, _ in jagged:
        torch.testing.assert_close(part.grad, 2 * part.detach())


def test_recency_counts_from_the_end() -> None:
    assert recency(torch.tensor([0, 3, 3, 5]), 5).tolist() == [2, 1, 0, 1, 0]


def test_lengths_to_pad_to() -> None:
    assert longest_sequence(torch.tensor([0, 3, 3, 5]), 9) == 3
    assert longest_sequence(torch.tensor([0]), 9) == 9
    assert repeated_offsets(2, 3, torch.device("cpu")).tolist() == [0, 3, 6]
