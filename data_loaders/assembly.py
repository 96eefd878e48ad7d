"""Steps from clean events to the data set: vocabularies, shards of sequences, the items table.

Shape legend: U users and T events of one shard.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs import storage
from configs.data import GlobalTime
from data_loaders.cleaning import Job
from data_loaders.events import SECOND, date_us
from data_loaders.exchange import PARTITION, Report
from data_loaders.manifest import ShardEntry
from data_loaders.shards import dense_codes, lookup, read_table, write_table

ITEM_GROUP_ROWS = 4096
"""Rows of a row group of the items table: what is read to name a few items."""
_EMPTY_EVENTS = {
    "user": pa.string(),
    "time": pa.int64(),
    "place": pa.int64(),
}


def _vocabulary_path(job: Job, name: str) -> str:
    """Where the categories of `name` (`actions`, `side_<f>`, `user_<f>`) lie."""
    return job.path("vocabularies", f"{name}.parquet")


def _vocabulary(job: Job, name: str) -> pa.ChunkedArray:
    return read_table(storage.join(job.root, _vocabulary_path(job, name)), ["value"])["value"]


def load_categories(url: str, names: list[str], indices: list[int]) -> Iterator[pa.Table]:
    """Distinct values of a staged part's columns; partition `indices[i]` collects `names[i]`."""
    table = read_table(url, names)
    for name, index in zip(names, indices, strict=True):
        values = pc.unique(table[name]).drop_null()
        partition = pa.array(np.full(len(values), index, np.int64))
        yield pa.table({PARTITION: partition, "value": values})


def vocabulary_step(job: Job, names: list[str], partition: int, rows: pa.Table) -> Report:
    """Give the values of one categorical column ids 1, 2, … in byte order."""
    _, values = dense_codes(rows["value"])
    ids = pa.array(np.arange(1, len(values) + 1))
    path = _vocabulary_path(job, names[partition])
    entry = write_table(job.root, path, pa.table({"id": ids, "value": values}))
    return {"rows": rows.num_rows, "name": names[partition], "entry": entry.model_dump()}


def shard_step(
    job: Job,
    shard: int,
    *,
    first_user_id: int,
    item_offsets: np.ndarray,
    user_features: tuple[str, ...],
) -> Report:
    """Write shard `shard`: the users of that hash partition with their event sequences.

    Args:
        first_user_id: dense id of the shard's first user.
        item_offsets: int64 [partitions], items in earlier partitions.

    Returns:
        The shard's manifest entry, its length histogram, how many split targets it holds and
        how many of them have events of their user before them.
    """
    url = job.part("by_user", shard)
    events = read_table(url) if storage.exists(url) else _no_events(job)
    codes, users = dense_codes(events["user"])
    last_first = ["place", "order", "time"]
    keys = [events[name].to_numpy() for name in last_first if name in events.column_names]
    events = events.take(pa.array(np.lexsort([*keys, codes])))
    length = np.bincount(codes, minlength=len(users))
    table = _sequences(job, events, users, length, first_user_id, item_offsets)
    for name in user_features:
        table = table.append_column(f"user_{name}", _user_feature(job, shard, name, users))
    path = job.path("sequences", f"part-{shard:05d}.parquet")
    group = job.shards.rows_per_group
    entry = write_table(job.root, path, table, rows_per_group=group, codec=job.shards.compression)
    rows = table.num_rows
    shard_entry = ShardEntry(
        **entry.model_dump(),
        first_user_id=first_user_id,
        row_group_rows=tuple(min(group, rows - start) for start in range(0, rows, group)),
        events=events.num_rows,
    )
    train_end, validation_end = table["train_end"].to_numpy(), table["validation_end"].to_numpy()
    _stage_train_counts(job, shard, events, length, train_end)
    return {
        "rows": events.num_rows,
        "shard": shard,
        "entry": shard_entry.model_dump(),
        "lengths": _histogram(length),
        "train_events": int(train_end.sum()),
        "validation_targets": int((train_end < validation_end).sum()),
        "test_targets": int((validation_end < length).sum()),
        "validation_histories": int(((train_end > 0) & (train_end < validation_end)).sum()),
        "test_histories": int(((validation_end > 0) & (validation_end < length)).sum()),
    }


def _no_events(job: Job) -> pa.Table:
    kinds = dict(_EMPTY_EVENTS) | dict.fromkeys(("item_partition", "item_rank"), pa.int64())
    kinds |= dict.fromkeys(job.rules.categories(), pa.string())
    if job.source.columns.rating is not None:
        kinds["rating"] = pa.float32()
    kinds |= dict.fromkeys(job.rules.spans(), pa.float32())
    if job.source.columns.order is not None:
        kinds["order"] = pa.float64()
    if job.source.columns.labels:
        kinds["labels"] = pa.int64()
    return pa.table({name: pa.array([], kind) for name, kind in kinds.items()})


