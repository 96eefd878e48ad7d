"""Reading by row group equals reading whole files; damage is found and named."""

import importlib
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import storage
from data_loaders.dataset import SequenceDataset
from data_loaders.manifest import read_manifest
from data_loaders.shards import read_table
from data_loaders.synthetic import write_synthetic

USERS = 70


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uneven row groups: shards of 23, 23 and 24 rows in groups of 7, and two empty shards."""
    path = tmp_path_factory.mktemp("dataset")
    write_synthetic(
        str(path),
        USERS,
        40,
        6,
        1,
        num_shards=3,
        rows_per_group=7,
        empty_shards=2,
        actions=True,
        labels=True,
    )
    return path


@pytest.fixture(scope="module")
def users(directory: Path) -> list[dict]:
    files = sorted((directory / "sequences").iterdir())
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@given(
    picked=st.lists(st.integers(0, USERS - 1), max_size=30),
    cut=st.tuples(*[st.integers(0, 12)] * 2),
)
@settings(deadline=None)
def test_slices_equal_rows_read_whole(
    directory: Path, users: list[dict], picked: list[int], cut: tuple[int, int]
) -> None:
    dataset = SequenceDataset(str(directory), cached_row_groups=3)
    ids = np.array(picked, dtype=np.int64)  # any order, repeats
    lengths = dataset.lengths(ids)
    rows = [users[i] for i in ids]
    assert lengths.total.tolist() == [row["length"] for row in rows]
    assert lengths.train_end.tolist() == [row["train_end"] for row in rows]
    assert lengths.validation_end.tolist() == [row["validation_end"] for row in rows]

    end = np.minimum(lengths.total, max(cut))
    begin = np.minimum(end, min(cut))
    slices = dataset.reader.slices(ids, begin, end)
    assert slices.rows["user_id"].tolist() == (ids + 1).tolist()
    assert slices.rows["user_segment"].tolist() == [row["user_segment"] for row in rows]
    assert slices.offsets.tolist() == np.concatenate([[0], np.cumsum(end - begin)]).tolist()
    names = ("item_ids", "timestamps", "ratings", "action_ids", "labels", "side_genre")
    assert set(slices.events) == set(names)
    for name in names:
        expected = [v for row, b, e in zip(rows, begin, end, strict=True) for v in row[name][b:e]]
        assert slices.events[name].tolist() == expected
        assert slices.events[name].dtype == (np.float32 if name == "ratings" else np.int64)


def test_only_named_columns_are_gathered(directory: Path) -> None:
    dataset = SequenceDataset(str(directory), cached_row_groups=3)
    ids = np.array([0, 69])
    slices = dataset.reader.slices(ids, np.zeros(2, int), np.ones(2, int), ["item_ids"])
    assert list(slices.events) == ["item_ids"]


def test_row_groups_are_decoded_once_while_cached(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, index: int, **options: object) -> object:
        reads.append(index)
        return original(self, index, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    everyone = np.arange(USERS)
    zeros = np.zeros(USERS, dtype=np.int64)
    large = SequenceDataset(str(directory), cached_row_groups=12)
    for _ in range(3):
        large.reader.slices(everyone, zeros, zeros)
    assert len(reads) == len(large.reader.row_group_sizes) == 12
    small = SequenceDataset(str(directory), cached_row_groups=2)
    reads.clear()
    for _ in range(3):
        small.reader.slices(everyone, zeros, zeros)
    assert len(reads) == 36


def _flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 0x40
    file.write_bytes(data)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    write_synthetic(str(tmp_path), 40, 20, 6, 1, num_shards=2, rows_per_group=5)
    _flip_a_byte(tmp_path / "sequences" / "part-00001.parquet")
    return tmp_path


def test_a_corrupt_shard_is_named_with_the_mend(damaged: Path) -> None:
    dataset = SequenceDataset(str(damaged), cached_row_groups=4)
    zeros = np.zeros(1, dtype=np.int64)
    dataset.reader.slices(np.array([0]), zeros, zeros)  # the intact shard can be read
    for _ in range(2):  # and the damaged one never, however often one tries
        with pytest.raises(ValueError, match=r"part-00001\.parquet is damaged.*--force"):
            dataset.reader.slices(np.array([39]), zeros, zeros)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_synthetic(str(tmp_path), 10, 20, 6, 1, num_shards=1)
    (tmp_path / "sequences" / "part-00000.parquet").unlink()
    dataset = SequenceDataset(str(tmp_path), cached_row_groups=4)
    for read in (dataset.lengths, lambda ids: dataset.reader.slices(ids, ids * 0, ids * 0)):
        with pytest.raises(ValueError, match=r"part-00000\.parquet is missing.*--force"):
            read(np.array([3]))


def test_damaged_lengths_are_found_by_page_checksums(tmp_path: Path) -> None:
    """Lengths are read without hashing the shard, so their pages must tell on themselves."""
    write_synthetic(str(tmp_path), 200, 20, 6, 1, num_shards=1, rows_per_group=200)
    file = tmp_path / "sequences" / "part-00000.parquet"
    column = pq.ParquetFile(file).metadata.row_group(0).column(2)
    assert column.path_in_schema == "length"
    data = bytearray(file.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"part-00000\.parquet is missing or damaged"):
        SequenceDataset(str(tmp_path), cached_row_groups=4).lengths(np.arange(200))


def test_each_shard_is_hashed_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    original = storage.sha256_file

    def counted(url: str) -> str:
        hashed.append(url)
        return original(url)

    monkeypatch.setattr(storage, "sha256_file", counted)
    ids, zeros = np.arange(USERS), np.zeros(USERS, dtype=np.int64)
    dataset = SequenceDataset(str(directory), cached_row_groups=1)
    dataset.lengths(ids)
    assert hashed == []
    dataset.reader.slices(ids, zeros, zeros)
    dataset.reader.slices(ids, zeros, zeros)
    assert len(hashed) == 3
    trusting = SequenceDataset(str(directory), cached_row_groups=1, verify=False)
    trusting.reader.slices(ids, zeros, zeros)
    assert len(hashed) == 3


def test_a_data_set_on_another_file_system(users: list[dict]) -> None:
    url = "memory://loader/data"
    write_synthetic(url, 20, 40, 6, 1, num_shards=2, rows_per_group=4)
    dataset = SequenceDataset(url, cached_row_groups=4)
    ids = np.array([3, 19])
    ends = dataset.lengths(ids).total
    slices = dataset.reader.slices(ids, np.zeros_like(ends), ends)
    assert len(slices.events["item_ids"]) == ends.sum() > 0


class _Marker:
    """Unpickling makes the directory `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("nested", [False, True])
def test_a_shard_whose_type_runs_code_is_refused_before_its_values_are_made(
    tmp_path: Path, nested: bool
) -> None:
    """Lengths are read before the shard is hashed; Ray's type of Python objects unpickles."""
    ray_type = importlib.import_module("ray.data.extensions").ArrowPythonObjectType()
    write_synthetic(str(tmp_path), 4, 5, 3.0, 1, num_shards=1)
    [entry] = read_manifest(str(tmp_path)).shards
    path = tmp_path / entry.path
    table = pq.read_table(path)
    values = pa.array([pickle.dumps(_Marker(tmp_path / "ran"))] * 4, pa.large_binary())
    column = pa.ExtensionArray.from_storage(ray_type, values)
    if nested:
        column = pa.StructArray.from_arrays([column], names=["inner"])
    place = table.schema.get_field_index("length")
    pq.write_table(table.set_column(place, "length", column), path, write_page_checksum=True)

    dataset = SequenceDataset(str(tmp_path), cached_row_groups=2)
    with pytest.raises(ValueError, match=r"damaged \(column 'length' is of an extension type\)"):
        dataset.lengths(np.array([0, 3]))
    with pytest.raises(ValueError, match=r"damaged \(column 'length' is of an extension type\)"):
        read_table(str(path), ["length"])
    assert not (tmp_path / "ran").exists()
