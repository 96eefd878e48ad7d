"""A split that leaves nothing to measure is refused; no Ray, as steps run in this process."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from configs.data import CsvSource, DataConfig, GlobalTime, LeaveLastOut, ShardConfig
from data_loaders.assembly import shard_step
from data_loaders.events import SECOND, date_us
from data_loaders.inputs import make_job
from data_loaders.sequences import _Preparation
from data_loaders.shards import staged, write_table

GLOBAL = GlobalTime(validation_from="2020-01-05", test_from="2020-01-08")


def _check(root: Path, split: LeaveLastOut | GlobalTime, days: dict[str, tuple[int, ...]]) -> None:
    """Cut the events of users, which are on these days of a January, into sequences."""
    source = CsvSource(url=str(root / "log.csv"))
    shards = ShardConfig(num_shards=len(days))
    job = make_job(DataConfig(source=source, split=split, shards=shards), str(root), source)
    reports: list[dict[str, Any]] = []
    for shard, (user, dates) in enumerate(days.items()):  # one user a shard: shards add up
        count = len(dates)
        events = {
            "user": pa.array([user] * count),
            "time": pa.array([date_us("2020-01-01") + (day - 1) * 86400 * SECOND for day in dates]),
            "place": pa.array(range(count), pa.int64()),
            "item_partition": pa.array([0] * count, pa.int64()),
            "item_rank": pa.array(range(count), pa.int64()),
        }
        write_table(job.staging, staged("by_user", shard), pa.table(events))
        offsets = pa.array([0] * len(days), pa.int64()).to_numpy()
        step = shard_step(
            job, shard, first_user_id=1 + shard, item_offsets=offsets, user_features=()
        )
        reports.append(step)
    _Preparation(job, "toy", {})._check_split(reports)


def test_leave_last_out_needs_a_user_with_three_events(tmp_path: Path) -> None:
    _check(tmp_path / "some", LeaveLastOut(), {"a": (1, 2), "b": (1, 2, 3), "c": (1,)})
    with pytest.raises(ValueError, match=r"leave_last_out.* no user has 3 events; relax") as error:
        _check(tmp_path / "none", LeaveLastOut(), {"a": (1, 2), "c": (1,)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("days", "message"),
    [
        ({"a": (5, 6, 8)}, "validation_from='2020-01-05' leaves no train events; choose a date in"),
        ({"a": (1, 2, 8)}, "validation_from='2020-01-05' leaves no validation targets; choose a d"),
        ({"a": (1, 2, 6)}, "test_from='2020-01-08' leaves no test targets; choose a date inside"),
        (
            {"a": (1, 2), "b": (6, 9)},
            "validation_from='2020-01-05' leaves no validation target whose user has an event .*"
            "choose a later date",
        ),
        (
            {"a": (1, 6), "b": (8, 9), "c": (9,)},
            "test_from='2020-01-08' leaves no test target whose user has an event .*a later date",
        ),
    ],
)
def test_global_time_needs_targets_with_a_history(
    tmp_path: Path, days: dict[str, tuple[int, ...]], message: str
) -> None:
    _check(tmp_path / "good", GLOBAL, {"a": (1, 6), "b": (6, 9)})  # validation is the test's past
    with pytest.raises(ValueError, match=message):
        _check(tmp_path / "bad", GLOBAL, days)
