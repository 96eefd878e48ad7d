"""Logs as they lie on storage: which files, in which chunks, and their columns as read.

CSV, TSV, JSON lines and Parquet on any fsspec URL; a directory or a glob names many files.
`plan` looks at headers only, on the driver; `read_chunk` streams rows inside a task.
"""

import difflib
import functools
import io
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from lzma import LZMAError
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.compression import compr
from fsspec.core import get_compression
from fsspec.implementations.memory import MemoryFileSystem

from configs import storage
from configs.data import Source
from configs.storage_faults import StorageError, patiently
from data_loaders import delimited, jsonl
from data_loaders.matching import matching_files

HEAD_BYTES = 1 << 20
BLOCK_BYTES = 8 << 20
CHUNK_ROWS = 1 << 20
"""Rows of Parquet that one task reads, in whole row groups."""
BATCH_ROWS = 1 << 18
FILE_SHIFT = 40
"""A row's place in the log is its file's index times 2**40 plus its row there."""
Format = Literal["csv", "jsonl", "parquet"]


@dataclass(frozen=True)
class TableFiles:
    """A table on storage and the columns wanted of it."""

    url: str
    format: Format
    columns: Mapping[str, str]
    """Recipe key → column, e.g. `data.source.columns.user` → `userId`; named in errors."""
    place: str
    """Recipe key of `url`."""
    separator: str = ","
    header: tuple[str, ...] | None = None
    quoted_newlines: bool = False
    """Whether quoted values of CSV may hold line ends."""
    lists: bool = False
    """Whether columns of Parquet may hold lists."""

    @property
    def names(self) -> list[str]:
        """The wanted columns, each once."""
        return list(dict.fromkeys(self.columns.values()))


@dataclass(frozen=True)
class Chunk:
    """What one task reads: a file, or some row groups of it."""

    url: str
    name: str
    """Path below the table's URL, for messages and the quarantine."""
    file: int
    """Index of the file in name order; orders events of equal time."""
    row_groups: tuple[int, ...] = ()
    first_row: int = 0
    content: bytes | None = None
    """The file itself, where it lives in this process's memory only."""


@dataclass(frozen=True)
class RawRows:
    """Rows as read; `table` has the wanted columns."""

    table: pa.Table
    first_row: int
    malformed: Mapping[int, str] = field(default_factory=dict)
    """Unreadable lines by their place after `first_row`, where `table` has no row."""


def source_signature(source: Source, raw_url: str) -> list[Any]:
    """JSON-able facts that change when the source's files do: name, size and version of each.

    The log's, and those of the tables beside it. A public set is known by its name: it does not
    change.
    """
    if source.kind == "public":
        return [source.name]
    beside = {"user_table": source.user_table, "item_text": source.item_text}
    return files_signature(raw_url, "data.source.url") + [
        [name, files_signature(table.url, f"data.source.{name}.url")]
        for name, table in beside.items()
        if table is not None
    ]


def files_signature(url: str, place: str) -> list[Any]:
    """JSON-able: name, size and version of each file of `url`, which `place` of the recipe names.

    Raises:
        ValueError: there is no file.
    """
    signature = []
    for fs, path, name in matching_files(url, place):
        info = patiently(functools.partial(fs.info, path))
        version = next(
            (info[k] for k in ("ETag", "etag", "md5", "mtime", "created") if k in info), ""
        )
        signature.append([name, info.get("size"), str(version)])
    return signature


def plan(files: TableFiles) -> list[Chunk]:
    """Chunks of a table in file order; every file's columns have been checked.

    Raises:
        ValueError: no file is there, or one lacks a wanted column.
    """
    found = matching_files(files.url, files.place)
    with ThreadPoolExecutor(16) as pool:
        planned = pool.map(
            lambda entry: _plan_file(files, entry[0], *entry[1]), list(enumerate(found))
        )
        return [chunk for chunks in planned for chunk in chunks]


def read_chunk(files: TableFiles, chunk: Chunk) -> Iterator[RawRows]:
    """Rows of a chunk in file order.

    Raises:
        ValueError: the file is not what its format says.
    """
    with readable(files, chunk), _open(chunk, compressed=files.format != "parquet") as stream:
        match files.format:
            case "parquet":
                yield from _read_parquet(files, chunk, stream)
            case "csv":
                read = _read_quoted_csv if files.quoted_newlines else _read_csv
                yield from read(files, stream)
            case "jsonl":
                yield from _read_jsonl(files, stream)