def _sequences(
    job: Job,
    events: pa.Table,
    users: pa.Array,
    length: np.ndarray,
    first_user_id: int,
    item_offsets: np.ndarray,
) -> pa.Table:
    """Rows of the shard [U]; `events` [T] are sorted by user and time."""
    time = events["time"].to_numpy()
    train_end, validation_end = _split(job, time, length)
    offsets = pa.array(np.concatenate([[0], np.cumsum(length)]), pa.int32())

    def lists(values: Any) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    items = 1 + events["item_rank"].to_numpy() + item_offsets[events["item_partition"].to_numpy()]
    columns = {
        "user_id": pa.array(first_user_id + np.arange(len(users), dtype=np.int64)),
        "user": users,
        "length": pa.array(length, pa.int32()),
        "train_end": pa.array(train_end, pa.int32()),
        "validation_end": pa.array(validation_end, pa.int32()),
        "item_ids": lists(items.astype(np.int64)),
        "timestamps": lists(time // SECOND),
    }
    if job.source.columns.rating is not None:
        columns["ratings"] = lists(events["rating"].to_numpy())
    for name in job.rules.spans():
        seconds = events[name].to_numpy() / np.float32(job.rules.dwell_per_second)
        columns["dwell_times" if name == "dwell" else "durations"] = lists(seconds)
    if job.source.columns.labels:
        columns["labels"] = lists(events["labels"].to_numpy())
    for name in job.rules.categories():
        vocabulary = _vocabulary(job, "actions" if name == "action" else name)
        column = "action_ids" if name == "action" else name
        columns[column] = lists(lookup(events[name], vocabulary))
    return pa.table(columns)


def _split(job: Job, time: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [U] number of train events, and of train and validation events, of each user."""
    if not isinstance(job.split, GlobalTime):
        splits = length >= 3
        return np.where(splits, length - 2, length), np.where(splits, length - 1, length)
    start = np.cumsum(length) - length
    bounds = (
        date_us(job.split.validation_from),
        date_us(job.split.test_from),
    )
    # Every user has an event, so no segment is empty, which reduceat could not express.
    before = [np.add.reduceat((time < bound).astype(np.int64), start) for bound in bounds]
    return before[0], before[1]


def _user_feature(job: Job, shard: int, name: str, users: pa.Array) -> pa.Array:
    """int64 [U] category of each user, 0 where the user table has none."""
    url = job.part("user_table", shard)
    if not storage.exists(url):
        return pa.array(np.zeros(len(users), np.int64))
    table = read_table(url, ["user", f"user_{name}"])
    row = pc.index_in(users, value_set=table["user"].combine_chunks())
    values = table[f"user_{name}"].take(row)
    return pa.array(lookup(values, _vocabulary(job, f"user_{name}")))


def _stage_train_counts(
    job: Job, shard: int, events: pa.Table, length: np.ndarray, train_end: np.ndarray
) -> None:
    """Stage how often each item of the shard occurs in training (0: only later)."""
    start = np.cumsum(length) - length
    trains = np.arange(events.num_rows) < np.repeat(start + train_end, length)
    table = events.select(["item_partition", "item_rank"])
    table = table.append_column("count", pa.array(trains.astype(np.int64)))
    counts = table.group_by(["item_partition", "item_rank"], use_threads=False).aggregate(
        [("count", "sum")]
    )
    write_table(job.staging, f"train_counts/part-{shard:05d}.parquet", counts)


def load_train_counts(url: str) -> Iterator[pa.Table]:
    """Staged counts, by partition of the item."""
    counts = read_table(url)
    yield counts.rename_columns({"item_partition": PARTITION})


def items_step(
    job: Job,
    item_offsets: np.ndarray,
    features: tuple[str, ...],
    partition: int,
    counts: pa.Table,
) -> Report:
    """Write the items of one partition: id, raw id, title, occurrences in training, features."""
    catalogue = read_table(job.part("catalogue", partition))
    rank, count = counts["item_rank"].to_numpy(), counts["count_sum"].to_numpy()
    # Sums of integers below 2**53 are exact in the float64 that bincount adds in.
    train_count = np.bincount(rank, weights=count, minlength=catalogue.num_rows)
    ids = item_offsets[partition] + 1 + np.arange(catalogue.num_rows)
    said = _said_of_items(job, partition, features, catalogue["item"])
    table = pa.table(
        {
            "item_id": pa.array(ids, pa.int64()),
            "item": catalogue["item"],
            "title": said.pop("title"),
            "train_count": pa.array(train_count.astype(np.int64)),
            **said,
        }
    )
    path = job.path("items", f"part-{partition:05d}.parquet")
    entry = write_table(job.root, path, table, rows_per_group=ITEM_GROUP_ROWS)
    return {"rows": table.num_rows, "entry": entry.model_dump()}


def _said_of_items(
    job: Job, partition: int, features: tuple[str, ...], items: pa.ChunkedArray
) -> dict[str, pa.ChunkedArray | pa.Array]:
    """Title of each item, "" where it has none, and the id of each feature's category, or 0."""
    names, url = [f"item_{name}" for name in features], job.part("titles", partition)
    if not storage.exists(url):
        nothing = pa.array(np.zeros(len(items), np.int64))
        return {"title": pa.array([""] * len(items), pa.string())} | dict.fromkeys(names, nothing)
    table = read_table(url)
    rows = table.take(pc.index_in(items, value_set=table["item"].combine_chunks()))
    ids = {name: pa.array(lookup(rows[name], _vocabulary(job, name))) for name in names}
    return {"title": rows["title"].fill_null(""), **ids}


def _histogram(length: np.ndarray) -> dict[int, int]:
    """Power of two b → users with b ≤ length < 2b."""
    exponent = np.frexp(length.astype(np.float64))[1] - 1
    bins, counts = np.unique(exponent, return_counts=True)
    return {1 << int(b): int(n) for b, n in zip(bins, counts, strict=True)}
