"""Random access to the rows of hashed Parquet shards, by row group and in columns.

Nothing here loops over users or events: the loops run over the row groups that a call touches.

Shape legend: N rows of all shards, n rows of a call, T events of a call.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs import storage
from configs.storage_faults import first_line
from data_loaders.manifest import (
    MEND,
    DatasetManifest,
    FileEntry,
    read_manifest,
    verify_shard,
)
from data_loaders.poison import Unit, check_values
from data_loaders.sampler import expand_ranges
from data_loaders.shards import DAMAGE, open_plain

OPEN_FILES = 32
"""Shards whose footers are kept parsed."""

Columns = Mapping[str, type[np.generic]]
_FLOATS = ("ratings", "dwell_times", "durations")


@dataclass(frozen=True)
class Slices:
    """A stretch of events of each of n rows, laid end to end."""

    sample_ids: np.ndarray
    """int64 [n]."""
    offsets: np.ndarray
    """int64 [n+1]; row i owns events offsets[i]:offsets[i+1]."""
    rows: dict[str, np.ndarray]
    """Columns of one value a row, [n]."""
    events: dict[str, np.ndarray]
    """Columns of one value an event, [T]."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class SequenceLengths:
    """Where the sequences of n users end, each int64 [n] (see the manifest's split)."""

    total: np.ndarray
    train_end: np.ndarray
    validation_end: np.ndarray


@dataclass(frozen=True)
class _RowGroup:
    offsets: np.ndarray
    scalars: dict[str, np.ndarray]
    events: dict[str, np.ndarray]


