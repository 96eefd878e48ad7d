"""Parquet parts on any storage: written whole, hashed as written, read by column."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs import storage
from configs.storage_faults import first_line
from data_loaders.manifest import MEND, FileEntry, verify_file

STAGED_GROUP_ROWS = 1 << 18
_VERIFIED_FILES = 1 << 14
DAMAGE = (pa.ArrowException, OSError, KeyError)
"""What reading a part raises where it is not what was written."""
_EXTENSION = b"ARROW:extension:name"


def write_table(
    root: str,
    path: str,
    table: pa.Table,
    *,
    rows_per_group: int = STAGED_GROUP_ROWS,
    codec: str = "zstd",
) -> FileEntry:
    """Write `table` to `path` below `root`; the file appears whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(None),
        sink,
        row_group_size=rows_per_group,
        compression=codec,
        write_page_checksum=True,
    )
    data = sink.getvalue().to_pybytes()
    url = storage.join(root, path)
    storage.make_directory(url.rpartition("/")[0])
    storage.write_bytes(url, data)
    return FileEntry(
        path=path, rows=table.num_rows, bytes=len(data), sha256=storage.sha256_bytes(data)
    )


def read_table(
    url: str, columns: list[str] | None = None, *, sha256: str | None = None
) -> pa.Table:
    """All rows of a part, or of the named columns of it.

    Args:
        sha256: what the manifest says of the file, which is hashed before this process first uses
            it; None for staged parts, which no manifest names.

    Raises:
        ValueError: the file is missing or damaged.
    """
    mend = "run the same command again" if sha256 is None else MEND
    with open_part(url, sha256, mend) as parquet:
        return parquet.read(columns=columns, use_threads=False)


@contextmanager
def open_part(url: str, sha256: str | None = None, mend: str = MEND) -> Iterator[pq.ParquetFile]:
    """A part to read some of, as `read_table` reads all; what damage raises becomes a sentence."""
    if sha256 is not None:
        verify_once(url, sha256)
    try:
        with storage.open_to_read(url) as stream:
            yield open_plain(stream)
    except DAMAGE as error:
        raise ValueError(f"{url} is missing or damaged ({first_line(error)}); {mend}") from error


def open_plain(source: object, *, memory_map: bool = False) -> pq.ParquetFile:
    """A part's reader, of none but the plain types that `write_table` writes.

    The values of an extension type are made by its own code, and Ray's unpickles them: such a
    column is refused before any of it is read, as the file may not be hashed yet.

    Raises:
        pa.ArrowTypeError: a column is of an extension type, or holds one.
    """
    parquet = pq.ParquetFile(source, memory_map=memory_map, page_checksum_verification=True)
    for field in parquet.schema_arrow:
        if _is_extended(field):
            parquet.close(force=True)
            raise pa.ArrowTypeError(f"column {field.name!r} is of an extension type")
    return parquet


def _is_extended(field: pa.Field) -> bool:
    """Whether a field, or one within it, has an extension type, known to this process or not."""
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType) or _EXTENSION in (field.metadata or {}):
        return True
    if pa.types.is_dictionary(kind):
        return isinstance(kind.value_type, pa.BaseExtensionType)
    return any(_is_extended(kind.field(i)) for i in range(kind.num_fields))


@lru_cache(maxsize=_VERIFIED_FILES)
def verify_once(url: str, sha256: str) -> None:
    """Hash a file of a prepared data set, but not again once it was whole.

    Raises:
        ValueError: the file is missing or differs from the manifest.
    """
    verify_file(url, sha256)


def staged(name: str, partition: int) -> str:
    """Path of a partition's part of the staged table `name`."""
    return f"{name}/part-{partition:05d}.parquet"


def partition_of(keys: pa.ChunkedArray, partitions: int) -> np.ndarray:
    """Partition of each string key, int64 [n] in 0…partitions-1; the same on every machine."""
    encoded = pa.chunked_array(keys).combine_chunks().dictionary_encode()
    distinct = np.asarray(encoded.dictionary.to_pylist(), dtype=object)
    if not len(distinct):
        return np.zeros(0, np.int64)
    hashed = pd.util.hash_array(distinct, categorize=False) % np.uint64(partitions)
    return hashed.astype(np.int64)[encoded.indices.to_numpy()]


def dense_codes(values: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Rank of each string among the distinct ones.

    Returns:
        int64 [n] codes in 0…distinct-1, and the distinct strings in byte order.
    """
    encoded = pa.chunked_array(values).combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[encoded.indices.to_numpy()], encoded.dictionary.take(pa.array(order))


def lookup(values: pa.ChunkedArray, vocabulary: pa.ChunkedArray) -> np.ndarray:
    """Dense id of each value, int64 [n] in 1…len(vocabulary); 0 where it is null or unknown."""
    found = pc.index_in(values, value_set=vocabulary).fill_null(-1)
    return found.to_numpy().astype(np.int64) + 1
