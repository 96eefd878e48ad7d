"""Histories hold every event of their part with its outcome, once, on any number of ranks."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.data import LoaderConfig
from data_loaders.dataset import SequenceDataset
from data_loaders.histories import HistoryLoader, held_out_batches, request_tokens
from data_loaders.manifest import read_manifest
from data_loaders.synthetic import write_synthetic
from models.batch import JaggedBatch

USERS, LENGTH = 50, 7


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("histories")
    write_synthetic(str(path), USERS, 30, 9, 4, rows_per_group=8, labels=True, dwell_times=True)
    return path


@pytest.fixture(scope="module")
def rows(directory: Path) -> list[dict]:
    shards = read_manifest(str(directory)).shards
    return [row for shard in shards for row in pq.read_table(directory / shard.path).to_pylist()]


def described(batch: JaggedBatch) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """User → items, labels and request times of the events."""
    assert batch.labels is not None
    found = {}
    for b, user in enumerate(batch.user_ids.tolist()):
        own = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
        parts = (batch.item_ids, batch.labels, batch.next_timestamps)
        found[user] = tuple(x[own].tolist() for x in parts)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("include_validation", [False, True])
def test_an_epoch_holds_each_prefix_to_its_last_event(
    directory: Path, rows: list[dict], include_validation: bool
) -> None:
    found = {}
    for rank in range(2):
        loader = HistoryLoader(
            SequenceDataset(str(directory), 64),
            LoaderConfig(global_batch=12, max_length=LENGTH, prefetch=0),
            candidates=3,
            requests_per_user=None,
            seed=1,
            rank=rank,
            world_size=2,
            include_validation=include_validation,
        )
        for _ in range(loader.steps_per_epoch):
            for batch in next(loader).micro_batches:
                own = described(batch)
                assert not own.keys() & found.keys()
                found |= own
    assert len(found) == USERS
    for row in rows:
        end = row["validation_end" if include_validation else "train_end"]
        kept = slice(max(end - LENGTH, 0), end)
        times = row["timestamps"][kept]
        expected = (row["item_ids"][kept], row["labels"][kept], [*times[1:], *times[-1:]])
        assert found[row["user_id"]] == expected


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_held_out_events_come_once_behind_their_history(
    directory: Path, rows: list[dict], part: str, world_size: int
) -> None:
    dataset, found, batches = SequenceDataset(str(directory), 64), {}, set()
    for rank in range(world_size):
        count = 0
        for batch, first in held_out_batches(
            dataset,
            part,  # type: ignore[arg-type]
            users_per_batch=7,
            max_length=LENGTH,
            rank=rank,
            world_size=world_size,
            left_out=np.array([4, 9]),
        ):
            count += 1
            for (user, told), place in zip(described(batch).items(), first.tolist(), strict=True):
                found[user] = (told[0][:place], told[0][place:])
        batches.add(count)
    assert len(batches) == 1
    for row in rows:
        bounds = [0, row["train_end"], row["validation_end"], row["length"]]
        at = ["train", "validation", "test"].index(part)
        begin, end = bounds[at], bounds[at + 1]
        if part == "train":
            begin = max(begin, end - LENGTH)
        if begin == end or row["user_id"] in (5, 10):
            assert row["user_id"] not in found
            continue
        items = row["item_ids"]
        history = items[max(begin - LENGTH, 0) : begin]
        assert found.pop(row["user_id"]) == (history, items[begin:end])
    assert not found


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 6), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_a_sequence_is_dealt_at_the_cost_of_its_requests(
    events: list[int], candidates: int, limit: int
) -> None:
    told = request_tokens(np.array(events, np.int64), candidates, None).tolist()
    expected = [
        sum(start + min(candidates, n - start) for start in range(0, n, candidates)) for n in events
    ]
    assert told == expected
    drawn = request_tokens(np.array(events, np.int64), candidates, limit).tolist()
    for n, whole, some in zip(events, expected, drawn, strict=True):
        every = -(-n // candidates)
        assert some == (-(-whole * min(every, limit) // every) if n else 0)
