"""Storage: what passes is tried again, what does not is a sentence, and object stores suffice."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from configs import storage, storage_faults
from configs.storage_faults import StorageError, is_passing, patiently
from configs.storage_listing import globbed
from data_loaders.matching import matching_files
from tests import object_store
from tests.faults.trainings import small_disk
from tests.object_store import BREAKS, DELETED, ObjectStore, bucket


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_faults, "WAITS_S", (0.0,) * 6)


class NoCredentialsError(Exception):
    """As botocore's, which is no OSError."""


class HttpError(Exception):
    """As gcsfs's."""

    def __init__(self, code: int) -> None:
        super().__init__(f"HTTP {code}")
        self.code = code


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, code: int) -> None:
        super().__init__(f"HTTP {code}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": code}}


def translated(cause: Exception) -> OSError:
    error = OSError(errno.EIO, "internal error")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.EBUSY, "slow down"), True),
        (HttpError(503), True),
        (HttpError(429), True),
        (translated(ClientError(500)), True),
        (translated(ClientError(403)), False),
        (OSError(errno.EIO, "a disk"), False),
        (OSError(errno.ENOSPC, "full"), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ValueError("503"), False),
    ],
)
def test_what_passes_is_tried_again_and_nothing_else(error: Exception, passing: bool) -> None:
    calls = []

    def fails_twice() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise error
        return 7

    assert is_passing(error) == passing
    if passing:
        assert patiently(fails_twice) == 7 and len(calls) == 3
    else:
        with pytest.raises(type(error)):
            patiently(fails_twice)
        assert len(calls) == 1


@pytest.mark.parametrize(
    ("cause", "raised", "attempts"),
    [
        (HttpError(503), HttpError, len(storage_faults.WAITS_S) + 1),
        (ConnectionRefusedError(), ConnectionRefusedError, len(storage_faults.WAITS_S) + 1),
        (HttpError(403), HttpError, 1),
        (HttpError(404), FileNotFoundError, 1),
        (None, FileNotFoundError, 1),
    ],
)
def test_no_answer_is_no_missing_file(
    cause: Exception | None, raised: type[Exception], attempts: int
) -> None:
    """The driver of http says of every failure that there is no file."""
    calls = []

    def fails() -> None:
        calls.append(1)
        raise FileNotFoundError("there") from cause

    with pytest.raises(raised):
        patiently(fails)
    assert len(calls) == attempts


def test_patience_ends() -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise TimeoutError("never")

    with pytest.raises(TimeoutError, match="never"):
        patiently(fails)
    assert len(calls) == len(storage_faults.WAITS_S) + 1


