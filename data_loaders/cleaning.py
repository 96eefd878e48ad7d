"""Steps from logs to clean events: read and type, drop duplicates, k-core.

Each function handles one chunk or partition inside a task, writes its rows as a staged part and
returns a small report. Events are exchanged in turn by item and by user; an item's dense id is
fixed by its partition and its rank there, so it depends neither on the number of machines nor on
who finished first.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs import storage
from configs.data import CleaningConfig, CsvSource, JsonlSource, ParquetSource, ShardConfig, Split
from data_loaders.events import (
    DUPLICATE,
    REASONS,
    EventRules,
    as_category,
    count_reasons,
    first_of_duplicates,
    malformed_rows,
    quarantined,
    render_time,
    type_events,
)
from data_loaders.exchange import PARTITION, Report
from data_loaders.shards import dense_codes, partition_of, read_table, staged, write_table
from data_loaders.sources import (
    FILE_SHIFT,
    Chunk,
    RawRows,
    TableFiles,
    places,
    read_chunk,
    readable,
    source_rows,
)

Log = CsvSource | JsonlSource | ParquetSource


@dataclass(frozen=True)
class Job:
    """A preparation: what every step of it needs to know. Travels to all tasks."""

    root: str
    """Directory of the data set."""
    version: str
    """Directory of this preparation's files inside `sequences`, `items` and the like."""
    source: Log
    cleaning: CleaningConfig
    split: Split
    shards: ShardConfig
    rules: EventRules

    @property
    def staging(self) -> str:
        """Directory of staged parts, removed at the end."""
        return storage.join(self.root, f"staging-{self.version}")

    @property
    def partitions(self) -> int:
        """Hash partitions of users (one a shard) and of items."""
        return self.shards.num_shards

    def path(self, kind: str, name: str) -> str:
        """Path of a file of the data set below `root`; `kind` is `sequences`, `items` or so."""
        return f"{kind}/{self.version}/{name}"

    def part(self, name: str, partition: int) -> str:
        """URL of a partition's part of the staged table `name`."""
        return storage.join(self.staging, staged(name, partition))


def read_events(job: Job, files: TableFiles, chunk: Chunk, index: int) -> Report:
    """Read, type and validate a chunk; good events are staged, bad ones quarantined."""
    report: Report = {"rows": 0, "parts": [], "quarantine": [], "reasons": Counter()}
    for number, raw in enumerate(read_chunk(files, chunk)):
        with readable(files, chunk):
            typed, code = type_events(raw.table, job.rules)
        good = code == 0
        events = _placed(typed, chunk, raw).filter(pa.array(good))
        name = f"part-{index:05d}-{number:05d}.parquet"
        if events.num_rows:
            report["parts"].append(write_table(job.staging, f"read/{name}", events).path)
        bad = raw.table.filter(pa.array(~good))
        reasons = np.array(REASONS, dtype=object)[code[~good]]
        rows = source_rows(places(chunk, raw)[~good])
        lines = {raw.first_row + place: line for place, line in raw.malformed.items()}
        rejected = pa.concat_tables(
            [
                quarantined(bad, np.full(bad.num_rows, chunk.name, object), rows, reasons),
                malformed_rows(files.names, chunk.name, lines),
            ]
        )
        if rejected.num_rows:
            entry = write_table(job.root, job.path("quarantine", name), rejected)
            report["quarantine"].append(entry.model_dump())
            report["reasons"].update(count_reasons(rejected))
        report["rows"] += raw.table.num_rows + len(raw.malformed)
    return report


def _placed(typed: pa.Table, chunk: Chunk, raw: RawRows) -> pa.Table:
    return typed.append_column("place", pa.array(places(chunk, raw)))


def load_events(job: Job, url: str, key: str) -> Iterator[pa.Table]:
    """Staged events with the partition of their `key` (`item` or `user`)."""
    events = read_table(url)
    partition = partition_of(events[key], job.partitions)
    yield events.append_column(PARTITION, pa.array(partition))


def first_item_step(job: Job, names: Sequence[str], partition: int, events: pa.Table) -> Report:
    """As `item_step`, after duplicates and low ratings are dropped.

    Args:
        names: names of the log's files, for the quarantine.
    """
    report: Report = {"duplicates": 0, "below_min_rating": 0, "quarantine": []}
    if job.cleaning.duplicates == "quarantine":
        first = first_of_duplicates(events)
        copies = events.filter(pa.array(~first))
        events = events.filter(pa.array(first))
        if copies.num_rows:
            entry = _quarantine_duplicates(job, names, partition, copies)
            report |= {"duplicates": copies.num_rows, "quarantine": [entry]}
    if job.cleaning.min_rating is not None:
        liked = pc.greater_equal(events["rating"], job.cleaning.min_rating)
        report["below_min_rating"] = events.num_rows - pc.sum(liked).as_py() if len(liked) else 0
        events = events.filter(liked)
    return report | item_step(job, partition, events)


