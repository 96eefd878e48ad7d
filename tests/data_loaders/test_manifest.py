"""A manifest that is missing, edited or names a foreign path is refused in one sentence."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs import storage
from configs.data import LeaveLastOut
from data_loaders.manifest import (
    DatasetManifest,
    EventCounts,
    FileEntry,
    ShardEntry,
    build_manifest,
    read_manifest,
    refuse_other_manifest,
    verify_shard,
    write_manifest,
)


def _manifest(name: str = "toy", path: str = "sequences/part-00000.parquet") -> DatasetManifest:
    return build_manifest(
        name=name,
        num_users=3,
        num_items=5,
        num_events=9,
        user_features={"age": 2},
        side_features={},
        actions=0,
        has_ratings=True,
        split=LeaveLastOut(),
        counts=EventCounts(
            read=10, kept=9, quarantined={"duplicate": 1}, below_min_rating=0, core_removed=0
        ),
        length_histogram={2: 3},
        shards=(
            ShardEntry(
                path=path,
                rows=3,
                bytes=4,
                sha256=storage.sha256_bytes(b"data"),
                first_user_id=1,
                row_group_rows=(2, 1),
                events=9,
            ),
        ),
        items=(),
        vocabularies=(),
        quarantine=(),
    )


def test_round_trip_and_fingerprint_ignores_only_the_name(tmp_path: Path) -> None:
    manifest = _manifest()
    write_manifest(str(tmp_path), manifest)
    assert read_manifest(str(tmp_path)) == manifest
    assert _manifest(name="other").fingerprint == manifest.fingerprint
    # Files of before there were dwell times say nothing of them, and keep their fingerprint.
    assert "has_dwell_times" not in json.loads((tmp_path / "manifest.json").read_text())
    with_dwell = build_manifest(
        **manifest.model_dump(exclude={"fingerprint"}), has_dwell_times=True
    )
    assert with_dwell.fingerprint != manifest.fingerprint
    write_manifest(str(tmp_path), with_dwell)
    assert read_manifest(str(tmp_path)).has_dwell_times
    write_manifest(str(tmp_path), manifest)
    assert _manifest(path="sequences/part-00001.parquet").fingerprint != manifest.fingerprint


def test_fingerprint_ignores_quarantine_files_and_the_clock() -> None:
    manifest = _manifest()
    entry = FileEntry(path="quarantine/part-0.parquet", rows=1, bytes=1, sha256="0")
    fields = manifest.model_dump(exclude={"fingerprint"})
    other = build_manifest(**{**fields, "quarantine": (entry,)}, latest="2026-01-01T00:00:00+00:00")
    assert other.fingerprint == manifest.fingerprint
    # Of before there was `latest`: as it was then, whatever the version is called.
    earlier = [
        build_manifest(
            **{
                **fields,
                "version": v,
                "quarantine": (
                    entry.model_copy(update={"path": f"quarantine/{v}/part-0.parquet"}),
                ),
            }
        )
        for v in ("v1", "v2")
    ]
    assert earlier[0].fingerprint == earlier[1].fingerprint != manifest.fingerprint
    counts = manifest.counts.model_copy(update={"quarantined": {"duplicate": 2}})
    assert build_manifest(**{**fields, "counts": counts}).fingerprint != manifest.fingerprint


def test_missing_manifest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist.*tandem prepare"):
        read_manifest(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_users", 4, "fingerprint does not match"),
        ("num_users", "many", "damaged at 'num_users'"),
        ("surprise", 1, "damaged at 'surprise'"),
    ],
)
def test_edited_manifest_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    write_manifest(str(tmp_path), _manifest())
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{message}.*--force"):
        read_manifest(str(tmp_path))


def test_a_manifest_behind_a_link_is_not_read(tmp_path: Path) -> None:
    write_manifest(str(tmp_path / "elsewhere"), _manifest())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").symlink_to(tmp_path / "elsewhere" / "manifest.json")
    with pytest.raises(ValueError, match="is a link to"):
        read_manifest(str(tmp_path / "data"))


def test_truncated_manifest_is_refused(tmp_path: Path) -> None:
    write_manifest(str(tmp_path), _manifest())
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="not valid JSON.*--force"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "../x", "a/../../x", "s3://bucket/x", "%2e%2e/x", "..%2fx", "a\\..\\b"),
        *("a\0b", "x?y=1", "x#y", ".", "", "a//b", "file:x", "a\n"),
    ],
)
def test_paths_stay_below_the_manifest(path: str) -> None:
    """Also where a server would read an escape for the character."""
    with pytest.raises(ValidationError, match="names no file below"):
        FileEntry(path=path, rows=0, bytes=0, sha256="")


def test_damaged_and_missing_shards_are_named(tmp_path: Path) -> None:
    manifest = _manifest()
    shard = tmp_path / "sequences" / "part-00000.parquet"
    with pytest.raises(ValueError, match="part-00000.parquet is missing.*--force"):
        verify_shard(str(tmp_path), manifest.shards[0])
    shard.parent.mkdir()
    shard.write_bytes(b"data")
    verify_shard(str(tmp_path), manifest.shards[0])
    shard.write_bytes(b"date")
    with pytest.raises(ValueError, match="part-00000.parquet is damaged.*--force"):
        verify_shard(str(tmp_path), manifest.shards[0])


def test_somebody_elses_manifest_is_not_replaced(tmp_path: Path) -> None:
    refuse_other_manifest(str(tmp_path))  # there is none
    mine = tmp_path / "manifest.json"
    for content in ('{"mine": 1}', "[1]"):
        mine.write_text(content)
        with pytest.raises(ValueError, match="describes no data set of Tandem's"):
            refuse_other_manifest(str(tmp_path))
    mine.write_text('{"format": 1, "finger')  # ours, cut off
    refuse_other_manifest(str(tmp_path))


@pytest.mark.parametrize("groups", [[10**30], [2, 2], []])
def test_row_groups_that_are_not_the_rows_are_damage(groups: list[int], tmp_path: Path) -> None:
    write_manifest(str(tmp_path), _manifest())
    document = json.loads((tmp_path / "manifest.json").read_text())
    document["shards"][0]["row_group_rows"] = groups
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"manifest.json is damaged at 'shards.0"):
        read_manifest(str(tmp_path))