@contextmanager
def readable(files: TableFiles, chunk: Chunk) -> Iterator[None]:
    """Turns what a bad file raises into a plain ValueError of one sentence with its name."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise ValueError(
            f"{chunk.url} is not to be seen on {socket.gethostname()}; put the files of "
            f"{files.place} on storage that all nodes see"
        ) from error
    except (pa.ArrowException, UnicodeError, EOFError, OSError, zlib.error, LZMAError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{chunk.url} cannot be read as {files.format} ({detail}); mend the file or leave "
            f"it out of {files.place}"
        ) from error


def missing_column(files: TableFiles, url: str, place: str, column: str, has: Sequence[str]) -> str:
    """Sentence about a wanted column that a file lacks."""
    near = difflib.get_close_matches(column, has, n=1, cutoff=0.5) or [
        name for name in has if name.lower() == column.lower()
    ]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if files.format == "csv" and files.header is None:
        if len(has) == 1 and len(has[0]) > 20:
            hint += f"; is {files.separator!r} the right separator?"
        elif any(name.replace(".", "", 1).isdigit() for name in has):
            hint += "; if the file has no header line, name its columns in data.source.header"
    return f"{place}={column!r} is not a column of {url}, which has {list(has)}{hint}"


def _plan_file(files: TableFiles, file: int, fs: Any, path: str, name: str) -> list[Chunk]:
    url = fs.unstrip_protocol(path).removeprefix("file://")
    content = fs.cat_file(path) if isinstance(fs, MemoryFileSystem) else None
    whole = Chunk(url=url, name=name, file=file, content=content)
    if not patiently(lambda: fs.size(path)):
        return []
    if files.format == "parquet":
        return _plan_parquet(files, whole)
    with readable(files, whole), _open(whole, compressed=True) as stream:
        head = stream.read(HEAD_BYTES)
    if not head.strip():
        return []
    if files.format == "csv":
        _check_header(files, url, head)
    else:
        _check_columns(files, url, jsonl.keys(head, complete=len(head) < HEAD_BYTES))
    return [whole]


def _check_header(files: TableFiles, url: str, head: bytes) -> None:
    fields = delimited.header_names(head.splitlines()[0], files.separator)
    if not any(field.strip() for field in fields):
        raise ValueError(
            f"{url} begins with a line that names no column; remove what stands before the header "
            f"line, or leave the file out of {files.place}"
        )
    if files.header is None:
        _check_columns(files, url, fields)
    elif len(fields) != len(files.header):
        raise ValueError(
            f"data.source.header names {len(files.header)} columns, but {url} has {len(fields)} "
            f"when split at {files.separator!r}: {fields}"
        )
    else:
        _check_columns(files, "data.source.header", files.header)


def _check_columns(files: TableFiles, url: str, has: Sequence[str]) -> None:
    if not has:
        what = "no JSON object with keys in its first lines" if files.format == "jsonl" else "none"
        raise ValueError(
            f"{url} shows no columns ({what}); is it {files.format}? Mend the file or leave it out "
            f"of {files.place}"
        )
    for place, column in files.columns.items():
        if column not in has:
            raise ValueError(missing_column(files, url, place, column, has))


def _check_types(files: TableFiles, url: str, schema: pa.Schema) -> None:
    for place, column in files.columns.items():
        kind = schema.field(column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        while files.lists and any(is_list(value) for is_list in _LISTS):
            value = value.value_type
        dated = pa.types.is_date(value) or pa.types.is_timestamp(value)
        if not (dated or any(is_kind(value) for is_kind in _PLAIN)):
            raise ValueError(
                f"{place}={column!r} has type {kind} in {url}; map a column of plain values: "
                "text, numbers, dates or timestamps"
            )
        if dated and place in _NUMERIC:
            raise ValueError(f"{place}={column!r} has type {kind} in {url}; map a numeric column")


_NUMERIC = ("data.source.columns.rating", "data.source.columns.order")
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_PLAIN = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_boolean,
    pa.types.is_null,
)


def _plan_parquet(files: TableFiles, whole: Chunk) -> list[Chunk]:
    with readable(files, whole), _open(whole, compressed=False) as stream:
        parquet = pq.ParquetFile(stream)
        _check_columns(files, whole.url, parquet.schema_arrow.names)
        _check_types(files, whole.url, parquet.schema_arrow)
        metadata = parquet.metadata
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    chunks, groups, rows, first = [], [], 0, 0
    for group, size in enumerate(sizes):
        groups.append(group)
        rows += size
        if rows >= CHUNK_ROWS or group == len(sizes) - 1:
            chunk = Chunk(whole.url, whole.name, whole.file, tuple(groups), first, whole.content)
            chunks += [chunk] if rows else []
            groups, first, rows = [], first + rows, 0
    return chunks


def _open(chunk: Chunk, compressed: bool) -> IO[bytes]:
    if chunk.content is not None:
        return io.BytesIO(chunk.content)
    stream = storage.open_to_read(chunk.url)
    kind = get_compression(chunk.url, "infer") if compressed else None
    return stream if kind is None else compr[kind](stream, mode="r")


def _read_parquet(files: TableFiles, chunk: Chunk, stream: IO[bytes]) -> Iterator[RawRows]:
    row = chunk.first_row
    batches = pq.ParquetFile(stream).iter_batches(
        BATCH_ROWS, row_groups=list(chunk.row_groups), columns=files.names, use_threads=False
    )
    for batch in batches:
        for place, column in files.columns.items():
            _check_text(batch.column(column), f"{place}={column!r} of {chunk.url}")
        yield RawRows(pa.Table.from_batches([batch]).select(files.names), row)
        row += batch.num_rows


def _check_text(values: pa.Array, where: str) -> None:
    """Parquet files are believed that their text is UTF-8; later steps fall over other text."""
    try:
        values.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{where} cannot be read ({str(error).splitlines()[0]}); write the file again with "
            "text in UTF-8"
        ) from error


def _read_csv(files: TableFiles, stream: IO[bytes]) -> Iterator[RawRows]:
    row, header = 0, files.header
    for number, block in enumerate(_line_blocks(stream)):
        data = block.removeprefix(delimited.BOM) if number == 0 else block
        if header is None:
            first = data.splitlines(keepends=True)[0]
            header = tuple(delimited.header_names(first, files.separator))
            data = data[len(first) :]
        table, malformed = delimited.parse(data, header, files.names, files.separator)
        yield RawRows(table, row, malformed)
        row += table.num_rows + len(malformed)


def _read_quoted_csv(files: TableFiles, stream: IO[bytes]) -> Iterator[RawRows]:
    found: dict[int, str] = {}
    reader = delimited.stream(
        stream, files.header, files.names, files.separator, BLOCK_BYTES, found
    )
    row = 0
    for batch in reader:
        end, malformed = row + batch.num_rows, {}
        for place in sorted(found):
            if place >= end:
                break
            malformed[place - row] = found.pop(place)
            end += 1
        yield RawRows(pa.Table.from_batches([batch]), row, malformed)
        row = end
    if found:
        empty = pa.table({name: pa.array([], pa.string()) for name in files.names})
        yield RawRows(empty, row, {place - row: line for place, line in found.items()})


def _read_jsonl(files: TableFiles, stream: IO[bytes]) -> Iterator[RawRows]:
    row = 0
    for block in _line_blocks(stream):
        table, malformed = jsonl.parse(block, files.names)
        yield RawRows(table, row, malformed)
        row += table.num_rows + len(malformed)


def _line_blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """Blocks of whole lines; a line may be longer than a block."""
    rest = b""
    while True:
        block = stream.read(BLOCK_BYTES)
        data = rest + block
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1 if block else len(data)
        rest = data[end:]
        if data[:end].strip():
            yield data[:end]
        if not block:
            return


def places(chunk: Chunk, rows: RawRows) -> np.ndarray:
    """int64 [n] place of each row in the log; orders rows by file name, then row."""
    every = np.arange(rows.table.num_rows + len(rows.malformed), dtype=np.int64)
    first = (chunk.file << FILE_SHIFT) + rows.first_row
    return first + np.delete(every, np.fromiter(rows.malformed, np.int64))


def source_rows(place: np.ndarray) -> np.ndarray:
    """int64 [n] row in its file of each place, from 0; header and empty lines are not counted."""
    return place & ((1 << FILE_SHIFT) - 1)
