"""A data set stays whole until the one that replaces it is: nothing that fails may cost it."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from configs.data import CleaningConfig, CsvSource, DataConfig, ShardConfig
from configs.storage_faults import StorageError
from data_loaders import sequences
from data_loaders.manifest import DatasetManifest, read_manifest, verify_shard
from data_loaders.sequences import prepare
from data_loaders.synthetic import write_synthetic

pytestmark = pytest.mark.usefixtures("local_ray")
KINDS = ("sequences", "items", "vocabularies", "quarantine")


def _prepare(directory: Path, **cleaning: float) -> DatasetManifest:
    """Prepare `log.csv` into `data`."""
    config = DataConfig(
        source=CsvSource(url=str(directory / "log.csv")),
        cleaning=CleaningConfig.model_validate(cleaning),
        shards=ShardConfig(num_shards=2),
    )
    return prepare(config, "toy", str(directory / "data"), "")


def _write_log(directory: Path, bad: int) -> None:
    rows = [f"u{n % 4},i{n % 5},{1_600_000_000 + n}" for n in range(40)] + ["u,i,never"] * bad
    (directory / "log.csv").write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")


def _check_whole(directory: Path, manifest: DatasetManifest) -> None:
    assert read_manifest(str(directory / "data")) == manifest
    for entry in manifest.files():
        verify_shard(str(directory / "data"), entry)


def _versions(directory: Path) -> set[str]:
    data = directory / "data"
    return {
        path.name for kind in KINDS if (data / kind).exists() for path in (data / kind).iterdir()
    }


def test_too_many_bad_rows_leave_the_earlier_data_and_their_quarantine(tmp_path: Path) -> None:
    _write_log(tmp_path, bad=1)
    earlier = _prepare(tmp_path, max_bad_share=0.5)
    assert earlier.quarantine
    _write_log(tmp_path, bad=9)
    with pytest.raises(ValueError, match="more than data.cleaning.max_bad_share=0.1") as error:
        _prepare(tmp_path, max_bad_share=0.1)
    _check_whole(tmp_path, earlier)
    found = re.search(r"look at (\S+/data/quarantine/\S+), mend", str(error.value))
    assert found is not None
    bad = [pq.read_table(path) for path in Path(found[1]).glob("*.parquet")]
    assert sum(table.num_rows for table in bad) == 9
    assert _versions(tmp_path) == {earlier.version, Path(found[1]).name}
    assert not list((tmp_path / "data").glob("staging*"))
    later = _prepare(tmp_path, max_bad_share=0.5)  # sweeps what failed, and what it replaces
    _check_whole(tmp_path, later)
    assert _versions(tmp_path) == {later.version} != {earlier.version}


def test_a_disk_that_is_full_at_the_last_moment_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_log(tmp_path, bad=0)
    earlier = _prepare(tmp_path)

    def fail(url: str, manifest: DatasetManifest) -> None:
        raise StorageError("no room")

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(sequences, "write_manifest", fail)
        _prepare(tmp_path)
    _check_whole(tmp_path, earlier)
    assert _versions(tmp_path) == {earlier.version}  # the room that the attempt took is free again


def test_a_storage_that_does_not_answer_is_no_absence_of_earlier_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_log(tmp_path, bad=0)
    earlier = _prepare(tmp_path)

    def fail(url: str) -> DatasetManifest:
        raise StorageError("no answer")

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(sequences, "read_manifest", fail)
        _prepare(tmp_path)
    _check_whole(tmp_path, earlier)


def test_the_same_data_have_the_same_fingerprint_whatever_was_there_before(tmp_path: Path) -> None:
    write_synthetic(str(tmp_path / "data"), 10, 10, 5, 0)  # files directly in their directories
    killed = tmp_path / "data" / "sequences" / "20260101-000000-abcdef"
    killed.mkdir()
    staged = tmp_path / "data" / "staging-20260101-000000-abcdef" / "read"
    staged.mkdir(parents=True)
    _write_log(tmp_path, bad=0)
    first = _prepare(tmp_path)
    _check_whole(tmp_path, first)
    assert not killed.exists() and not staged.parent.exists()
    about_now = datetime.fromisoformat(first.latest) - datetime.now(UTC)
    assert timedelta(hours=23) < about_now < timedelta(hours=24)
    again = _prepare(tmp_path)
    assert again.fingerprint == first.fingerprint and again.version != first.version
    assert again.shards[0].path.replace(again.version, first.version) == first.shards[0].path
