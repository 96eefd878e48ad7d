"""Readers of what lies on storage: any bytes are refused in a sentence, whatever was changed."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import storage
from configs.layout import read_record
from data_loaders.manifest import DatasetManifest, FileEntry, read_manifest
from data_loaders.pairs import read_pairs
from data_loaders.semantic_ids import read_semantic_ids, write_semantic_ids
from data_loaders.shards import read_table, write_table
from data_loaders.synthetic import write_synthetic
from data_loaders.verification import verify_directory
from models.tokenizers.build import load_quantizer
from sharding.checkpoint_manifest import (
    CheckpointFile,
    CheckpointManifest,
    build_manifest,
)
from sharding.checkpoint_manifest import (
    read_manifest as read_checkpoint,
)
from sharding.safe_metadata import read_metadata
from trainer.monitor.results import read_recommendations, read_results
from trainer.monitor.tracker import read_rows

NAME = "step-00000001-0000000000000001"
SECONDS = 5.0
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside),
    max_leaves=8,
)
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "data set": ("manifest.json", lambda p: read_manifest(str(p))),
    "pairs": ("manifest.json", lambda p: read_pairs(str(p))),
    "semantic ids": ("manifest.json", lambda p: read_semantic_ids(str(p), data_fingerprint="f")),
    "verify": ("manifest.json", lambda p: verify_directory(str(p), lambda line: None)),
    "checkpoint": ("MANIFEST.json", lambda p: read_checkpoint(str(p), NAME)),
    "tokenizer": ("quantizer.json", lambda p: load_quantizer(str(p))),
    "record": ("train.json", lambda p: read_record(str(p / "train.json"))),
    "results": ("results.json", lambda p: read_results(str(p / "results.json"))),
    "recommendations": ("r.json", lambda p: read_recommendations(str(p / "r.json"))),
}


def refused(read: Callable[[], Any]) -> bool:
    """Whether a reader refuses; it must do so in a sentence, soon, and never fall over."""
    started = time.monotonic()
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        assert str(error).strip() and "\n" not in str(error)
        return True
    finally:
        assert time.monotonic() - started < SECONDS
    return False


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifacts")
    (path / "quantizer.safetensors").write_bytes(b"no tensors")
    return path


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=40)
@given(data=st.binary(max_size=80) | values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused(kind: str, data: bytes, place: Path) -> None:
    name, read = READERS[kind]
    (place / name).write_bytes(data)
    assert refused(lambda: read(place))


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "data",
    [b"[" * 200_000, b'{"a":' * 200_000, b"9" * 20_000, b'{"format": ' + b"9" * 9_000 + b"}"],
)
def test_deep_and_long_json_is_refused(kind: str, data: bytes, place: Path) -> None:
    name, read = READERS[kind]
    (place / name).write_bytes(data)
    assert refused(lambda: read(place))


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_synthetic(str(path), 9, 8, 5, 1)
    return path


@settings(max_examples=120)
@given(data=st.data())
def test_a_sealed_manifest_of_anything_stays_below_its_directory(
    data: st.DataObject, data_set: Path, place: Path
) -> None:
    """As who can also compute the fingerprint would craft it."""
    content = json.loads((data_set / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        block: Any = content
        while isinstance(block, dict | list) and block and data.draw(st.booleans()):
            keys = sorted(block) if isinstance(block, dict) else range(len(block))
            above, key = block, data.draw(st.sampled_from(list(keys)))
            block = above[key]
            odd = st.sampled_from(["../x", "/etc/passwd", "a::memory", "s3://b/c", "", "a//b", "."])
            if not isinstance(block, dict | list):
                above[key] = data.draw(values | odd)
    try:
        draft = DatasetManifest.model_validate(content)
    except ValueError:
        draft = None
    if draft is not None:
        content["fingerprint"] = storage.fingerprint(draft.content())
    (place / "manifest.json").write_text(json.dumps(content))
    try:
        manifest = read_manifest(str(place))
    except ValueError as error:
        assert "\n" not in str(error)
        return
    for entry in manifest.files():
        assert storage.inside(str(place), entry.path).startswith(f"{place}/")
        assert all(entry.path.split("/")) and ".." not in entry.path.split("/")


@settings(max_examples=100)
@given(path=st.text(max_size=12) | st.sampled_from(["..", "a/../../b", "::", "a::file", "\0"]))
def test_no_path_leads_out(path: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    digest = "0" * 64
    for kind in (FileEntry, CheckpointFile):
        fields = {"path": path, "bytes": 1, "sha256": digest}
        try:
            entry = kind(**fields, **({"rows": 1} if kind is FileEntry else {}))
        except ValueError:
            continue
        url = storage.join("/root", entry.path)
        assert url.startswith("/root/") and "::" not in url and "/../" not in f"{url}/"


@settings(max_examples=150)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_no_checkpoint_metadata(data: bytes) -> None:
    assert refused(lambda: read_metadata(data, {"__0_0.distcp": 100}))
    assert refused(lambda: read_metadata(b"\x80\x04" + data, {"__0_0.distcp": 100}))


@settings(max_examples=60)
@given(data=st.data())
def test_mutated_parquet_is_refused_or_what_it_was(data: st.DataObject, place: Path) -> None:
    """Staged parts and quarantine, which no hash protects: pages carry checksums."""
    table = pa.table({"user": [f"u{n}" for n in range(40)], "n": list(range(40))})
    path = place / "part.parquet"
    if not path.exists():
        write_table(str(place), "part.parquet", table)
        (place / "whole").write_bytes(path.read_bytes())
    changed = bytearray((place / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] ^= data.draw(st.integers(1, 255))
    end = data.draw(st.integers(0, len(changed))) if data.draw(st.booleans()) else len(changed)
    path.write_bytes(changed[:end])
    refused(lambda: read_table(str(path)))


@pytest.fixture(scope="module")
def codes(data_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codes")
    ids = torch.randint(4, (9, 2), generator=torch.Generator().manual_seed(0))
    write_semantic_ids(str(path), str(data_set), ids, (4, 4), tokenizer="t")
    return path


@settings(max_examples=60)
@given(data=st.data())
def test_mutated_semantic_ids_are_refused(data: st.DataObject, codes: Path, data_set: Path) -> None:
    fingerprint = read_manifest(str(data_set)).fingerprint
    file = data.draw(st.sampled_from([codes / "manifest.json", *(codes / "codes").iterdir()]))
    whole = file.read_bytes()
    expected = read_semantic_ids(str(codes), data_fingerprint=fingerprint).codes
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(changed)
    try:
        found = read_semantic_ids(str(codes), data_fingerprint=fingerprint).codes
        assert torch.equal(found, expected)  # white space between values
    except ValueError as error:
        assert "\n" not in str(error)
    finally:
        file.write_bytes(whole)


@settings(max_examples=80)
@given(rows=st.lists(st.binary(max_size=40) | values.map(lambda v: json.dumps(v).encode())))
def test_any_rows_of_metrics(rows: list[bytes], place: Path) -> None:
    (place / "metrics.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    refused(lambda: read_rows(str(place)))


def test_a_checkpoint_manifest_that_was_resealed_still_names_plain_files() -> None:
    manifest = build_manifest(
        name=NAME, step=1, created=1.0, world_size=1, versions={}, fingerprints={}, files=()
    )
    content = manifest.model_dump(mode="json")
    for path in ("../x", "a/b", "/x", "a::b", "x\ny", ""):
        content["files"] = [{"path": path, "bytes": 0, "sha256": "0" * 64}]
        with pytest.raises(ValueError, match="path"):
            CheckpointManifest.model_validate(content)
