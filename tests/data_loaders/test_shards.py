"""Parts on storage, partitions and dense codes."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import storage
from configs.storage_faults import StorageError
from data_loaders.manifest import verify_shard
from data_loaders.shards import dense_codes, lookup, partition_of, read_table, write_table

TEXTS = st.lists(st.text(max_size=5), max_size=30)


def _chunked(values: list[str | None], cut: int = 0) -> pa.ChunkedArray:
    return pa.chunked_array(
        [pa.array(values[:cut], pa.string()), pa.array(values[cut:], pa.string())]
    )


def test_written_parts_verify_and_are_reproducible(tmp_path: Path) -> None:
    table = pa.table({"a": list(range(10)), "b": list("abcdefghij")})
    first = write_table(str(tmp_path), "x/part.parquet", table, rows_per_group=4)
    again = write_table(str(tmp_path), "y/part.parquet", table, rows_per_group=4)
    assert first.sha256 == again.sha256 and first.rows == 10
    verify_shard(str(tmp_path), first)
    assert read_table(storage.join(str(tmp_path), first.path)) == table
    assert read_table(storage.join(str(tmp_path), first.path), ["b"]).column_names == ["b"]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["part.parquet"]
    with pytest.raises(ValueError, match="leaves"):
        write_table(str(tmp_path), "../part.parquet", table)


def test_partition_of_a_key_never_changes() -> None:
    # Written down: another hash would silently move every user and item of prepared data sets.
    keys = [f"user-{number}" for number in range(8)]
    assert partition_of(_chunked(keys), 16).tolist() == PARTITIONS_OF_16


PARTITIONS_OF_16 = [13, 2, 8, 14, 1, 7, 9, 0]


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.integers(1, 9), st.integers(0, 30))
def test_partition_depends_on_the_key_alone(texts: list[str], partitions: int, cut: int) -> None:
    together = partition_of(_chunked(list(texts), cut), partitions)
    assert together.dtype == np.int64
    assert all(0 <= p < partitions for p in together)
    for text, partition in zip(texts, together, strict=True):
        assert partition_of(_chunked([text]), partitions)[0] == partition


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.integers(0, 30))
def test_dense_codes_rank_the_distinct_strings(texts: list[str], cut: int) -> None:
    codes, distinct = dense_codes(_chunked(list(texts), cut))
    assert distinct.to_pylist() == sorted(set(texts))
    assert [distinct[int(code)].as_py() for code in codes] == texts


def test_lookup_gives_zero_for_null_and_unknown() -> None:
    vocabulary = _chunked(["a", "b"])
    assert lookup(_chunked(["b", None, "z", "a"], 2), vocabulary).tolist() == [2, 0, 0, 1]


def test_a_full_disk_is_told_with_its_place_and_mend(small_disk: Path) -> None:
    table = pa.table({"a": np.random.default_rng(0).integers(0, 1 << 60, 1 << 18)})
    with pytest.raises(StorageError, match=r"part\.parquet cannot be written .No space.* `output`"):
        write_table(str(small_disk), "part.parquet", table)
    assert list(small_disk.iterdir()) == []
