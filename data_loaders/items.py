"""Names of a prepared data set: titles of items, dense ids of users, kinds of action. Reads only
what is asked for.

Shape legend: V items of the catalogue, n ids that are asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from configs import storage
from configs.data import epoch_seconds
from configs.schema import closest
from data_loaders.manifest import FileEntry, read_manifest
from data_loaders.shards import open_part, partition_of, read_table, verify_once


@dataclass(frozen=True)
class ItemPart:
    """A part of the items table: the items first_id … first_id + rows - 1."""

    url: str
    first_id: int
    rows: int
    sha256: str

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all its rows, in the order of ids; the file is hashed before its first use.

        Raises:
            ValueError: the file is missing or damaged.
        """
        return read_table(self.url, [name], sha256=self.sha256)[name]


def item_parts(dataset_url: str) -> list[ItemPart]:
    """The parts of the items table, in the order of ids; empty ones are among them."""
    parts, first = [], 1
    for entry in read_manifest(dataset_url).items:
        url = storage.inside(dataset_url, entry.path)
        parts.append(ItemPart(url, first, entry.rows, entry.sha256))
        first += entry.rows
    return parts


def titles(dataset_url: str, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Title of each item id in 1…V, or its raw id where it has no title.

    Raises:
        ValueError: an id is not in the catalogue, or a part that holds one is damaged.
    """
    rows = _item_rows(dataset_url, ids, ["item", "title"])
    titled = pc.if_else(pc.equal(rows["title"], ""), rows["item"], rows["title"])
    return list(titled.to_pylist())


def raw_items(dataset_url: str, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The log's own id of each item id in 1…V. Raises ValueError as `titles` does."""
    return list(_item_rows(dataset_url, ids, ["item"])["item"].to_pylist())


def train_counts(dataset_url: str) -> Tensor:
    """int64 [V]: occurrences of items 1…V among all users' train events.

    Raises:
        ValueError: a part of the items table is missing or damaged.
    """
    parts = [part.column("train_count").to_numpy() for part in item_parts(dataset_url)]
    return torch.from_numpy(np.concatenate(parts))


@dataclass(frozen=True)
class ItemFeature:
    """A categorical feature of all items."""

    ids: Tensor
    """[V + 1] int32 category of each item by id; 0 is the unknown one, and that of id 0."""
    names: tuple[str, ...]
    """What categories 1 … C are called."""

    def numbers(self, names: Sequence[str], asked: str) -> list[int]:
        """Categories of these names.

        Raises:
            ValueError: no item has one of them; `asked` says who wants it.
        """
        places = {name: at for at, name in enumerate(self.names, 1)}
        for name in names:
            if name not in places:
                guess = closest(name, places)
                hint = f"; did you mean {guess!r}?" if guess is not None else ""
                raise ValueError(f"{asked}={name!r}, but no item has that category{hint}")
        return [places[name] for name in names]

    def between(
        self, since: str | float | None, before: str | float | None, asked: str
    ) -> list[int]:
        """Categories from `since` on and before `before`, both ISO dates or both numbers.

        Raises:
            ValueError: what a category is called is neither; `asked` says who wants it.
        """
        dates = isinstance(since if since is not None else before, str)
        low = -math.inf if since is None else epoch_seconds(since)
        high = math.inf if before is None else epoch_seconds(before)
        found = []
        for number, name in enumerate(self.names, 1):
            try:
                place = epoch_seconds(name if dates else float(name))
            except ValueError:
                wanted = "an ISO date such as 2026-01-31" if dates else "a number"
                raise ValueError(
                    f"{asked}, but an item has {name!r} there, which is not {wanted}: choose by "
                    "values, or write the column anew"
                ) from None
            if low <= place < high:
                found.append(number)
        return found


def item_feature(dataset_url: str, name: str) -> ItemFeature:
    """A column of the items table.

    Raises:
        ValueError: the data set has no such feature, or a part of the items table is missing or
            damaged.
    """
    known = read_manifest(dataset_url).item_features
    if name not in known:
        raise ValueError(
            f"the prepared data {dataset_url} have no item feature {name!r}, only {sorted(known)}: "
            "name its column in data.source.item_text.features"
        )
    parts = [part.column(f"item_{name}").to_numpy() for part in item_parts(dataset_url)]
    ids = np.concatenate([np.zeros(1, np.int32), *(part.astype(np.int32) for part in parts)])
    return ItemFeature(torch.from_numpy(ids), vocabulary(dataset_url, f"item_{name}"))


def action_names(dataset_url: str) -> tuple[str, ...]:
    """What the kinds of action are called, by id: id 1 comes first. Empty where there are none."""
    return vocabulary(dataset_url, "actions") if read_manifest(dataset_url).actions else ()


def vocabulary(dataset_url: str, name: str) -> tuple[str, ...]:
    """Categories 1, 2, … of a column: `actions`, or one of `user_`, `side_`, `item_<feature>`.

    Raises:
        ValueError: the file is missing or damaged.
    """
    entries = read_manifest(dataset_url).vocabularies
    found = [entry for entry in entries if entry.path.endswith(f"/{name}.parquet")]
    if not found:  # no value was ever read
        return ()
    [entry] = found
    url = storage.inside(dataset_url, entry.path)
    values = read_table(url, ["value"], sha256=entry.sha256)["value"]
    return tuple(str(value) for value in values.to_pylist())


def find_users(dataset_url: str, raw_ids: Sequence[str]) -> np.ndarray:
    """Dense id (1…U) of each raw user id, int64 [n].

    Raises:
        ValueError: a user is not in the data set, or a shard that holds one is damaged.
    """
    manifest = read_manifest(dataset_url)
    found = np.zeros(len(raw_ids), np.int64)
    wanted = pa.array([str(raw) for raw in raw_ids], pa.string())
    if not len(wanted):
        return found
    # `prepare` puts a user into the shard of its hash; other writers need not, so ask all then.
    likely = partition_of(pa.chunked_array([wanted]), len(manifest.shards))
    for shard in np.unique(likely):
        entry = manifest.shards[int(shard)]
        verify_once(storage.inside(dataset_url, entry.path), entry.sha256)
        _find_in_shard(dataset_url, entry, wanted, found)
    for entry in manifest.shards:
        if found.all():
            break
        _find_in_shard(dataset_url, entry, wanted, found)
    if not found.all():
        unknown = [raw for raw, number in zip(raw_ids, found, strict=True) if not number]
        raise ValueError(
            f"users {unknown} are not in the prepared data set {dataset_url}: name users of the "
            "log whose events data.cleaning keeps"
        )
    return found


def _find_in_shard(dataset_url: str, entry: FileEntry, wanted: pa.Array, found: np.ndarray) -> None:
    """Fill in the dense ids of the wanted users [n] that live in this shard."""
    if not entry.rows:
        return
    url = storage.inside(dataset_url, entry.path)
    low, high = pc.min_max(wanted).as_py().values()
    with open_part(url) as parquet:
        column = parquet.schema_arrow.get_field_index("user")
        for group in range(parquet.num_row_groups):
            bounds = parquet.metadata.row_group(group).column(column).statistics
            known = bounds is not None and bounds.has_min_max
            if known and (bounds.max < low or bounds.min > high):
                continue
            rows = parquet.read_row_group(group, columns=["user_id", "user"], use_threads=False)
            row = pc.index_in(wanted, value_set=rows["user"].combine_chunks())
            here = pc.is_valid(row).to_numpy(zero_copy_only=False)
            if here.any():  # what is believed is hashed, what is passed over is not
                verify_once(url, entry.sha256)
            found[here] = rows["user_id"].to_numpy()[row.drop_null().to_numpy()]


def _item_rows(dataset_url: str, ids: Sequence[int] | np.ndarray, columns: list[str]) -> pa.Table:
    """Rows of the items table in the order of `ids` [n]; reads the row groups that hold them."""
    parts = item_parts(dataset_url)
    num_items = sum(part.rows for part in parts)
    asked = np.asarray(ids, np.int64).reshape(-1)
    outside = asked[(asked < 1) | (asked > num_items)]
    if len(outside):
        raise ValueError(f"item id {outside[0]} is not in 1…{num_items}")
    distinct, inverse = np.unique(asked - 1, return_inverse=True)
    first_rows = np.cumsum([0, *(part.rows for part in parts)])
    tables = [pa.table({name: pa.array([], pa.string()) for name in columns})]
    for number, part in enumerate(parts):
        begin, end = np.searchsorted(distinct, first_rows[number : number + 2])
        if begin < end:
            rows = distinct[begin:end] - first_rows[number]
            tables.append(_rows_of_part(part, rows, columns))
    return pa.concat_tables(tables).take(pa.array(inverse))


def _rows_of_part(part: ItemPart, rows: np.ndarray, columns: list[str]) -> pa.Table:
    """The given rows (ascending) of a part."""
    with open_part(part.url, part.sha256) as parquet:
        metadata = parquet.metadata
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        groups = np.unique(np.searchsorted(ends, rows, side="right"))
        table = parquet.read_row_groups(groups.tolist(), columns=columns, use_threads=False)
    starts = np.zeros(len(sizes), np.int64)  # row of the table at which a group begins
    starts[groups] = np.cumsum([0, *(sizes[g] for g in groups[:-1])])
    group = np.searchsorted(ends, rows, side="right")
    within = rows - (ends[group] - np.asarray(sizes)[group])
    return table.take(pa.array(starts[group] + within))
