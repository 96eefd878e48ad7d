"""A data set's items met with an earlier table of semantic ids, by the log's own ids.

Shape legend: n items of a part, L code levels (the extra digit's included).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from configs import storage
from data_loaders.collisions import fixed_rows
from data_loaders.exchange import Progress
from data_loaders.item_tables import stage_by_part, staged_values
from data_loaders.items import ItemPart
from data_loaders.manifest import verify_shard
from data_loaders.semantic_ids import MEND, SemanticIdManifest, codes_of
from data_loaders.shards import read_table, staged, write_table

KNOWN, RETIRED, TAKEN = "known", "retired-codes", "taken"
"""Names of staged tables."""


@dataclass(frozen=True)
class EarlierCodes:
    """An earlier table, its retired items included, as values keyed by raw id."""

    url: str
    manifest: SemanticIdManifest

    @property
    def num_chunks(self) -> int:
        return len(self.manifest.parts) + len(self.manifest.retired)

    def read(self, chunk: int) -> Iterator[pa.Table]:
        """`key`, `place`, `item_id` (null) and `value`: the int32 codes of an item as bytes."""
        entry = (*self.manifest.parts, *self.manifest.retired)[chunk]
        verify_shard(self.url, entry, MEND)
        if not entry.rows:
            return
        rows = read_table(storage.join(self.url, entry.path), ["item", "codes"])
        yield pa.table(
            {
                "key": rows["item"],
                "place": pa.array(np.zeros(len(rows), np.int64)),
                "item_id": pa.nulls(len(rows), pa.int64()),
                "value": _packed(codes_of(rows["codes"])),
            }
        )


def stage_known(
    earlier: EarlierCodes, parts: Sequence[ItemPart], staging_url: str, progress: Progress
) -> int:
    """Stage which items of each part are known, with their codes, and what stays taken.

    Returns:
        How many items are known.
    """
    reports = stage_by_part(KNOWN, earlier, parts, staging_url, progress, unmatched=RETIRED)
    return sum(report["rows"] for report in reports)


def known_codes(staging_url: str, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 [n] of the known items of a part, ascending, and their codes int32 [n, L]."""
    values = staged_values(staging_url, KNOWN, part)
    if values is None:
        return np.zeros(0, np.int64), np.zeros((0, 0), np.int32)
    return values["item_id"].to_numpy(), _unpacked(values["value"])


def stage_taken(staging_url: str, levels: int, partition: int) -> dict[str, int]:
    """Turn the retired rows of a partition into fixed rows without an item."""
    url = storage.join(staging_url, staged(RETIRED, partition))
    rows = read_table(url) if storage.exists(url) else None
    if rows is None or not rows.num_rows:
        return {"rows": 0, "partition": partition}
    none = np.zeros(rows.num_rows, np.int64)
    table = fixed_rows(none, rows["key"], _unpacked(rows["value"]), levels)
    write_table(staging_url, staged(TAKEN, partition), table)
    return {"rows": rows.num_rows, "partition": partition}


def taken_url(staging_url: str, partition: int) -> str:
    """What `stage_taken` wrote."""
    return storage.join(staging_url, staged(TAKEN, partition))


def _packed(codes: np.ndarray) -> pa.Array:
    rows = np.ascontiguousarray(codes, np.int32)
    offsets = np.arange(len(rows) + 1, dtype=np.int64) * (4 * rows.shape[1])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(rows)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(rows), buffers)


def _unpacked(values: pa.ChunkedArray) -> np.ndarray:
    rows = values.to_pylist()
    return np.frombuffer(b"".join(rows), np.int32).reshape(len(rows), -1)