class FailingStore(MemoryFileSystem):
    """Memory whose every request fails in one way."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012 - as the base class has it
    pseudo_dirs = [""]  # noqa: RUF012
    error: Exception = OSError()

    def _fail(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error

    _open = cat_file = pipe_file = ls = info = isdir = _fail


CALLS: dict[str, Callable[[str], Any]] = {
    "read": storage.read_bytes,
    "list": storage.list_names,
    "look": storage.exists,
    "write": lambda url: storage.write_bytes(url, b"x"),
    "match": lambda url: matching_files(url, "data.source.url"),
    "stream": lambda url: storage.open_to_write(url).__enter__(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoCredentialsError("Unable to locate credentials"), "takes no credentials.*AWS_PROFILE"),
        (HttpError(401), "takes no credentials.*every node, never in the URL"),
        (PermissionError(errno.EACCES, "Access Denied"), r"\(Access Denied\); grant rights"),
        (HttpError(403), "grant rights there"),
        (OSError(errno.ENOSPC, "No space left on device"), "free space there, or put `output`"),
        (HttpError(507), "free space there"),
        (HttpError(503), "did not answer, however often it was asked"),
        (OSError(errno.ESTALE, "Stale file handle"), "did not answer"),
    ],
)
def test_what_the_user_must_mend_is_one_sentence(call: str, error: Exception, said: str) -> None:
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    FailingStore.error = error
    with pytest.raises(StorageError, match=said) as told:
        CALLS[call]("failing://bucket/x")
    assert "failing://bucket/x cannot be" in str(told.value) and "\n" not in str(told.value)


def test_a_directory_in_the_place_of_a_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="it is a directory; name a file"):
        storage.read_bytes(str(tmp_path))


def test_what_is_no_file_is_neither_waited_for_nor_followed_in_circles(tmp_path: Path) -> None:
    pipe, circle = tmp_path / "pipe", tmp_path / "circle"
    os.mkfifo(pipe)
    circle.symlink_to(circle)
    for read in (storage.open_to_read, storage.read_bytes):
        with pytest.raises(ValueError, match="pipe is no regular file: put the file itself in its"):
            read(str(pipe))
        with pytest.raises(StorageError, match=r"circle cannot be read \(Too many levels of symb"):
            read(str(circle))
    with pytest.raises(StorageError, match="put what the link stands for in its place"):
        storage.exists(str(circle))


def test_a_local_file_without_rights_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    for call in (storage.read_bytes, lambda url: storage.write_bytes(url, b"x")):
        with pytest.raises(StorageError, match="Permission denied.*grant rights"):
            call(str(tmp_path / "x"))


@pytest.mark.parametrize("breaks", [0, 9, 4])
def test_an_object_store_with_broken_connections_suffices(
    breaks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BREAKS, str(breaks))
    root = bucket(tmp_path / "bucket")
    data = bytes(range(256)) * 100_000
    url = storage.join(root, "a", "b.bin")
    storage.write_bytes(url, data)
    assert storage.exists(url) and storage.size(url) == len(data)
    assert storage.read_bytes(url) == data
    assert storage.sha256_file(url) == storage.sha256_bytes(data)
    with storage.open_to_read(url) as stream:
        stream.seek(-256, 2)
        assert stream.read() == bytes(range(256))
        assert stream.seek(256_001) and stream.read(3) == b"\x01\x02\x03"
    with storage.open_to_write(storage.join(root, "c")) as out:
        out.write(data)
    assert storage.read_bytes(storage.join(root, "c")) == data
    storage.write_sealed(storage.join(root, "d"), {"x": 1})
    assert storage.read_sealed(storage.join(root, "d")) == {"x": 1}
    storage.remove(url)
    assert not storage.exists(url)
    storage.remove(url)


@pytest.mark.parametrize("at", [1, 3, 8])
def test_a_tree_is_gone_whatever_request_breaks(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the broken attempt removed is listed on, and keeps the next from none of the rest."""
    root = bucket(tmp_path / "bucket")
    tree = storage.join(root, "a[b]")
    for name in ("x/1", "x/2", "y/deep/3", "y/4", "5"):
        storage.write_bytes(storage.join(tree, name), b"x")
    storage.write_bytes(storage.join(root, "ab", "1"), b"of another")
    for place in (tmp_path / "bucket").iterdir():
        os.utime(place, (0, 0))
    monkeypatch.setattr(object_store, "LAG_S", 3600)
    requests = iter(range(1, 1_000))

    def one_breaks(self: ObjectStore) -> None:
        if next(requests) == at:
            raise ConnectionResetError(errno.ECONNRESET, "the store hung up")

    monkeypatch.setattr(ObjectStore, "_request", one_breaks)
    storage.remove(tree)
    left = [place.name for place in (tmp_path / "bucket").iterdir() if DELETED not in place.name]
    assert left == ["run%2Fab%2F1"]