class ShardReader:
    """Rows of shards by their position 0 … N-1 in the shards' order.

    Args:
        url: directory that the shards' paths are relative to.
        shards: the files, with their hashes.
        row_groups: rows of each row group of each shard.
        scalars: columns of one value a row, and their types; `length` counts the row's events.
        events: columns of one list a row, and the types of the elements.
        labels: string columns, which are read only when asked for by name.
        cached_row_groups: row groups kept decoded; the least recently used goes first.
        verify: hash a shard when this process first reads events from it. Scalars alone are read
            without (pages carry checksums, and none but plain types are opened): a rank looks up
            lengths in shards whose events only other ranks read, and those ranks verify them.
        mend: what writes damaged shards anew, for messages.
        limits: largest value of integer columns, where it is known; none may be negative, and no
            float infinite.
        unit: what a row is.
    """

    def __init__(
        self,
        url: str,
        shards: Sequence[FileEntry],
        row_groups: Sequence[Sequence[int]],
        *,
        scalars: Columns,
        events: Columns,
        labels: Sequence[str] = (),
        cached_row_groups: int,
        verify: bool = True,
        mend: str = MEND,
        limits: Mapping[str, int] | None = None,
        unit: Unit = "user",
    ) -> None:
        self._limits = limits or {}
        self.unit = unit
        self._url, self._shards, self._mend = url, shards, mend
        self._scalar_types, self._event_types = scalars, events
        self._value_types = {**scalars, **dict.fromkeys(labels, np.object_)}
        self.cached_row_groups = cached_row_groups
        self.row_group_sizes = np.array([n for rows in row_groups for n in rows], dtype=np.int64)
        """int64 [G], rows of every row group in order."""
        self.num_rows = int(self.row_group_sizes.sum())
        self._ends = np.cumsum(self.row_group_sizes)
        self._places = [(s, i) for s, rows in enumerate(row_groups) for i in range(len(rows))]
        self._unverified = set(range(len(shards))) if verify else set()
        # Training's prefetch thread and its main thread may both read; open files are not shared.
        self._lock = threading.Lock()
        self._file = lru_cache(maxsize=OPEN_FILES)(self._open)
        self._group = lru_cache(maxsize=cached_row_groups)(self._read_group)
        # A few numbers a row instead of hundreds: worth keeping for more groups.
        self._scalars = lru_cache(maxsize=16 * cached_row_groups)(self._read_scalars)

    def values(
        self, sample_ids: np.ndarray, names: Sequence[str], *, verify: bool = False
    ) -> dict[str, np.ndarray]:
        """Scalars or labels of rows, each [n], without reading their events.

        Ids in any order are right; ascending ones visit each row group once. Shards are hashed
        first only with `verify`.
        """
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for number, local, _ in self._split(sample_ids):
            group = self._scalars(number, tuple(names), verify)
            for name in names:
                parts[name].append(group[name][local])
        return _joined(parts, self._value_types)

    def slices(
        self,
        sample_ids: np.ndarray,
        begin: np.ndarray,
        end: np.ndarray,
        event_names: Sequence[str] | None = None,
    ) -> Slices:
        """Events begin[i] … end[i]-1 of each row; of all or the named columns.

        Ids in any order are right; ascending ones visit each row group once.

        Raises:
            ValueError: a shard is missing or damaged.
            PoisonedSampleError: a row has values that its column cannot have.
        """
        names = tuple(self._event_types) if event_names is None else tuple(event_names)
        rows: dict[str, list[np.ndarray]] = {name: [] for name in self._scalar_types}
        events: dict[str, list[np.ndarray]] = {name: [] for name in names}
        lengths = end - begin
        for number, local, members in self._split(sample_ids):
            group = self._group(number)
            picked = expand_ranges(group.offsets[local] + begin[members], lengths[members])
            for name, parts in rows.items():
                parts.append(group.scalars[name][local])
            for name, parts in events.items():
                parts.append(group.events[name][picked])
        slices = Slices(
            sample_ids=sample_ids,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            rows=_joined(rows, self._scalar_types),
            events=_joined(events, self._event_types),
        )
        owners = np.repeat(sample_ids, lengths)
        for values, samples in ((slices.rows, sample_ids), (slices.events, owners)):
            check_values(values, samples, self._limits, self.unit)
        return slices

    def _split(self, sample_ids: np.ndarray) -> list[tuple[int, np.ndarray, slice]]:
        """Number, rows and place in the call of each row group that the call touches."""
        groups = np.searchsorted(self._ends, sample_ids, side="right")
        first = np.flatnonzero(np.diff(groups, prepend=-1))
        last = np.append(first[1:], len(sample_ids))[: len(first)]
        local = sample_ids - (self._ends - self.row_group_sizes)[groups]
        places = [slice(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        return [(g, local[p], p) for g, p in zip(groups[first].tolist(), places, strict=True)]

    def _open(self, shard: int) -> pq.ParquetFile:
        path = storage.inside(self._url, self._shards[shard].path)
        if storage.is_local(path):
            inner = storage.filesystem(path)[1]
            return open_plain(inner, memory_map=True)
        return open_plain(storage.open_to_read(path))

    def _read(self, number: int, names: Sequence[str], verify: bool) -> dict[str, pa.Array]:
        """Columns of a row group."""
        shard, index = self._places[number]
        path = storage.join(self._url, self._shards[shard].path)
        with self._lock:
            if verify and shard in self._unverified:
                verify_shard(self._url, self._shards[shard], self._mend)
                self._unverified.discard(shard)
            try:
                table = self._file(shard).read_row_group(index, columns=list(names))
                columns = {name: table[name].combine_chunks() for name in names}
            except DAMAGE as error:
                raise ValueError(
                    f"{path} is missing or damaged ({first_line(error)}); {self._mend}"
                ) from error
        if any(len(column) != self.row_group_sizes[number] for column in columns.values()):
            raise ValueError(
                f"{path} does not have the row groups that its manifest states; {self._mend}"
            )
        return columns

    def _read_scalars(
        self, number: int, names: tuple[str, ...], verify: bool
    ) -> dict[str, np.ndarray]:
        columns = self._read(number, names, verify)
        return {name: _numpy(columns[name], self._value_types[name]) for name in names}

    def _read_group(self, number: int) -> _RowGroup:
        columns = self._read(number, [*self._scalar_types, *self._event_types], verify=True)
        scalars = {n: _numpy(columns[n], t) for n, t in self._scalar_types.items()}
        lengths = scalars["length"]
        for name in self._event_types:
            if not np.array_equal(pc.list_value_length(columns[name]).to_numpy(), lengths):
                path = storage.join(self._url, self._shards[self._places[number][0]].path)
                raise ValueError(
                    f"{path} has lists in column {name!r} whose lengths differ from its column "
                    f"'length'; {self._mend}"
                )
        return _RowGroup(
            offsets=np.cumsum(lengths) - lengths,
            scalars=scalars,
            events={n: _numpy(columns[n].flatten(), t) for n, t in self._event_types.items()},
        )


def _numpy(column: pa.Array, kind: type[np.generic]) -> np.ndarray:
    assert column.null_count == 0, "prepared columns hold no nulls"
    return column.to_numpy(zero_copy_only=False).astype(kind, copy=False)


def _joined(parts: dict[str, list[np.ndarray]], types: Columns) -> dict[str, np.ndarray]:
    """Concatenation of each column's parts, of the column's type even if there are none."""
    return {
        name: np.concatenate([np.empty(0, types[name]), *list_]) for name, list_ in parts.items()
    }


class SequenceDataset:
    """The user sequences of a prepared data set; sample id = user_id - 1.

    Args:
        url: directory of the manifest.
        cached_row_groups: row groups kept decoded in memory.
        verify: hash each shard when this process first reads events from it.

    Raises:
        ValueError: there is no valid manifest; later, on reading, a shard is missing or damaged.
    """

    def __init__(self, url: str, cached_row_groups: int, verify: bool = True) -> None:
        self.manifest = read_manifest(url)
        scalars = ["user_id", "length", "train_end", "validation_end"]
        scalars += [f"user_{name}" for name in self.manifest.user_features]
        self.reader = ShardReader(
            url,
            self.manifest.shards,
            [shard.row_group_rows for shard in self.manifest.shards],
            scalars=column_types(scalars),
            events=event_columns(self.manifest),
            labels=("user",),
            cached_row_groups=cached_row_groups,
            verify=verify,
            limits=_limits(self.manifest),
        )

    @property
    def num_samples(self) -> int:
        """Number of users."""
        return self.reader.num_rows

    def lengths(self, sample_ids: np.ndarray) -> SequenceLengths:
        """Lengths and split points of users, without reading their events."""
        found = self.reader.values(sample_ids, ("length", "train_end", "validation_end"))
        return SequenceLengths(found["length"], found["train_end"], found["validation_end"])

    def row_groups(self, shard: int) -> Iterator[np.ndarray]:
        """Sample ids of each row group of a shard."""
        entry = self.manifest.shards[shard]
        first = entry.first_user_id - 1
        for rows in entry.row_group_rows:
            yield np.arange(first, first + rows)
            first += rows

    def raw_users(self, sample_ids: np.ndarray) -> list[str]:
        """What the log calls the users."""
        return list(self.reader.values(sample_ids, ("user",))["user"])


def _limits(manifest: DatasetManifest) -> dict[str, int]:
    """Largest id that a column may hold."""
    limits = {"item_ids": manifest.num_items, "user_id": manifest.num_users}
    limits["action_ids"] = manifest.actions
    limits |= {f"user_{name}": count for name, count in manifest.user_features.items()}
    return limits | {f"side_{name}": count for name, count in manifest.side_features.items()}


def event_columns(manifest: DatasetManifest) -> dict[str, type[np.generic]]:
    """The list columns that a prepared data set has, with the types of their elements."""
    names = ["item_ids", "timestamps"]
    names += ["ratings"] * manifest.has_ratings + ["dwell_times"] * manifest.has_dwell_times
    names += ["action_ids"] * (manifest.actions > 0)
    names += ["durations"] * manifest.has_durations
    names += ["labels"] * bool(manifest.labels)
    return column_types([*names, *(f"side_{name}" for name in manifest.side_features)])


def column_types(names: Iterable[str]) -> dict[str, type[np.generic]]:
    """Columns with their types: ratings and lengths of time are float32, else int64."""
    return {name: np.float32 if name in _FLOATS else np.int64 for name in names}
