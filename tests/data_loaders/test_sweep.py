"""Preparation removes nothing that it did not write, and reads nothing from where it writes."""

from pathlib import Path

import pytest

from configs.data import CsvSource, DataConfig, ItemText, UserTable
from data_loaders.cleaning import Job
from data_loaders.inputs import make_job, plan_inputs
from data_loaders.sequences import _sweep

VERSION = "20260101-000000-abcdef"
LOG = "user,item,timestamp\nu,i,1600000000\n"


def _job(root: Path, log: Path, **tables: ItemText | UserTable) -> Job:
    source = CsvSource.model_validate({"url": str(log), **tables})
    return make_job(DataConfig(source=source), str(root), source)


def _write(path: Path, text: str = LOG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_only_what_a_preparation_wrote_is_swept(tmp_path: Path) -> None:
    data = tmp_path / "data"
    others = [
        _write(data / "items" / "items.csv"),
        _write(data / "items" / "part-00000.parquet"),
        _write(data / "items" / "2026" / "part-00000.parquet"),
        _write(data / "items" / "20260102-000000-abcdef" / "notes.txt"),
        _write(data / "sequences" / "20260102-000000-abcdef" / "deep" / "part-00000.parquet"),
        _write(data / "vocabularies" / f"{VERSION}-mine" / "part-00000.parquet"),
        _write(data / "quarantine" / "20260103-000000-abcdef"),
        _write(data / "staging" / "mine.csv"),
        _write(data / "staging-mine" / "mine.csv"),
    ]
    own = [
        _write(data / "items" / VERSION / "part-00000.parquet"),
        _write(data / "vocabularies" / VERSION / "side_tab.parquet"),
        _write(data / "quarantine" / VERSION / "part-duplicates-00000.parquet"),
        _write(data / "sequences" / VERSION / f"part-00000.parquet.{'0a' * 16}.tmp"),
        _write(data / f"staging-{VERSION}" / "read" / "part-00000.parquet"),
    ]
    _sweep(_job(data, tmp_path / "log.csv"))
    assert all(path.exists() for path in others)
    assert not any(path.parent.exists() for path in own)


@pytest.mark.parametrize(
    "place", ["data.source", "data.source.item_text", "data.source.user_table"]
)
def test_input_inside_the_data_set_is_refused(tmp_path: Path, place: str) -> None:
    data, log = tmp_path / "data", _write(tmp_path / "log.csv")
    inside = _write(data / "items" / "table.csv")
    job = {
        "data.source": lambda: _job(data, inside),
        "data.source.item_text": lambda: _job(
            data, log, item_text=ItemText(url=str(inside), format="csv", title="timestamp")
        ),
        "data.source.user_table": lambda: _job(
            data, log, user_table=UserTable(url=str(inside), format="csv", features=("item",))
        ),
    }[place]()
    with pytest.raises(ValueError, match=rf"{place}.url=.*table.csv, which lies inside .*move it"):
        plan_inputs(job)


def test_input_is_found_inside_behind_a_glob_and_a_link(tmp_path: Path) -> None:
    _write(tmp_path / "data" / "items" / "log.csv")
    with pytest.raises(ValueError, match="lies inside"):
        plan_inputs(_job(tmp_path / "data", tmp_path / "**" / "*.csv"))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match="lies inside"):
        plan_inputs(_job(tmp_path / "data", tmp_path / "link" / "items" / "log.csv"))
    beside = _write(tmp_path / "data-of-mine" / "log.csv")
    assert plan_inputs(_job(tmp_path / "data", beside))["events"].chunks
