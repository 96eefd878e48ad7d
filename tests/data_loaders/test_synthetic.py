"""The synthetic data set is deterministic, split as prepared data is, and worth learning."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_loaders.manifest import read_manifest, verify_shard
from data_loaders.synthetic import STRIDES, write_synthetic


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic")
    write_synthetic(str(path), 100, 30, 8, seed=3, num_shards=3, rows_per_group=16, empty_shards=1)
    return path


def test_files_agree_with_the_manifest(directory: Path) -> None:
    manifest = read_manifest(str(directory))
    next_user, events = 1, 0
    for shard in manifest.shards:
        verify_shard(str(directory), shard)
        file = pq.ParquetFile(directory / shard.path)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert tuple(rows for rows in groups if rows) == shard.row_group_rows
        table = file.read()
        assert table["user_id"].to_pylist() == list(range(next_user, next_user + shard.rows))
        assert [len(row) for row in table["item_ids"].to_pylist()] == table["length"].to_pylist()
        next_user, events = next_user + shard.rows, events + shard.events
    assert (next_user - 1, events) == (manifest.num_users, manifest.num_events)
    assert manifest.shards[-1].rows == 0
    for entry in (*manifest.items, *manifest.vocabularies):
        verify_shard(str(directory), entry)


def test_same_arguments_same_bytes(directory: Path, tmp_path: Path) -> None:
    again = write_synthetic(
        str(tmp_path), 100, 30, 8, seed=3, num_shards=3, rows_per_group=16, empty_shards=1
    )
    assert again.fingerprint == read_manifest(str(directory)).fingerprint
    other = write_synthetic(str(tmp_path), 100, 30, 8, seed=4)
    assert other.fingerprint != again.fingerprint


def test_splits_items_and_train_counts(directory: Path) -> None:
    manifest = read_manifest(str(directory))
    counts = np.zeros(manifest.num_items + 1, dtype=np.int64)
    short = 0
    for shard in manifest.shards:
        for row in pq.read_table(directory / shard.path).to_pylist():
            length, short = row["length"], short + (row["length"] < 3)
            expected = (length - 2, length - 1) if length >= 3 else (length, length)
            assert (row["train_end"], row["validation_end"]) == expected
            assert row["timestamps"] == sorted(row["timestamps"])
            assert min(row["item_ids"]) >= 1 and max(row["item_ids"]) <= manifest.num_items
            np.add.at(counts, row["item_ids"][: row["train_end"]], 1)
    assert short > 0, "users that only train must be among them"
    items = pq.read_table(directory / manifest.items[0].path)
    assert items["train_count"].to_pylist() == counts[1:].tolist()


def test_the_next_item_follows_the_users_stride(directory: Path) -> None:
    follows = total = 0
    for shard in read_manifest(str(directory)).shards:
        for row in pq.read_table(directory / shard.path).to_pylist():
            items = np.array(row["item_ids"])
            step = np.diff(items) % 30
            follows += int((step == STRIDES[row["user_segment"] - 1]).sum())
            total += len(step)
    assert follows / total > 0.7
