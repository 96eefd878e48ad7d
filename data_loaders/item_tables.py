"""Tables keyed by raw item id (texts, vectors), brought to the parts of a data set's items.

Two exchanges: by hash of the raw id, where rows meet the items they name, and by items part. What
is staged for a part are the ids that have a value, with the value: text, or float32 bytes.

Shape legend: n rows, D width of a vector.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs import storage
from configs.tokenize import ItemTable, VectorEmbedding
from data_loaders.events import as_text
from data_loaders.exchange import PARTITION, Progress, Report, exchange
from data_loaders.items import ItemPart
from data_loaders.shards import partition_of, read_table, staged, write_table
from data_loaders.sources import Chunk, TableFiles, places, plan, read_chunk, readable

NPY_ROWS = 1 << 16
"""Rows of a .npy matrix that one task reads."""
FLOAT_BYTES = 4


class KeyedTable(Protocol):
    """Rows with a raw item id each; travels to tasks."""

    @property
    def num_chunks(self) -> int:
        """What tasks read one by one."""

    def read(self, chunk: int) -> Iterator[pa.Table]:
        """Columns `key` string, `place` int64 (of several rows of a key the first counts) and
        `value`: large_string, or large_binary with the float32 numbers of a vector."""


@dataclass(frozen=True)
class TextTable:
    """Texts of items: several columns joined by ", "."""

    files: TableFiles
    chunks: tuple[Chunk, ...]
    item: str
    columns: tuple[str, ...]

    @classmethod
    def open(cls, table: ItemTable, columns: tuple[str, ...], place: str) -> "TextTable":
        """Look at the files; `place` is the embedding's key in the recipe, for messages.

        Raises:
            ValueError: a file or a column is missing.
        """
        keys = {f"{place}.columns.{index}": column for index, column in enumerate(columns)}
        files = TableFiles(
            url=table.url,
            format=table.format,
            columns={f"{place}.table.item": table.item, **keys},
            place=f"{place}.table.url",
            separator=table.separator,
            quoted_newlines=table.quoted_newlines,
            lists=True,
        )
        return cls(files, tuple(plan(files)), table.item, columns)

    @property
    def num_chunks(self) -> int:
        return len(self.chunks)

    def read(self, chunk: int) -> Iterator[pa.Table]:
        for raw in read_chunk(self.files, self.chunks[chunk]):
            with readable(self.files, self.chunks[chunk]):
                place = places(self.chunks[chunk], raw)
                text = _row_texts([raw.table[column] for column in self.columns])
                yield _keyed(as_text(raw.table[self.item]), place, text)


@dataclass(frozen=True)
class VectorTable:
    """Vectors of items in Parquet."""

    files: TableFiles
    chunks: tuple[Chunk, ...]
    item: str
    vector: str

    @classmethod
    def open(cls, embedding: VectorEmbedding, place: str) -> "VectorTable":
        """As `TextTable.open`."""
        columns = {f"{place}.item": embedding.item, f"{place}.vector": embedding.vector}
        files = TableFiles(embedding.url, "parquet", columns, f"{place}.url", lists=True)
        return cls(files, tuple(plan(files)), embedding.item, embedding.vector)

    @property
    def num_chunks(self) -> int:
        return len(self.chunks)

    def read(self, chunk: int) -> Iterator[pa.Table]:
        for raw in read_chunk(self.files, self.chunks[chunk]):
            place = places(self.chunks[chunk], raw)
            lists, key = raw.table[self.vector].combine_chunks(), as_text(raw.table[self.item])
            if lists.null_count:
                there = lists.is_valid()
                lists, key = lists.filter(there), key.filter(there)
                place = place[there.to_numpy(zero_copy_only=False)]
            if len(lists):
                where = f"{self.files.place} {self.chunks[chunk].url}, column {self.vector!r}"
                yield _keyed_vectors(key, place, self._matrix(lists, where), where)

    def _matrix(self, lists: pa.Array, where: str) -> np.ndarray:
        kind = lists.type
        if not hasattr(kind, "value_type") or not _is_number(kind.value_type):
            raise ValueError(f"{where} has type {kind}; give lists of numbers")
        widths = pc.unique(pc.list_value_length(lists)).to_pylist()
        if len(widths) != 1 or not widths[0] or lists.flatten().null_count:
            raise ValueError(
                f"{where} holds vectors of widths {sorted(widths)}, or numbers are missing; give "
                "every item equally many numbers, or no row"
            )
        return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), widths[0])


@dataclass(frozen=True)
class NpyTable:
    """A matrix file whose row k belongs to the raw item id str(k + first_id)."""

    url: str
    first_id: int
    rows: int
    width: int
    dtype: str
    data_offset: int

    @classmethod
    def open(cls, embedding: VectorEmbedding, place: str) -> "NpyTable":
        """Read the header.

        Raises:
            ValueError: no file is there, or it is no matrix of numbers in row order.
        """
        try:
            with storage.open_to_read(embedding.url) as stream:
                version = np.lib.format.read_magic(stream)
                read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                    version, np.lib.format.read_array_header_2_0
                )
                shape, by_column, dtype = read(stream)
                offset = stream.tell()
        except FileNotFoundError as error:
            raise ValueError(f"{place}.url={embedding.url!r} names no file") from error
        except ValueError as error:
            raise ValueError(
                f"{place}.url={embedding.url!r} is no .npy file ({error}); write it with numpy.save"
            ) from error
        if len(shape) != 2 or by_column or dtype.kind not in "fiu" or not shape[1]:
            raise ValueError(
                f"{place}.url={embedding.url!r} holds {dtype} of shape {shape}; give a matrix of "
                "numbers in row order, a row an item"
            )
        return cls(embedding.url, embedding.first_id, *shape, dtype.str, offset)

    @property
    def num_chunks(self) -> int:
        return -(-self.rows // NPY_ROWS)

    def read(self, chunk: int) -> Iterator[pa.Table]:
        first = chunk * NPY_ROWS
        last = min(first + NPY_ROWS, self.rows)
        dtype = np.dtype(self.dtype)
        row_bytes = self.width * dtype.itemsize
        with storage.open_to_read(self.url) as stream:
            stream.seek(self.data_offset + first * row_bytes)
            data = stream.read((last - first) * row_bytes)
        if len(data) != (last - first) * row_bytes:
            raise ValueError(f"{self.url} ends before its row {last}; copy it again")
        place = np.arange(first, last)
        matrix = np.frombuffer(data, dtype).reshape(-1, self.width)
        key = as_text(pa.chunked_array([place + self.first_id]))
        yield _keyed_vectors(key, place, matrix, self.url)


def vector_table(embedding: VectorEmbedding, place: str) -> VectorTable | NpyTable:
    """The vectors that an embedding names. Raises ValueError where they cannot be read."""
    opener = NpyTable if embedding.format == "npy" else VectorTable
    return opener.open(embedding, place)


def stage_by_part(
    name: str,
    table: KeyedTable,
    parts: Sequence[ItemPart],
    staging_url: str,
    progress: Progress,
    unmatched: str | None = None,
) -> list[Report]:
    """Stage the values of each items part; reports with `rows` and the `sizes` of values in bytes.

    The staged part `name` of part p (see `staged_values`) holds `item_id` and `value`, by id.

    Args:
        unmatched: name under which rows that no item has are staged (`key`, `value`), by hash.
    """
    work = [(True, index) for index in range(len(parts))]
    work += [(False, chunk) for chunk in range(table.num_chunks)]
    joined = f"{name}-joined"
    met = exchange(
        f"join {name}",
        progress,
        work,
        functools.partial(_load_side, table, parts, len(parts)),
        functools.partial(_join_step, staging_url, joined, unmatched),
        len(parts),
    )
    urls = [storage.join(staging_url, staged(joined, r[PARTITION])) for r in met if r["rows"]]
    starts = np.array([part.first_id for part in parts])
    load = functools.partial(_load_joined, starts)
    step = functools.partial(_sort_step, staging_url, name)
    reports = exchange(f"sort {name}", progress, urls, load, step, len(parts))
    storage.remove(storage.join(staging_url, joined))
    return reports


def staged_values(staging_url: str, name: str, part: int) -> pa.Table | None:
    """`item_id` and `value` of a part, by id; None where no item has a value."""
    url = storage.join(staging_url, staged(name, part))
    return read_table(url) if storage.exists(url) else None


def matrix_of(values: pa.ChunkedArray) -> np.ndarray:
    """float32 [n, D] of staged vectors, n ≥ 1."""
    column = values.combine_chunks()
    offsets = np.frombuffer(column.buffers()[1], np.int64, len(column) + 1, column.offset * 8)
    width = int(offsets[1] - offsets[0]) // FLOAT_BYTES
    count = len(column) * width
    flat = np.frombuffer(column.buffers()[2], np.float32, count, int(offsets[0]))
    return flat.reshape(len(column), width)


def _keyed_vectors(
    key: pa.ChunkedArray, place: np.ndarray, matrix: np.ndarray, where: str
) -> pa.Table:
    """As `_keyed`, of vectors; a zero vector says nothing, so that its item has none.

    Raises:
        ValueError: numbers that are not finite in float32; names the item.
    """
    with np.errstate(over="ignore"):
        vectors = matrix.astype(np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{where}: the vector of item {key[int(finite.argmin())].as_py()!r} has numbers that "
            "are not finite in float32; mend it, or leave it out (max_missing)"
        )
    told = vectors.any(axis=1)
    return _keyed(key.filter(pa.array(told)), place[told], bytes_of(vectors[told]))


def _keyed(key: pa.ChunkedArray, place: np.ndarray, value: pa.Array) -> pa.Table:
    count = len(place)
    rows = pa.table(
        {
            "key": key,
            "place": pa.array(place.astype(np.int64)),
            "item_id": pa.nulls(count, pa.int64()),
            "value": value,
        }
    )
    return rows.filter(pc.and_(pc.is_valid(rows["key"]), pc.is_valid(rows["value"])))


def _load_side(
    table: KeyedTable, parts: Sequence[ItemPart], partitions: int, source: tuple[bool, int]
) -> Iterator[pa.Table]:
    """Items of a part, or rows of a chunk of the table, with the partition of their raw id."""
    is_items, index = source
    for rows in _items(parts[index]) if is_items else table.read(index):
        partition = partition_of(rows["key"], partitions)
        # One type on both sides: an item's row has no value, which is neither text nor vector.
        values = pc.cast(rows["value"], pa.large_binary())
        rows = rows.set_column(rows.schema.get_field_index("value"), "value", values)
        yield rows.append_column(PARTITION, pa.array(partition))


def _items(part: ItemPart) -> Iterator[pa.Table]:
    if not part.rows:
        return
    ids = np.arange(part.first_id, part.first_id + part.rows)
    columns = {
        "key": part.column("item"),
        "place": pa.nulls(part.rows, pa.int64()),
        "item_id": pa.array(ids),
        "value": pa.nulls(part.rows, pa.large_binary()),
    }
    yield pa.table(columns)


def _join_step(
    staging_url: str, name: str, unmatched: str | None, partition: int, rows: pa.Table
) -> Report:
    """Of a partition of raw ids: the items that the table knows, with their first value."""
    is_item = pc.is_valid(rows["item_id"])
    items, values = rows.filter(is_item), rows.filter(pc.invert(is_item)).sort_by("place")
    first = pc.index_in(items["key"], value_set=values["key"].combine_chunks())
    known = items.select(["item_id"]).append_column("value", values["value"].take(first))
    known = known.filter(pc.is_valid(known["value"]))
    if unmatched is not None:
        strange = pc.invert(pc.is_in(values["key"], value_set=items["key"].combine_chunks()))
        rest = values.filter(strange).select(["key", "value"])
        write_table(staging_url, staged(unmatched, partition), rest)
    if known.num_rows:
        write_table(staging_url, staged(name, partition), known)
    return {"rows": known.num_rows}


def _load_joined(starts: np.ndarray, url: str) -> Iterator[pa.Table]:
    rows = read_table(url)
    # The last part that begins at or before the id: empty parts begin where the next one does.
    partition = np.searchsorted(starts, rows["item_id"].to_numpy(), side="right") - 1
    yield rows.append_column(PARTITION, pa.array(partition))


def _sort_step(staging_url: str, name: str, partition: int, rows: pa.Table) -> Report:
    ordered = rows.sort_by("item_id").select(["item_id", "value"])
    write_table(staging_url, staged(name, partition), ordered)
    sizes = pc.unique(pc.binary_length(ordered["value"])).to_pylist()
    return {"rows": ordered.num_rows, "sizes": sizes[:2]}


def _row_texts(columns: Sequence[pa.ChunkedArray]) -> pa.Array:
    """What the columns say of each row, joined by ", ": large_string [n], null where nothing."""
    texts = [_text(column.combine_chunks()) for column in columns]
    rows = len(texts[0])
    by_row = np.arange(rows * len(texts)).reshape(len(texts), rows).T.reshape(-1)
    values = pa.concat_arrays(texts).take(pa.array(by_row))
    return _joined(values, np.repeat(np.arange(rows), len(texts)), rows)


def _text(column: pa.Array, joint: str = ", ") -> pa.Array:
    """A column as large_string; a list becomes one text, and lists in it are paths: `a > b`."""
    kind = column.type
    if not hasattr(kind, "value_type") or pa.types.is_dictionary(kind):
        return pc.cast(as_text(pa.chunked_array([column])).combine_chunks(), pa.large_string())
    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    row = np.repeat(np.arange(len(column)), lengths)
    return _joined(_text(column.flatten(), " > "), row, len(column), joint)


def _joined(values: pa.Array, row: np.ndarray, rows: int, joint: str = ", ") -> pa.Array:
    """Join the values of each row (int64, ascending), empty ones left out."""
    says = pc.fill_null(pc.not_equal(values, ""), False)
    lengths = np.bincount(row[says.to_numpy(zero_copy_only=False)], minlength=rows)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    lists = pa.ListArray.from_arrays(offsets, values.filter(says))
    text = pc.binary_join(lists, pa.scalar(joint, pa.large_string()))
    return pc.if_else(pa.array(lengths > 0), text, pa.scalar(None, pa.large_string()))


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def bytes_of(matrix: np.ndarray) -> pa.Array:
    """large_binary [n] of a matrix [n, D]: the float32 bytes of each row."""
    rows = np.ascontiguousarray(matrix, np.float32)
    count, width = rows.shape
    offsets = np.arange(count + 1, dtype=np.int64) * (width * FLOAT_BYTES)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(rows)]
    )