@pytest.mark.parametrize("pattern", ["", "/**/*.csv", "/*/*.csv"])
@pytest.mark.parametrize("at", range(1, 7))
def test_no_part_of_a_tree_passes_for_the_whole(
    pattern: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing that breaks once is asked for again; one that is refused is said."""
    monkeypatch.setattr(object_store, "LAG_S", 0)
    tree = storage.join(bucket(tmp_path / "bucket"), "logs")
    names = ["2026/a.csv", "2026/b.csv", "2027/c.csv"]
    for name in names:
        storage.write_bytes(storage.join(tree, name), b"x")
    requests = iter(range(1, 1_000))

    def one_breaks(self: ObjectStore) -> None:
        if next(requests) == at:
            raise ConnectionResetError(errno.ECONNRESET, "the store hung up")

    monkeypatch.setattr(ObjectStore, "_request", one_breaks)
    found = matching_files(tree + pattern, "data.source.url")
    assert [name for _, _, name in found] == names
    ls = ObjectStore.ls

    def refuses(self: ObjectStore, path: str, *args: Any, **more: Any) -> Any:
        if path.endswith("2027"):
            raise PermissionError(errno.EACCES, "Access Denied")
        return ls(self, path, *args, **more)

    monkeypatch.setattr(ObjectStore, "ls", refuses)
    with pytest.raises(StorageError, match="grant rights"):
        matching_files(tree + pattern, "data.source.url")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.csv", ["a.csv"]),
        ("*/*.csv", ["x/b.csv", "x/c1.csv"]),
        ("**/*.csv", ["a.csv", "x/b.csv", "x/c1.csv", "x/y/d.csv"]),
        ("x/c[0-9].cs?", ["x/c1.csv"]),
        ("x/*", ["x/b.csv", "x/c1.csv", "x/e.txt"]),
        ("[x]/**/d.csv", ["x/y/d.csv"]),
        ("z*", []),
    ],
)
def test_globs(
    pattern: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "LAG_S", 0)
    for root in (str(tmp_path / "local"), storage.join(bucket(tmp_path / "bucket"), "r")):
        for name in ("a.csv", "x/b.csv", "x/c1.csv", "x/e.txt", "x/y/d.csv"):
            storage.make_directory(storage.join(root, name).rpartition("/")[0])
            storage.write_bytes(storage.join(root, name), b"x")
        fs, path = storage.filesystem(storage.join(root, pattern))
        begin = storage.filesystem(root)[1] + "/"
        assert sorted(name.removeprefix(begin) for name in globbed(fs, path)) == expected
        theirs = [name for name in fs.glob(path) if fs.isfile(name)]
        assert sorted(name.removeprefix(begin) for name in theirs) == expected


def test_a_glob_looks_only_where_it_may_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("day1/x.csv", "private/x.csv", "day2/deep/x.csv"):
        storage.write_bytes(str(tmp_path / name), b"x")
    looked = []
    ls = LocalFileSystem.ls

    def noted(self: LocalFileSystem, path: str, *args: Any, **more: Any) -> Any:
        looked.append(os.path.basename(path))
        if path.endswith("day2"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return ls(self, path, *args, **more)

    monkeypatch.setattr(LocalFileSystem, "ls", noted)
    found = matching_files(str(tmp_path / "day1*" / "*.csv"), "data.source.url")
    assert [name for _, _, name in found] == ["day1/x.csv"] and looked[1:] == ["day1"]
    with pytest.raises(StorageError, match=r"/day2 cannot be read \(Permission denied\); grant"):
        matching_files(str(tmp_path / "day*" / "*.csv"), "data.source.url")


def test_links_to_directories_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    for name in ("in/a.csv", "real/b.csv"):
        storage.write_bytes(str(tmp_path / name), b"x")
    (tmp_path / "in" / "day2").symlink_to("../real")
    (tmp_path / "in" / "around").symlink_to(".")
    (tmp_path / "in" / "c.csv").symlink_to("../real/b.csv")
    for pattern, expected in (
        ("", ["a.csv", "c.csv", "day2/b.csv"]),
        ("/*/b.csv", ["day2/b.csv"]),
        ("/**/b.csv", ["day2/b.csv"]),
    ):
        found = matching_files(f"{tmp_path}/in{pattern}", "data.source.url")
        assert [name for _, _, name in found] == expected
        assert all(storage.read_bytes(path) == b"x" for _, path, _ in found)


def test_a_directory_is_listed_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    for name in ("in/a/1.csv", "in/b/2.csv", "in/day/3.csv", "out/deep/4.csv"):
        storage.write_bytes(str(tmp_path / name), b"x")
    links = {"a/x": "../b", "a/x2": "../b", "b/y": "../a", "b/y2": "../a", "a-latest": "day"}
    links |= {"out1": "../out", "out2": "../out", "out3": "../out/deep"}
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    expected = ["a/1.csv", "b/2.csv", "day/3.csv", "out1/deep/4.csv"]
    for pattern in ("", "/**", "/**/*.csv", "/**/**/*.csv"):
        found = matching_files(f"{tmp_path}/in{pattern}", "data.source.url")
        assert sorted(name for _, _, name in found) == expected, pattern
    found = matching_files(f"{tmp_path}/in/*/3.csv", "data.source.url")
    assert [name for _, _, name in found] == ["a-latest/3.csv", "day/3.csv"]


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "real" / "file"), b"x")
    for target in ("real", "real/file", "nowhere"):
        link = tmp_path / "link"
        link.symlink_to(target)
        storage.remove(str(link))
        assert not link.is_symlink()
    assert (tmp_path / "real" / "file").exists()
    for absent in ("link", "real/file/below", "nowhere/below"):
        storage.remove(str(tmp_path / absent))


def test_a_tree_that_others_remove_too_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree" / "below").mkdir(parents=True)
    (tmp_path / "tree" / "file").write_text("x")
    rmtree, calls = shutil.rmtree, []

    def meets_another(path: str) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise FileNotFoundError(errno.ENOENT, "gone by now", "below")
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", meets_another)
    storage.remove(str(tmp_path / "tree"))
    assert not (tmp_path / "tree").exists()


def test_seals_tell_changes(tmp_path: Path) -> None:
    url = str(tmp_path / "sealed.json")
    storage.write_sealed(url, {"b": (1, 2.5), "a": None, "10": 1, "9": float("nan")})
    assert storage.read_sealed(url)["b"] == [1, 2.5]
    text = (tmp_path / "sealed.json").read_text()
    (tmp_path / "sealed.json").write_text(text.replace("2.5", "2.6"))
    with pytest.raises(ValueError, match=r"sealed.json is damaged \(it was changed since\)"):
        storage.read_sealed(url)
    (tmp_path / "sealed.json").write_text('{"old": 1}')
    assert storage.read_sealed(url) == {"old": 1}
    (tmp_path / "sealed.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no object"):
        storage.read_sealed(url)


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    (outside / "file").write_text("x")
    (root / "real" / "file").write_text("y")
    (root / "within").symlink_to(root / "real")
    (root / "out").symlink_to(outside)
    (tmp_path / "alias").symlink_to(root)
    assert storage.read_bytes(storage.inside(str(root), "within/file")) == b"y"
    assert storage.read_bytes(storage.inside(str(tmp_path / "alias"), "real/file")) == b"y"
    with pytest.raises(ValueError, match="outside .*root: nothing is read"):
        storage.inside(str(root), "out/file")
    for path in ("../outside/file", "/etc/passwd", "a::memory", "s3://b/c"):
        with pytest.raises(ValueError, match="leaves"):
            storage.inside(str(root), path)


def test_a_disk_that_fills_within_a_write_is_told(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        url = str(disk / "file")
        with pytest.raises(StorageError, match="No space"), storage.open_to_write(url) as stream:
            stream.write(bytes(30_000))
            stream.write(bytes(60_000))  # of which a raw file takes a half, and says so to nobody