def _quarantine_duplicates(
    job: Job, names: Sequence[str], partition: int, copies: pa.Table
) -> dict[str, Any]:
    copies = copies.sort_by("place")
    columns = job.source.columns
    raw = {columns.user: copies["user"], columns.item: copies["item"]}
    raw[columns.timestamp] = render_time(copies["time"].to_numpy(), job.rules.unit)
    if columns.rating is not None:
        raw[columns.rating] = copies["rating"]
    raw |= {column: copies[name] for name, column in job.rules.spans().items()}
    if columns.order is not None:
        raw[columns.order] = copies["order"]
    for bit, column in enumerate(columns.labels.values()):
        raw[column] = pa.array((copies["labels"].to_numpy() >> bit) & 1)
    raw |= {column: copies[name] for name, column in job.rules.categories().items()}
    place = copies["place"].to_numpy()
    files = np.asarray(names, dtype=object)[place >> FILE_SHIFT]
    reasons = np.full(len(files), DUPLICATE, object)
    table = quarantined(pa.table(raw), files, source_rows(place), reasons)
    path = job.path("quarantine", f"part-duplicates-{partition:05d}.parquet")
    return write_table(job.root, path, table).model_dump()


def item_step(job: Job, partition: int, events: pa.Table) -> Report:
    """Of a partition of items: drop those with too few events and rank the others.

    Stages the events with `item_partition` and `item_rank`, and the catalogue of the partition.
    """
    codes, items = dense_codes(events["item"])
    alive = np.bincount(codes, minlength=len(items)) >= job.cleaning.item_core
    rank = np.cumsum(alive) - 1
    keep = alive[codes]
    kept = events.drop_columns([c for c in _RANKS if c in events.column_names])
    kept = kept.filter(pa.array(keep))
    kept = kept.append_column("item_partition", pa.array(np.full(kept.num_rows, partition)))
    kept = kept.append_column("item_rank", pa.array(rank[codes[keep]]))
    write_table(job.staging, staged("by_item", partition), kept)
    catalogue = pa.table({"item": items.filter(pa.array(alive))})
    write_table(job.staging, staged("catalogue", partition), catalogue)
    return {"rows": events.num_rows, "kept": kept.num_rows, "items": int(alive.sum())}


_RANKS = ("item_partition", "item_rank")


def user_step(job: Job, partition: int, events: pa.Table) -> Report:
    """Of a partition of users: drop those with too few events."""
    codes, users = dense_codes(events["user"])
    alive = np.bincount(codes, minlength=len(users)) >= job.cleaning.user_core
    kept = events.filter(pa.array(alive[codes]))
    write_table(job.staging, staged("by_user", partition), kept)
    return {"rows": events.num_rows, "kept": kept.num_rows, "users": int(alive.sum())}


def load_side_table(
    job: Job, files: TableFiles, chunk: Chunk, names: dict[str, str]
) -> Iterator[pa.Table]:
    """Rows of a table beside the log, as strings under the names `names` gives their columns.

    The first of `names` is the key; its partition says where a row belongs.
    """
    key = next(iter(names))
    for raw in read_chunk(files, chunk):
        with readable(files, chunk):
            columns = {name: as_category(raw.table[source]) for name, source in names.items()}
        texts = pa.table(columns)
        rows = _placed(texts, chunk, raw).filter(pc.is_valid(texts[key]))
        partition = partition_of(rows[key], job.partitions)
        yield rows.append_column(PARTITION, pa.array(partition))


def side_step(job: Job, name: str, key: str, partition: int, rows: pa.Table) -> Report:
    """Stage the rows of a side table; of several with one key the first in the files counts."""
    codes, _ = dense_codes(rows[key])
    order = np.lexsort([rows["place"].to_numpy(), codes])
    first = np.ones(len(order), bool)
    first[1:] = codes[order][1:] != codes[order][:-1]
    kept = rows.take(pa.array(order[first])).drop_columns(["place"])
    write_table(job.staging, staged(name, partition), kept)
    return {"rows": rows.num_rows}
