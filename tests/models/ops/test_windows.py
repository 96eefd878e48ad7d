"""Windows against a loop over sequences and tokens."""

from dataclasses import fields, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.batch import JaggedBatch
from models.ops.windows import latest_events, sliding_sessions, sliding_windows
from tests.models.sequences import make_batch, take, tokens_of

LENGTHS = st.lists(st.integers(0, 9), max_size=6)
TOKEN_FIELDS = (
    "item_ids",
    "timestamps",
    "next_timestamps",
    "ratings",
    "dwell_times",
    "durations",
    "action_ids",
    "labels",
    "item_codes",
)


def full_batch(lengths: list[int], predicting: float, seed: int = 0) -> JaggedBatch:
    """A batch with every optional field."""
    batch = make_batch(lengths, 30, seed, predicting, {"age": 5}, {"device": 4})
    total = batch.num_tokens
    batch = replace(
        batch,
        sample_ids=batch.sample_ids * 7 + 3,
        ratings=torch.rand(total),
        dwell_times=torch.rand(total),
        durations=torch.rand(total),
        action_ids=torch.randint(0, 4, (total,)),
        labels=torch.randint(0, 8, (total,)),
        item_codes=torch.randint(0, 8, (total, 3)),
    )
    assert all(getattr(batch, entry.name) is not None for entry in fields(batch))
    return batch


def ends_of(batch: JaggedBatch) -> list[tuple[int, int, int]]:
    """(sequence, its first token, token with a target) of every window."""
    starts = batch.offsets.tolist()
    return [
        (b, starts[b], t)
        for b in range(batch.num_sequences)
        for t in range(starts[b], starts[b + 1])
        if batch.target_ids[t] > 0
    ]


@given(LENGTHS, st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_windows_equal_a_loop(lengths: list[int], predicting: float, history: int) -> None:
    batch = full_batch(lengths, predicting)
    windows, targets = sliding_windows(batch, history, per_sequence=None, seed=0, step=0)
    expected = ends_of(batch)
    assert windows.num_sequences == len(expected) == targets.numel()
    for n, (b, start, end) in enumerate(expected):
        first = max(start, end - history + 1)
        for name in TOKEN_FIELDS:
            got = tokens_of(windows, getattr(windows, name), n)
            assert torch.equal(got, getattr(batch, name)[first : end + 1]), name
        got = tokens_of(windows, windows.side_features["device"], n)
        assert torch.equal(got, batch.side_features["device"][first : end + 1])
        assert windows.user_ids[n] == batch.user_ids[b]
        assert windows.user_features["age"][n] == batch.user_features["age"][b]
        assert targets[n] == batch.target_ids[end]
        assert tokens_of(windows, windows.target_ids, n).tolist() == [0] * (end - first) + [
            int(batch.target_ids[end])
        ]
    assert windows.sample_ids.unique().numel() == len(expected)


@given(LENGTHS, st.integers(1, 4), st.integers(0, 3), st.data())
@settings(deadline=None, max_examples=40)
def test_the_draw_limits_windows_and_depends_on_no_batching(
    lengths: list[int], limit: int, step: int, data: st.DataObject
) -> None:
    batch = full_batch(lengths, 0.7)

    def drawn(some: JaggedBatch) -> dict[int, int]:
        windows, targets = sliding_windows(some, 4, per_sequence=limit, seed=5, step=step)
        return dict(zip(windows.sample_ids.tolist(), targets.tolist(), strict=True))

    everything, _ = sliding_windows(batch, 4, per_sequence=None, seed=5, step=step)
    windows, _ = sliding_windows(batch, 4, per_sequence=limit, seed=5, step=step)
    assert set(windows.sample_ids.tolist()) <= set(everything.sample_ids.tolist())
    for b in range(batch.num_sequences):
        available = int((tokens_of(batch, batch.target_ids, b) > 0).sum())
        own = int((windows.user_ids == batch.user_ids[b]).sum())
        assert own == min(available, limit)
    plain = replace(
        batch,
        ratings=None,
        dwell_times=None,
        durations=None,
        action_ids=None,
        labels=None,
        item_codes=None,
    )
    chosen = data.draw(st.lists(st.integers(0, max(len(lengths) - 1, 0)), unique=True))
    chosen = [b for b in chosen if b < len(lengths)]
    rest = [b for b in range(len(lengths)) if b not in chosen]
    assert drawn(take(plain, chosen)) | drawn(take(plain, rest)) == drawn(batch)


def test_draws_change_with_seed_and_step_and_are_fair() -> None:
    batch = full_batch([20] * 300, 1.0)

    def positions(seed: int, step: int) -> Tensor:
        windows, _ = sliding_windows(batch, 99, per_sequence=5, seed=seed, step=step)
        return windows.lengths

    assert torch.equal(positions(1, 2), positions(1, 2))
    assert not torch.equal(positions(1, 2), positions(1, 3))
    assert not torch.equal(positions(1, 2), positions(2, 2))
    counts = positions(1, 2).bincount(minlength=21)[1:]
    assert counts.sum() == 1500 and counts.min() > 40 and counts.max() < 115  # mean 75, std 7.5


@given(LENGTHS, st.sampled_from([0.5, 0.9, 1.0]), st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_sessions_equal_a_loop(lengths: list[int], predicting: float, items: int) -> None:
    batch = full_batch(lengths, predicting)
    windows, targets = sliding_sessions(batch, 3, items, per_sequence=None, seed=0, step=0)
    same, single = sliding_windows(batch, 3, per_sequence=None, seed=0, step=0)
    assert torch.equal(windows.item_ids, same.item_ids)
    assert targets.shape == (single.numel(), items)
    for n, (b, _, end) in enumerate(ends_of(batch)):
        wanted, at = [0] * items, end
        while at < batch.offsets[b + 1] and at - end < items and batch.target_ids[at] > 0:
            wanted[at - end] = int(batch.target_ids[at])
            at += 1
        assert targets[n].tolist() == wanted


@given(LENGTHS, st.integers(1, 10))
@settings(deadline=None, max_examples=40)
def test_latest_events_equal_a_loop(lengths: list[int], count: int) -> None:
    batch = full_batch(lengths, 1.0)
    rows = {"item": torch.randn(batch.num_tokens, 2), "user_age": torch.randn(len(lengths), 2)}
    cut, kept, longest = latest_events(batch, rows, count)
    assert longest == max([1, *(min(length, count) for length in lengths)])
    assert torch.equal(kept["user_age"], rows["user_age"])
    assert torch.equal(cut.sample_ids, batch.sample_ids)
    for b in range(len(lengths)):
        for name in (*TOKEN_FIELDS, "target_ids"):
            whole = tokens_of(batch, getattr(batch, name), b)
            assert torch.equal(tokens_of(cut, getattr(cut, name), b), whole[-count:]), name
        assert torch.equal(
            tokens_of(cut, kept["item"], b), tokens_of(batch, rows["item"], b)[-count:]
        )
