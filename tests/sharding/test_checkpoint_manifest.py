"""The manifest is the commit: whatever does not match it is not a checkpoint."""

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs import storage, storage_faults
from configs.storage_faults import StorageError
from sharding.checkpoint_manifest import (
    MANIFEST,
    CheckpointFile,
    CheckpointManifest,
    build_manifest,
    read_manifest,
    read_verified,
    verify_file,
    write_manifest,
)

NAME = "step-00000003-000000000000002a"


def content(**changes: Any) -> dict[str, Any]:
    """Fields of a good manifest."""
    entry = CheckpointFile(path="__0_0.distcp", bytes=5, sha256=storage.sha256_bytes(b"hello"))
    fields: dict[str, Any] = {
        "name": NAME,
        "step": 3,
        "created": 1.5,
        "world_size": 2,
        "versions": {"torch": "2"},
        "fingerprints": {"data": "f"},
        "files": (entry,),
    }
    return fields | changes


def test_no_manifest_is_read_through_a_link_or_without_end(tmp_path: Path) -> None:
    elsewhere, store = tmp_path / "elsewhere" / NAME, tmp_path / "store"
    elsewhere.mkdir(parents=True)
    write_manifest(str(elsewhere), build_manifest(**content()))
    store.mkdir()
    (store / NAME).symlink_to(elsewhere)
    with pytest.raises(ValueError, match="is a link to"):
        read_manifest(str(store / NAME), NAME)
    (store / NAME).unlink()
    (store / NAME).mkdir()
    manifest = store / NAME / MANIFEST
    manifest.symlink_to(elsewhere / MANIFEST)
    with pytest.raises(ValueError, match="is a link to"):
        read_manifest(str(store / NAME), NAME)
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(ValueError, match="is no regular file"):
        read_manifest(str(store / NAME), NAME)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_manifest_comes_back_as_written(scheme: str, tmp_path: Path) -> None:
    url = str(tmp_path) if scheme == "file" else "memory://checkpoint"
    manifest = build_manifest(**content())
    write_manifest(url, manifest)
    storage.write_bytes(storage.join(url, "__0_0.distcp"), b"hello")
    assert read_manifest(url, NAME) == manifest
    verify_file(url, manifest.files[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", 4),
        ("world_size", 1),
        ("fingerprints", {}),
        ("fingerprint", "0" * 64),
        ("files", []),
    ],
)
def test_an_edited_manifest_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    write_manifest(str(tmp_path), build_manifest(**content()))
    edited = json.loads((tmp_path / MANIFEST).read_text()) | {field: value}
    (tmp_path / MANIFEST).write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="does not match its own fingerprint"):
        read_manifest(str(tmp_path), NAME)


def test_a_manifest_of_another_directory_is_refused(tmp_path: Path) -> None:
    write_manifest(str(tmp_path), build_manifest(**content()))
    with pytest.raises(ValueError, match="name"):
        read_manifest(str(tmp_path), NAME.replace("3", "4"))


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 2}', b"null"])
def test_a_damaged_manifest_is_refused_in_a_sentence(damaged: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(damaged)
    with pytest.raises(ValueError, match=MANIFEST) as error:
        read_manifest(str(tmp_path), NAME)
    assert "\n" not in str(error.value)


def test_no_manifest_means_an_unfinished_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never finished"):
        read_manifest(str(tmp_path), NAME)


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "a/b",
        "/etc/passwd",
        "",
        ".",
        "..",
        "a\n",
        "file://x",
        "a\\b",
        "memory://x",
        "x/../y",
    ],
)
def test_paths_stay_in_the_directory(path: str, tmp_path: Path) -> None:
    digest = storage.sha256_bytes(b"")
    with pytest.raises(ValidationError):
        CheckpointFile(path=path, bytes=0, sha256=digest)
    good = build_manifest(**content()).model_dump(mode="json")
    good["files"] = [{"path": path, "bytes": 0, "sha256": digest}]
    good["fingerprint"] = storage.fingerprint({k: v for k, v in good.items() if k != "fingerprint"})
    (tmp_path / MANIFEST).write_text(json.dumps(good))
    with pytest.raises(ValueError, match=r"files\.0\.path"):
        read_manifest(str(tmp_path), NAME)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (b"hellp", "sha256 differs"),
        (b"hell", "4 bytes instead of 5"),
        (b"hello ", "6 bytes instead of 5"),
        (None, "is missing"),
    ],
)
def test_a_changed_file_is_found(written: bytes | None, reason: str, tmp_path: Path) -> None:
    if written is not None:
        (tmp_path / "__0_0.distcp").write_bytes(written)
    with pytest.raises(ValueError, match=reason):
        verify_file(str(tmp_path), build_manifest(**content()).files[0])


@pytest.mark.parametrize("name", [MANIFEST, "__0_0.distcp"])
@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EIO, "cannot be read"), (errno.ESTALE, "did not answer"), (errno.EACCES, "rights")],
)
def test_a_broken_disk_is_damage_and_a_storage_that_refuses_is_none(
    name: str, number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build_manifest(**content())
    write_manifest(str(tmp_path), manifest)
    (tmp_path / "__0_0.distcp").write_bytes(b"hello")

    class Broken(io.FileIO):
        def readall(self) -> bytes:
            raise OSError(number, os.strerror(number), name)

        readinto = read = readall  # type: ignore[assignment]

    def opened(path: str, mode: str, **kwargs: Any) -> Any:
        broken = path == str(tmp_path / name)
        return Broken(path) if broken else open(path, mode, **kwargs)

    monkeypatch.setattr(storage_faults, "open", opened, raising=False)
    monkeypatch.setattr(storage_faults, "WAITS_S", ())
    kind = ValueError if number == errno.EIO else StorageError
    with pytest.raises(kind, match=rf"{name} .*{said}"):
        read_verified(str(tmp_path), read_manifest(str(tmp_path), NAME), "__0_0.distcp")


@pytest.mark.parametrize("block", [0, 1, 1 << 40])
def test_blocks_that_cost_more_than_their_bytes_are_refused(block: int) -> None:
    with pytest.raises(ValidationError, match="block"):
        CheckpointFile(path="__0_0.distcp", bytes=5, sha256="0" * 64, block=block)


@pytest.mark.parametrize("field", ["step", "world_size"])
def test_numbers_that_nothing_can_hold_are_refused(field: str, tmp_path: Path) -> None:
    for changes in ({field: 10**400}, {"files": (_huge_file(),)}):
        draft = CheckpointManifest.model_construct(**content(**changes), format=1, fingerprint="")
        write_manifest(str(tmp_path), draft)
        with pytest.raises(ValueError, match="MANIFEST.json is wrong at .*less than or equal"):
            read_manifest(str(tmp_path), NAME)


def _huge_file() -> CheckpointFile:
    return CheckpointFile.model_construct(path="a", bytes=10**400, sha256="0" * 64, block=None)
