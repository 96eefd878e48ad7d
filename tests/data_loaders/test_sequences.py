"""Preparation on Ray Data against a loop over events, and what it says about bad input."""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from configs.data import (
    CleaningConfig,
    ColumnMap,
    CsvSource,
    DataConfig,
    GlobalTime,
    ItemText,
    JsonlSource,
    LeaveLastOut,
    ParquetSource,
    ShardConfig,
    UserTable,
)
from data_loaders import exchange as exchange_module
from data_loaders.exchange import PARTITION, Progress, exchange, quiet
from data_loaders.items import (
    ItemFeature,
    find_users,
    item_feature,
    raw_items,
    titles,
    train_counts,
)
from data_loaders.manifest import DatasetManifest, read_manifest, verify_shard
from data_loaders.sequences import prepare

pytestmark = pytest.mark.usefixtures("local_ray")

LABELS = {"finished": "done", "liked": "like"}
COLUMNS = ColumnMap(
    rating="rating",
    dwell="watched_ms",
    duration="lasts_ms",
    action="action",
    side_features=("tab",),
    labels=LABELS,
)
YEAR_2020 = 1_577_836_800
SHARDS = ShardConfig(num_shards=3, rows_per_group=4)
Event = dict[str, Any]


def _log(num_users: int = 25, num_items: int = 30, seed: int = 0) -> list[Event]:
    """Events of users with 1 … 14 events each, with tied timestamps, in no order of user."""
    random = np.random.default_rng(seed)
    events = []
    for user in range(num_users):
        for _ in range(1 + user % 14):
            events.append(
                {
                    "user": f"u{user}",
                    "item": f"i{int(num_items * random.random() ** 2)}",
                    "timestamp": YEAR_2020 + int(random.integers(0, 20)),
                    "rating": float(random.integers(1, 6)),
                    "action": random.choice(["click", "like"]),
                    "tab": str(random.integers(0, 4)),
                    "watched_ms": None if user % 5 == 1 else 250 * (user + len(events) % 7),
                    "lasts_ms": 1500 * int(random.integers(0, 9)),
                    "like": bool(random.integers(0, 2)),
                    "done": int(random.integers(0, 2)),
                }
            )
    return [events[index] for index in random.permutation(len(events))]


@dataclass
class _Expected:
    """What a loop makes of a log."""

    sequences: dict[str, list[Event]]
    counts: Counter[str] = field(default_factory=Counter)


def _by_loop(
    log: list[Event], min_rating: float | None, user_core: int, item_core: int
) -> _Expected:
    seen, kept, counts = set(), [], Counter(read=len(log))
    for event in log:
        key = (event["user"], event["item"], event["timestamp"], event["action"])
        if key in seen:
            counts["duplicate"] += 1
        elif min_rating is not None and event["rating"] < min_rating:
            counts["below"] += 1
        else:
            kept.append(event)
        seen.add(key)
    while True:
        of_item = Counter(event["item"] for event in kept)
        popular = [event for event in kept if of_item[event["item"]] >= item_core]
        of_user = Counter(event["user"] for event in popular)
        left = [event for event in popular if of_user[event["user"]] >= user_core]
        if len(left) == len(kept):
            break
        counts["core"] += len(kept) - len(left)
        kept = left
    sequences: dict[str, list[Event]] = defaultdict(list)
    for event in sorted(kept, key=lambda event: int(event["timestamp"])):  # stable
        sequences[event["user"]].append(event)
    return _Expected(sequences, counts)


