"""Requests against a loop: every event is a candidate once, and sees nothing that came later."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.requests import Requests, cut_requests
from tests.models.ops.test_windows import full_batch
from tests.models.sequences import tokens_of

LENGTHS = st.lists(st.integers(0, 9), max_size=5)


def described(requests: Requests) -> list[tuple[list[int], list[int]]]:
    """Times of the history and tokens of the candidates of each request."""
    rows = [[t for t in row if t >= 0] for row in requests.tokens.tolist()]
    histories = [
        tokens_of(requests.batch, requests.batch.timestamps, n).tolist() for n in range(len(rows))
    ]
    return list(zip(histories, rows, strict=True))


@given(
    LENGTHS, st.integers(1, 4), st.integers(1, 10), st.none() | st.integers(0, 50), st.booleans()
)
@settings(deadline=None, max_examples=80)
def test_requests_are_those_of_a_loop(
    lengths: list[int], size: int, longest: int, step: int | None, late: bool
) -> None:
    batch = full_batch(lengths, 1.0)
    first = torch.tensor([length // 2 for length in lengths], dtype=torch.int64) if late else None
    phase = None if step is None else (3, step)
    requests = cut_requests(batch, size, longest, first=first, phase=phase)
    found = described(requests)
    times = batch.timestamps.tolist()
    every: list[int] = []
    for n, (history, tokens) in enumerate(found):
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        b = int(requests.batch.user_ids[n]) - 1
        start = int(batch.offsets[b])
        assert start <= tokens[0] and tokens[-1] < int(batch.offsets[b + 1])
        assert history == times[max(start, tokens[0] - longest) : tokens[0]]
        if history:
            own = tokens_of(requests.batch, requests.batch.next_timestamps, n)
            assert own[-1] == batch.next_timestamps[tokens[0] - 1]
        every += tokens
    starts = [int(batch.offsets[b]) + (n // 2 if late else 0) for b, n in enumerate(lengths)]
    ends = batch.offsets[1:].tolist()
    assert every == [t for a, z in zip(starts, ends, strict=True) for t in range(a, z)]
    if phase is None:  # full ones, but for the last of a sequence
        assert len(found) == sum(-(-(z - a) // size) for a, z in zip(starts, ends, strict=True))
    assert not requests.batch.target_ids.any()


@given(LENGTHS, st.integers(1, 3), st.integers(0, 20))
@settings(deadline=None, max_examples=40)
def test_the_draw_limits_requests_and_depends_on_no_batching(
    lengths: list[int], limit: int, step: int
) -> None:
    batch = full_batch(lengths, 1.0)
    all_of = cut_requests(batch, 2, 5, phase=(1, step))
    some = cut_requests(batch, 2, 5, per_sequence=limit, phase=(1, step))
    own = [int((all_of.batch.user_ids == user).sum()) for user in batch.user_ids]
    kept = [int((some.batch.user_ids == user).sum()) for user in batch.user_ids]
    assert kept == [min(n, limit) for n in own]
    names = set(some.batch.sample_ids.tolist())
    assert names <= set(all_of.batch.sample_ids.tolist()) and len(names) == len(some.tokens)
    swapped = full_batch(lengths, 1.0)
    if len(lengths) > 1:  # the last user alone is cut as among the others
        cut = int(batch.offsets[-2])
        alone = replace(
            swapped,
            sample_ids=batch.sample_ids[-1:],
            user_ids=batch.user_ids[-1:],
            offsets=torch.tensor([0, lengths[-1]]),
            user_features={k: x[-1:] for k, x in batch.user_features.items()},
            side_features={k: x[cut:] for k, x in batch.side_features.items()},
            **{
                name: getattr(batch, name)[cut:]
                for name in ("item_ids", "timestamps", "next_timestamps", "target_ids", "ratings")
            },
            **{
                name: getattr(batch, name)[cut:]
                for name in ("action_ids", "labels", "dwell_times", "durations", "item_codes")
            },
        )
        again = cut_requests(alone, 2, 5, per_sequence=limit, phase=(1, step))
        assert set(again.batch.sample_ids.tolist()) <= names
        assert len(again.tokens) == kept[-1]


def test_every_place_among_the_candidates_is_met() -> None:
    batch = full_batch([9] * 40, 1.0)
    starts = {tuple(cut_requests(batch, 3, 9, phase=(0, s)).tokens[:, 0].tolist()) for s in (0, 1)}
    assert len(starts) == 2
    lengths = cut_requests(batch, 3, 9, phase=(0, 0)).batch.lengths
    assert set(lengths.tolist()) == set(range(9))


def test_a_draw_without_a_seed_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        cut_requests(full_batch([3], 1.0), 2, 5, per_sequence=1)
