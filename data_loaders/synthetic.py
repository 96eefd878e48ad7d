"""A small prepared data set made of noise-free rules, for tests, benchmarks and dry runs.

It has the layout and manifest of `tandem prepare` and something to learn in every column: items
follow cycles whose stride depends on the user's segment, ratings and labels follow from item and
segment, and the side feature is a function of the item. It is a pure function of its arguments.

Shape legend: U users, T events of all users, V items.
"""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import storage
from configs.data import LeaveLastOut
from data_loaders.manifest import (
    DatasetManifest,
    EventCounts,
    FileEntry,
    ShardEntry,
    build_manifest,
    write_manifest,
)
from data_loaders.sampler import hashes

STRIDES = (1, 2, 3, 5)
"""Stride of each user segment's cycle through the items."""
GENRES = 5
ACTIONS = ("click", "like", "share")
LABELS = ("like", "hate", "long_view")
FOLLOW = 0.8
"""Probability that an event follows the cycle instead of jumping to a uniform item."""


def write_synthetic(
    url: str,
    num_users: int,
    num_items: int,
    mean_length: float,
    seed: int,
    *,
    num_shards: int = 2,
    rows_per_group: int = 32,
    empty_shards: int = 0,
    ratings: bool = True,
    features: bool = True,
    actions: bool = False,
    dwell_times: bool = False,
    durations: bool = False,
    labels: bool = False,
) -> DatasetManifest:
    """Write a synthetic data set into the directory `url` and return its manifest.

    Args:
        mean_length: mean events of a user; lengths are geometric from 1, so that users with one
            or two events (which only train) are among them.
        empty_shards: shards without rows that follow the `num_shards` filled ones.
        ratings: whether events carry a rating of 1…5.
        features: whether users have a `segment` and events a `genre`.
        actions: whether events carry an action id.
        dwell_times, durations: whether events carry them; some dwell times are unknown.
        labels: whether events carry `LABELS`, which follow from item and segment.
    """
    users = _users(num_users, mean_length, seed)
    events = _events(users, num_items, seed)
    wanted = {"ratings": ratings, "dwell_times": dwell_times, "durations": durations}
    wanted |= {"action_ids": actions, "labels": labels, "side_genre": features}
    kept = [name for name in events if wanted.get(name, True)]
    table = _sequence_table(users, events, kept, features)
    bounds = [num_users * at // num_shards for at in range(num_shards + 1)]
    count = int(users["length"].sum())
    manifest = build_manifest(
        name="synthetic",
        num_users=num_users,
        num_items=num_items,
        num_events=count,
        user_features={"segment": len(STRIDES)} if features else {},
        side_features={"genre": GENRES} if features else {},
        actions=len(ACTIONS) if actions else 0,
        has_ratings=ratings,
        has_dwell_times=dwell_times,
        has_durations=durations,
        labels=LABELS if labels else (),
        split=LeaveLastOut(),
        counts=_nothing_lost(count),
        length_histogram=_histogram(users["length"]),
        shards=_write_shards(url, table, bounds + bounds[-1:] * empty_shards, rows_per_group),
        items=(_write_items(url, users, events, num_items),),
        vocabularies=_write_vocabularies(url, _vocabularies(features, actions)),
        quarantine=(),
    )
    write_manifest(url, manifest)
    return manifest


def _nothing_lost(count: int) -> EventCounts:
    return EventCounts(read=count, kept=count, quarantined={}, below_min_rating=0, core_removed=0)


def _uniform(seed: int, stream: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1)."""
    bits = hashes(count, seed, stream).view(np.uint64)
    return (bits >> np.uint64(11)).astype(np.float64) / 2.0**53


def _users(num_users: int, mean_length: float, seed: int) -> dict[str, np.ndarray]:
    """Columns of users, each [U]."""
    tail = -np.log1p(-_uniform(seed, 0, num_users)) * (mean_length - 1)
    length = 1 + np.round(tail).astype(np.int64)
    splits = length >= 3
    return {
        "length": length,
        "train_end": np.where(splits, length - 2, length),
        "validation_end": np.where(splits, length - 1, length),
        "segment": (_uniform(seed, 1, num_users) * len(STRIDES)).astype(np.int64),
    }


def _events(users: dict[str, np.ndarray], num_items: int, seed: int) -> dict[str, np.ndarray]:
    """Columns of events, each [T], users one after another."""
    length = users["length"]
    total = int(length.sum())
    first = np.cumsum(length) - length
    segment = np.repeat(users["segment"], length)
    jumps = _uniform(seed, 2, total) >= FOLLOW
    jumps[first] = True
    index = np.arange(total)
    last_jump = np.maximum.accumulate(np.where(jumps, index, 0))
    base = (_uniform(seed, 3, total) * num_items).astype(np.int64)
    items = (base[last_jump] + np.array(STRIDES)[segment] * (index - last_jump)) % num_items
    gaps = 1 + (-np.log1p(-_uniform(seed, 4, total)) * 3600).astype(np.int64)
    elapsed = np.cumsum(gaps)
    disliked = (items + segment) % 3 == 0
    high, low = _uniform(seed, 5, total) < 0.5, _uniform(seed, 6, total) < 0.1
    rating = np.where(disliked, np.where(high, 2.0, 1.0), np.where(high, 5.0, 4.0))
    liked = ~disliked & (items % 2 == 0)
    long_view = ~disliked & ((items + segment) % 3 == 1)
    return {
        "item_ids": items + 1,
        "timestamps": 1_000_000_000 + elapsed - np.repeat(elapsed[first], length),
        "ratings": np.where(low, 3.0, rating).astype(np.float32),
        "dwell_times": _dwell_times(items, disliked, low),
        "durations": (4.0 + items % 60).astype(np.float32),
        "action_ids": 1 + (items + segment) % len(ACTIONS),
        "labels": liked + 2 * disliked.astype(np.int64) + 4 * long_view,
        "side_genre": 1 + items % GENRES,
    }


def _dwell_times(items: np.ndarray, disliked: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """float32 [T] seconds, NaN where unknown: what is disliked is left after a quarter of it."""
    seconds = np.where(disliked, 0.25, 1.0) * (4.0 + items % 60)
    return np.where(unknown, np.nan, seconds).astype(np.float32)


def _sequence_table(
    users: dict[str, np.ndarray],
    events: dict[str, np.ndarray],
    kept: list[str],
    features: bool,
) -> pa.Table:
    length = users["length"]
    offsets = pa.array(np.concatenate([[0], np.cumsum(length)]).astype(np.int32))
    columns: dict[str, pa.Array] = {
        "user_id": pa.array(np.arange(1, len(length) + 1)),
        "user": pa.array([f"user-{number}" for number in range(1, len(length) + 1)]),
    }
    for name in ("length", "train_end", "validation_end"):
        columns[name] = pa.array(users[name].astype(np.int32))
    for name in kept:
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(events[name]))
    if features:
        columns["user_segment"] = pa.array(users["segment"] + 1)
    return pa.table(columns)


def _write(url: str, path: str, table: pa.Table, rows_per_group: int) -> FileEntry:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=rows_per_group, compression="zstd", write_page_checksum=True
    )
    data = sink.getvalue().to_pybytes()
    directory, _, _ = path.rpartition("/")
    storage.make_directory(storage.join(url, directory))
    storage.write_bytes(storage.join(url, path), data)
    digest = storage.sha256_bytes(data)
    return FileEntry(path=path, rows=table.num_rows, bytes=len(data), sha256=digest)


def _write_shards(
    url: str, table: pa.Table, bounds: list[int], rows_per_group: int
) -> tuple[ShardEntry, ...]:
    return tuple(
        _write_shard(url, index, table.slice(first, last - first), first + 1, rows_per_group)
        for index, (first, last) in enumerate(itertools.pairwise(bounds))
    )


def _write_shard(
    url: str, index: int, table: pa.Table, first_user_id: int, rows_per_group: int
) -> ShardEntry:
    entry = _write(url, f"sequences/part-{index:05d}.parquet", table, rows_per_group)
    groups = [
        min(rows_per_group, table.num_rows - start)
        for start in range(0, table.num_rows, rows_per_group)
    ]
    events = sum(table["length"].to_pylist())
    return ShardEntry(
        **entry.model_dump(),
        first_user_id=first_user_id,
        row_group_rows=tuple(groups),
        events=events,
    )


def _write_items(
    url: str, users: dict[str, np.ndarray], events: dict[str, np.ndarray], num_items: int
) -> FileEntry:
    length, items = users["length"], events["item_ids"]
    position = np.arange(len(items)) - np.repeat(np.cumsum(length) - length, length)
    trained = position < np.repeat(users["train_end"], length)
    names = range(1, num_items + 1)
    table = pa.table(
        {
            "item_id": pa.array(np.arange(1, num_items + 1)),
            "item": pa.array([f"item-{number}" for number in names]),
            "title": pa.array([f"Item {number}" for number in names]),
            "train_count": pa.array(np.bincount(items[trained], minlength=num_items + 1)[1:]),
        }
    )
    return _write(url, "items/part-00000.parquet", table, 65536)


def _vocabularies(features: bool, actions: bool) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    if features:
        values["user_segment"] = [f"stride {stride}" for stride in STRIDES]
        values["side_genre"] = [f"genre {genre}" for genre in range(GENRES)]
    if actions:
        values["actions"] = list(ACTIONS)
    return values


def _write_vocabularies(url: str, values: dict[str, list[str]]) -> tuple[FileEntry, ...]:
    return tuple(_write_vocabulary(url, *entry) for entry in values.items())


def _write_vocabulary(url: str, name: str, values: list[str]) -> FileEntry:
    table = pa.table({"id": pa.array(np.arange(1, len(values) + 1)), "value": pa.array(values)})
    return _write(url, f"vocabularies/{name}.parquet", table, 65536)


def _histogram(length: np.ndarray) -> dict[int, int]:
    exponents = np.bincount(np.floor(np.log2(length)).astype(np.int64))
    return {2**exponent: int(users) for exponent, users in enumerate(exponents) if users}