def _table(url: Path, directory: str) -> list[Event]:
    paths = sorted((url / directory).glob("*/*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def _config(source: Any, **options: Any) -> DataConfig:
    cleaning = options.pop("cleaning", CleaningConfig(max_bad_share=1.0))
    return DataConfig(source=source, cleaning=cleaning, shards=SHARDS, **options)


def _csv(path: Path, log: list[Event]) -> CsvSource:
    pd.DataFrame(log).to_csv(path, index=False)
    return CsvSource(url=str(path), columns=COLUMNS, dwell_unit="ms")


def _prepare(config: DataConfig, url: Path) -> DatasetManifest:
    return prepare(config, "toy", str(url), str(url / "raw"))


def _check(url: Path, manifest: DatasetManifest, expected: _Expected) -> None:
    """The data set in `url` is what the loop expects, to the last value."""
    items = _table(url, "items")
    assert [row["item_id"] for row in items] == list(range(1, len(items) + 1))
    raw = {row["item_id"]: row["item"] for row in items}
    vocabularies = {
        name: {row["id"]: row["value"] for row in pq.read_table(path).to_pylist()}
        for name in ("actions", "side_tab")
        for path in [url / "vocabularies" / manifest.version / f"{name}.parquet"]
    }
    rows = _table(url, "sequences")
    assert [row["user_id"] for row in rows] == list(range(1, len(rows) + 1))
    assert {row["user"] for row in rows} == set(expected.sequences)
    train_count: Counter[str] = Counter()
    for row in rows:
        events = expected.sequences[row["user"]]
        assert [raw[i] for i in row["item_ids"]] == [e["item"] for e in events]
        assert row["timestamps"] == [e["timestamp"] for e in events]
        assert row["ratings"] == [e["rating"] for e in events]
        for seconds, event in zip(row["dwell_times"], events, strict=True):
            watched = event["watched_ms"]
            assert np.isnan(seconds) if watched is None else seconds == watched / 1000
        assert row["durations"] == [e["lasts_ms"] / 1000 for e in events]
        actions, tabs = vocabularies["actions"], vocabularies["side_tab"]
        assert [actions[i] for i in row["action_ids"]] == [e["action"] for e in events]
        assert [tabs[i] for i in row["side_tab"]] == [e["tab"] for e in events]
        assert row["labels"] == [e["done"] + 2 * e["like"] for e in events]
        assert row["length"] == len(events)
        train_count.update(e["item"] for e in events[: row["train_end"]])
    assert {row["item"]: row["train_count"] for row in items if row["train_count"]} == train_count
    _check_manifest(url, manifest, expected, rows)


def _check_manifest(
    url: Path, manifest: DatasetManifest, expected: _Expected, rows: list[Event]
) -> None:
    assert read_manifest(str(url)) == manifest
    assert manifest.labels == ("finished", "liked")
    assert manifest.num_users == len(rows)
    assert manifest.num_events == sum(row["length"] for row in rows)
    counts = manifest.counts
    assert counts.read == expected.counts["read"] and counts.kept == manifest.num_events
    assert counts.quarantined.get("duplicate", 0) == expected.counts["duplicate"]
    assert counts.below_min_rating == expected.counts["below"]
    assert counts.core_removed == expected.counts["core"]
    assert sum(manifest.length_histogram.values()) == len(rows)
    for bucket, users in manifest.length_histogram.items():
        assert users == sum(bucket <= row["length"] < 2 * bucket for row in rows)
    first = 1
    for shard in manifest.shards:
        parquet = pq.ParquetFile(url / shard.path)
        groups = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
        assert [size for size in groups if size] == list(shard.row_group_rows)
        assert shard.first_user_id == first
        first += shard.rows
    for entry in (*manifest.shards, *manifest.items, *manifest.vocabularies, *manifest.quarantine):
        verify_shard(str(url), entry)
    assert not list(url.glob("staging*"))


def test_equals_a_loop_over_events(tmp_path: Path) -> None:
    log = _log()
    log += log[:7]  # duplicates
    manifest = _prepare(_config(_csv(tmp_path / "log.csv", log)), tmp_path / "data")
    expected = _by_loop(log, None, 1, 1)
    _check(tmp_path / "data", manifest, expected)
    quarantine = _table(tmp_path / "data", "quarantine")
    assert expected.counts["duplicate"] == len(quarantine) >= 7
    assert {row["reason"] for row in quarantine} == {"duplicate"}
    assert {row["source_file"] for row in quarantine} == {"log.csv"}
    for row in quarantine:
        assert str(log[row["source_row"]]["user"]) == row["user"]
        assert str(int(log[row["source_row"]]["like"])) == row["like"]
        assert str(log[row["source_row"]]["done"]) == row["done"]
    assert {(r["user"], r["item"], r["timestamp"]) for r in quarantine} >= {
        (e["user"], e["item"], str(e["timestamp"])) for e in log[:7]
    }
    for row in _table(tmp_path / "data", "sequences"):
        train, validation, length = row["train_end"], row["validation_end"], row["length"]
        split = (length - 2, length - 1) if length >= 3 else (length, length)
        assert (train, validation) == split


def test_core_and_ratings_equal_a_loop_and_files_do_not_matter(tmp_path: Path) -> None:
    log = _log(seed=1)
    cleaning = CleaningConfig(min_rating=2, user_core=3, item_core=3, duplicates="keep")
    log = list({(e["user"], e["item"], e["timestamp"]): e for e in log}.values())
    source = _csv(tmp_path / "log.csv", log)
    manifest = _prepare(_config(source, cleaning=cleaning), tmp_path / "data")
    expected = _by_loop(log, 2, 3, 3)
    assert expected.counts["core"] > 0 and expected.counts["below"] > 0
    _check(tmp_path / "data", manifest, expected)
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in range(4):  # the same events from several Parquet files, over an older data set
        share = log[len(log) * number // 4 : len(log) * (number + 1) // 4]
        pq.write_table(pa.Table.from_pylist(share), parts / f"{number}.parquet")
    again = _prepare(
        _config(
            ParquetSource(url=str(parts), columns=COLUMNS, dwell_unit="ms"),
            cleaning=cleaning,
            split=LeaveLastOut(include_validation_in_training=True),  # the loader's matter
        ),
        tmp_path / "data",
    )
    assert again.fingerprint == manifest.fingerprint


def test_bad_rows_are_quarantined_with_titles_and_users_joined(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = [
        {"u": n % 5, "v": f"v{n % 7}", "t": f"2020-01-{n % 28 + 1:02d}T00:00:00"} for n in range(60)
    ]
    bad = [
        {"u": None, "v": "v1", "t": "2020-01-01"},
        {"u": 1, "v": "v1"},
        {"u": 1, "v": "v1", "t": "?"},
    ]
    lines = [json.dumps(row) for row in log + bad] + ["not json"]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    lines = ["id;name;kind", "v0;Zero;song", "v3;Three;clip", "v3;Other;song", "v5;;song", "x;X;x"]
    (tmp_path / "titles.csv").write_text("\n".join([*lines, "v6;Six;"]) + "\n")
    pq.write_table(pa.table({"u": [0, 1, 2, 9], "age": [30, None, 20, 40]}), tmp_path / "u.parquet")
    source = JsonlSource(
        url=str(tmp_path / "log.jsonl"),
        columns=ColumnMap(user="u", item="v", timestamp="t"),
        timestamp_unit="iso8601",
        item_text=ItemText(
            url=str(tmp_path / "titles.csv"),
            format="csv",
            separator=";",
            item="id",
            title="name",
            features=("kind",),
        ),
        user_table=UserTable(url=str(tmp_path / "u.parquet"), user="u", features=("age",)),
    )
    data = tmp_path / "data"
    manifest = _prepare(_config(source), data)
    assert manifest.counts.quarantined == {
        "null_user": 1,
        "null_timestamp": 1,
        "unparsable_timestamp": 1,
        "malformed_row": 1,
    }
    rows = {row["reason"]: row["source_row"] for row in _table(data, "quarantine")}
    assert rows == {
        "null_user": 60,
        "null_timestamp": 61,
        "unparsable_timestamp": 62,
        "malformed_row": 63,
    }
    assert capfd.readouterr().out.splitlines()[-1] == (
        "5 users, 7 items, 60 events; 4 quarantined (malformed_row 1, null_timestamp 1, null_user "
        f"1, unparsable_timestamp 1): {data}/quarantine/{manifest.version}; "
        "0 below min_rating, 0 removed by k-core"
    )
    assert manifest.user_features == {"age": 3} and not manifest.has_ratings
    ages = {row["user"]: row["user_age"] for row in _table(data, "sequences")}
    assert ages == {"0": 2, "1": 0, "2": 1, "3": 0, "4": 0}  # 0: unknown
    rows_of_items = _table(data, "items")
    ids = {row["item"]: row["item_id"] for row in rows_of_items}
    asked = [ids["v3"], ids["v0"], ids["v1"], ids["v3"]]
    assert titles(str(data), asked) == ["Three", "Zero", "v1", "Three"]
    assert raw_items(str(data), asked) == ["v3", "v0", "v1", "v3"]
    kinds = item_feature(str(data), "kind")
    assert kinds.names == ("clip", "song", "x") and manifest.item_features == {"kind": 3}
    assert int(kinds.ids[0]) == 0 and len(kinds.ids) == manifest.num_items + 1
    named = {row["item"]: (0, *kinds.names)[kinds.ids[row["item_id"]]] for row in rows_of_items}
    assert {item: kind for item, kind in named.items() if kind} == {
        "v0": "song",
        "v3": "clip",
        "v5": "song",
    }
    with pytest.raises(ValueError, match=r"no item feature 'brand', only \['kind'\]"):
        item_feature(str(data), "brand")
    assert train_counts(str(data)).tolist() == [r["train_count"] for r in _table(data, "items")]
    dense = {row["user"]: row["user_id"] for row in _table(data, "sequences")}
    assert find_users(str(data), ["4", "0", "4"]).tolist() == [dense["4"], dense["0"], dense["4"]]


def test_categories_between_bounds() -> None:
    days = ItemFeature(torch.zeros(1), ("2020-01-02", "2020-01-03T12:00:00", "2020-02-01"))
    assert days.between("2020-01-03", None, "asked") == [2, 3]
    assert days.between(None, "2020-01-03", "asked") == [1]
    assert days.between("2020-01-02", "2020-02-01", "asked") == [1, 2]
    years = ItemFeature(torch.zeros(1), ("10", "9", "9.5"))
    assert years.between(9.5, None, "asked") == [1, 3] and years.between(9.5, 10, "asked") == [3]
    with pytest.raises(ValueError, match="^asked, but an item has '10' there.* not an ISO date"):
        years.between("2020-01-01", None, "asked")
    with pytest.raises(ValueError, match="^asked, but an item has '2020-01-02' .* not a number"):
        days.between(None, 3.0, "asked")


def test_global_time_split(tmp_path: Path) -> None:
    log = [
        {"user": user, "item": f"i{day}", "timestamp": YEAR_2020 + 86400 * day}
        for user, days in {"a": (1, 5, 6, 9), "b": (5,), "c": (1, 2), "d": (9,)}.items()
        for day in days
    ]
    (tmp_path / "log.csv").write_text(pd.DataFrame(log).to_csv(index=False))
    split = GlobalTime(validation_from="2020-01-05", test_from=YEAR_2020 + 86400 * 8)
    config = _config(CsvSource(url=str(tmp_path / "log.csv")), split=split)
    _prepare(config, tmp_path / "data")
    ends = {
        row["user"]: (row["train_end"], row["validation_end"], row["length"])
        for row in _table(tmp_path / "data", "sequences")
    }
    assert ends == {"a": (1, 3, 4), "b": (0, 1, 1), "c": (2, 2, 2), "d": (0, 0, 1)}
    late = config.model_copy(update={"split": split.model_copy(update={"test_from": "2021-01-01"})})
    with pytest.raises(ValueError, match=r"test_from='2021-01-01' leaves no test targets"):
        _prepare(late, tmp_path / "data")


def test_too_many_bad_events_fail_and_can_be_looked_at(tmp_path: Path) -> None:
    log = _log(5)
    for event in log:
        event["timestamp"] *= 1000  # milliseconds, but the recipe says seconds
    config = _config(_csv(tmp_path / "log.csv", log), cleaning=CleaningConfig())
    with pytest.raises(ValueError) as error:
        _prepare(config, tmp_path / "data")
    message = str(error.value)
    assert f"{len(log)} of {len(log)} events (100.00%) are bad (impossible_timestamp" in message
    assert "max_bad_share=0.01" in message and "timestamp_unit='s' right" in message
    assert str(tmp_path / "data" / "quarantine") in message
    assert len(_table(tmp_path / "data", "quarantine")) == len(log)
    with pytest.raises(ValueError, match="does not exist"):
        read_manifest(str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("user,item,timestamp\n", {}, "holds no events"),
        ("", {}, "holds no events"),
        ("user,item,timestamp\n1,2,1600000000\n", {"user_core": 2}, "is left of 1.*user_core=2"),
        ("user,item,when\n1,2,3\n", {}, "timestamp='timestamp' is not a column"),
        ("user,item,timestamp\n1,2,3\n", {"min_rating": 3.0}, "min_rating=3.0 needs a rating"),
    ],
)  # fmt: skip
def test_input_that_gives_nothing(
    tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "log.csv").write_text(text)
    config = _config(CsvSource(url=str(tmp_path / "log.csv")), cleaning=CleaningConfig(**options))
    with pytest.raises(ValueError, match=message):
        _prepare(config, tmp_path / "data")


def test_a_bad_log_leaves_the_old_data_set_alone(tmp_path: Path) -> None:
    source = _csv(tmp_path / "log.csv", _log(4))
    manifest = _prepare(_config(source), tmp_path / "data")
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not a column"):
        _prepare(_config(source), tmp_path / "data")
    assert read_manifest(str(tmp_path / "data")) == manifest


def test_a_user_with_one_event_and_an_empty_shard(tmp_path: Path) -> None:
    rows = ["only,i,1600000000", *(f"u,i,{1_600_000_000 + second}" for second in range(3))]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    data = tmp_path / "data"
    manifest = _prepare(_config(CsvSource(url=str(tmp_path / "log.csv"))), data)
    assert min(shard.rows for shard in manifest.shards) == 0
    [only] = [row for row in _table(data, "sequences") if row["user"] == "only"]
    assert only.pop("user_id") in (1, 2)
    assert [only] == [
        {
            "user": "only",
            "length": 1,
            "train_end": 1,
            "validation_end": 1,
            "item_ids": [1],
            "timestamps": [1_600_000_000],
        }
    ]
    schemas = {str(pq.read_schema(data / shard.path)) for shard in manifest.shards}
    assert len(schemas) == 1


def test_dates_where_numbers_are_expected_hint_at_the_unit(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp\n" + "1,2,2020-01-31\n" * 3)
    with pytest.raises(ValueError, match=r"unparsable_timestamp 3.*timestamp_unit='s' right"):
        _prepare(
            _config(CsvSource(url=str(tmp_path / "log.csv")), cleaning=CleaningConfig()),
            tmp_path / "data",
        )


def test_an_error_inside_a_task_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes("user,item,timestamp\nJosé,1,1600000000\n".encode("latin-1"))
    with pytest.raises(ValueError) as error:
        _prepare(_config(CsvSource(url=str(tmp_path / "log.csv"))), tmp_path / "data")
    assert "\n" not in str(error.value) and "cannot be read as csv" in str(error.value)


def test_memory_is_read_but_not_written(tmp_path: Path) -> None:
    import fsspec

    rows = pd.DataFrame(_log(3)).to_csv(index=False)
    fsspec.filesystem("memory").pipe("/toy/log.csv", rows.encode())
    config = _config(CsvSource(url="memory://toy/log.csv", columns=COLUMNS))
    assert _prepare(config, tmp_path / "data").num_users == 3
    with pytest.raises(ValueError, match="which workers cannot see"):
        prepare(config, "toy", "memory://toy/data", "")


def test_hash_shuffle_brings_partitions_together_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "MAX_SORTED_PARTS", 0)

    def load(part: int) -> Any:
        values = np.arange(part * 10, part * 10 + 10)
        yield pa.table({PARTITION: values % 3, "value": values})

    def reduce(partition: int, rows: pa.Table) -> dict[str, Any]:
        return {"rows": rows.num_rows, "values": sorted(rows["value"].to_pylist())}

    lines: list[str] = []
    with quiet():
        reports = exchange("gather", Progress(lines.append), [0, 1], load, reduce, 3)
    assert [report["values"] for report in reports] == [
        [value for value in range(20) if value % 3 == partition] for partition in range(3)
    ]
    assert "gather" in lines[-1] and "20 rows" in lines[-1]
