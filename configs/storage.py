"""Files of a run on any fsspec URL: paths, hashes, and JSON that is either whole or absent.

Nothing is renamed on an object store, and nothing is believed of a listing that a look at the file
itself can tell. What fails in passing is tried again (`storage_faults`).
"""

import errno
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from configs.storage_faults import explained, open_regular, patiently
from configs.storage_removal import remove_tree

CHUNK = 4 << 20
HASHED_AT_ONCE = 16 << 20
SEAL = "sha256"
"""Key of a sealed JSON object: the fingerprint of all its others."""
DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}
"""What fsspec needs besides itself for a kind of URL."""


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `url` and the path inside it.

    Raises:
        ValueError: nothing here can open such a URL; the sentence says what to install.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, OSError, ValueError) as error:
        scheme = url.split("://", 1)[0]
        package = DRIVERS.get(scheme)
        mend = f"run `.venv/bin/pip install {package}`" if package else "check the address"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{url!r} cannot be opened ({reason}); {mend}") from error
    return fs, path


def is_local(url: str) -> bool:
    """Whether `url` lies on this machine's own file systems (which may still be shared mounts)."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def refuse_memory(key: str, url: str) -> None:
    """Refuse what no other process could see, where a run's data shall go.

    Raises:
        ValueError: names the recipe's `key`, the URL and the mend.
    """
    if isinstance(filesystem(url)[0], MemoryFileSystem):
        raise ValueError(
            f"{key}={url!r} is memory of this process, which workers cannot see; use a directory "
            "or an object store (s3://…, gs://…)"
        )


def absolute(url: str) -> str:
    """`url` with a local path made absolute, so that workers in other directories agree on it."""
    return os.path.abspath(filesystem(url)[1]) if is_local(url) else url


def resolved(url: str) -> str:
    """`absolute`, and for a local path where its links lead: equal for equal places."""
    return os.path.realpath(absolute(url)) if is_local(url) else absolute(url).rstrip("/")


def join(url: str, *parts: str) -> str:
    """Append path parts; a part that climbs out of `url`, or chains to another, is refused."""
    for part in parts:
        if part.startswith("/") or ".." in part.split("/") or "://" in part or "::" in part:
            raise ValueError(f"path {part!r} leaves {url!r}: only names below it are allowed")
    return "/".join([url.rstrip("/"), *parts])


def inside(root: str, path: str) -> str:
    """`path` below `root`, as `join`, which no link on the way leads out of either.

    Raises:
        ValueError: it leads out; the sentence names both ends.
    """
    url = join(root, path)
    if is_local(root):
        top, real = (os.path.realpath(filesystem(place)[1]) for place in (root, url))
        if os.path.commonpath([top, real]) != top:
            raise ValueError(
                f"{url} is a link to {real}, which lies outside {root}: nothing is read from "
                "there; put the file itself in its place"
            )
    return url


def exists(url: str) -> bool:
    """Whether a file or directory is there, by a look at it and not at an earlier listing.

    A look that fails is no answer: fsspec's own `exists` would say that nothing is there.

    Raises:
        StorageError: the storage gives none.
    """
    fs, path = filesystem(url)
    fs.invalidate_cache(path)
    try:
        with explained(url, "read"):
            patiently(lambda: fs.info(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size(url: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    fs, path = filesystem(url)
    fs.invalidate_cache(path)
    with explained(url, "read"):
        return int(patiently(lambda: fs.size(path)))


def make_directory(url: str) -> None:
    """Create a directory and its parents.

    Raises:
        ValueError: it cannot be created there.
    """
    fs, path = filesystem(url)
    try:
        patiently(lambda: fs.makedirs(path, exist_ok=True))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"directory {url!r} cannot be created: {reason}; choose another"
        ) from error
    except Exception as error:  # as drivers raise for want of credentials
        with explained(url, "written"):
            raise error


def remove(url: str) -> None:
    """Delete a file, a link or a directory tree, all that is listed of it; absent is fine.

    Raises:
        StorageError: some may be left, as the storage refuses or does not answer.
    """
    with explained(url, "removed"):
        remove_tree(*filesystem(url))


def list_names(url: str) -> list[str]:
    """Sorted names directly below a directory; empty if it does not exist."""
    fs, path = filesystem(url)
    fs.invalidate_cache(path)
    try:
        with explained(url, "read"):
            entries = patiently(lambda: fs.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    marker = path.strip("/") + "/"  # some stores list a directory's own
    names = (entry.rstrip("/") for entry in entries if entry.lstrip("/") != marker)
    return sorted(name.rsplit("/", 1)[-1] for name in names)


def sha256_bytes(data: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(url: str) -> str:
    """Hex digest of a file; the next chunk is read while one is hashed."""
    digest = hashlib.sha256()
    with open_to_read(url) as stream:
        chunk = stream.read(HASHED_AT_ONCE)
        if len(chunk) < HASHED_AT_ONCE:
            return sha256_bytes(chunk)
        with ThreadPoolExecutor(1) as ahead:
            while chunk:
                following = ahead.submit(stream.read, HASHED_AT_ONCE)
                digest.update(chunk)
                chunk = following.result()
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Hex digest of a JSON-able value, independent of key order."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def open_to_read(url: str) -> IO[bytes]:
    """A binary file to read and seek in, and to close; on other machines' storage it reads on
    where a connection broke.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no regular file.
        StorageError: there is no right to read it.
    """
    fs, path = filesystem(url)
    with explained(url, "read"):
        if isinstance(fs, LocalFileSystem):
            return open_regular(path)
        return io.BufferedReader(_PatientFile(fs, path))


class _PatientFile(io.RawIOBase):
    """A file of an fsspec store that is opened again where reading broke off."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs, self._path = fs, path
        self._place = 0
        self._stream: Any = patiently(self._opened)
        self._size = int(self._stream.seek(0, io.SEEK_END))
        self._stream.seek(0)

    def _opened(self) -> Any:
        return self._fs.open(self._path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = patiently(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        if self._stream is None:
            self._stream = self._opened()
        try:
            self._stream.seek(self._place)
            return bytes(self._stream.read(count))
        except Exception:
            self._stream = None
            raise

    def close(self) -> None:
        if self._stream is not None and not self.closed:
            self._stream.close()
        super().close()


@contextmanager
def open_to_write(url: str) -> Iterator[IO[bytes]]:
    """A new binary file, which a local disk holds for good when it is closed.

    A write takes all it is given or raises, as a raw file's does not. What is written in part is no
    file of anything until a manifest names it.

    Raises:
        StorageError: the place is full or may not be written.
    """
    fs, path = filesystem(url)
    with explained(url, "written"):
        if not isinstance(fs, LocalFileSystem):
            with patiently(lambda: fs.open(path, "wb")) as stream:
                yield stream
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())


def write_bytes(url: str, data: bytes) -> None:
    """Write a file that appears whole or not at all.

    Local: temporary file, fsync, rename. Object stores publish an object only when it is complete.

    Raises:
        StorageError: the place is full or may not be written.
    """
    with explained(url, "written"):
        patiently(lambda: _write_whole(url, data))


def _write_whole(url: str, data: bytes) -> None:
    fs, path = filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_directory(directory)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _sync_directory(path: str) -> None:
    """Make names in a directory outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some mounted stores sync no directory
            raise
    finally:
        os.close(handle)


def read_bytes(url: str) -> bytes:
    """The whole content of a (small) file.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: the storage refuses, or does not answer.
        OSError: a disk is broken.
    """
    with explained(url, "read"):
        return patiently(lambda: _read_whole(url))


def _read_whole(url: str) -> bytes:
    fs, path = filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        return bytes(fs.cat_file(path))
    with open_regular(path) as stream:
        return stream.read()


def write_json(url: str, value: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    write_bytes(url, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def read_json(url: str) -> Any:
    """Parse a JSON file; a damaged one raises a ValueError that names it."""
    return parse_json(read_bytes(url), url)


def parse_json(data: bytes, url: str) -> Any:
    """As `read_json`, of the content of `url` that is at hand."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # also of numbers too long, and nested too deep
        raise ValueError(f"{url} is not valid JSON ({error}); delete it or restore it") from error


def write_sealed(url: str, value: dict[str, Any]) -> None:
    """As `write_json`, of an object that tells by itself whether it was changed since."""
    plain = json.loads(json.dumps(value))
    write_json(url, plain | {SEAL: fingerprint(plain)})


def read_sealed(url: str) -> dict[str, Any]:
    """What `write_sealed` was given; files of before there were seals are taken as they are.

    Raises:
        ValueError: it is damaged, in a sentence that names it.
    """
    value = read_json(url)
    if not isinstance(value, dict):
        raise ValueError(f"{url} is damaged (it holds no object); delete it or restore it")
    seal = value.pop(SEAL, None)
    if seal is not None and seal != fingerprint(value):
        raise ValueError(f"{url} is damaged (it was changed since); delete it or restore it")
    return value
