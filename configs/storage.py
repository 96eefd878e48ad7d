"""Files of a run on any fsspec URL: paths, hashes, and JSON that is either whole or absent."""

import errno
import hashlib
import json
import os
import uuid
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

CHUNK = 4 << 20
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


def join(url: str, *parts: str) -> str:
    """Append path parts; a part that climbs out of `url` is refused."""
    for part in parts:
        if part.startswith("/") or ".." in part.split("/") or "://" in part:
            raise ValueError(f"path {part!r} leaves {url!r}: only names below it are allowed")
    return "/".join([url.rstrip("/"), *parts])


def exists(url: str) -> bool:
    """Whether a file or directory is there."""
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def make_directory(url: str) -> None:
    """Create a directory and its parents.

    Raises:
        ValueError: it cannot be created there.
    """
    fs, path = filesystem(url)
    try:
        fs.makedirs(path, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"directory {url!r} cannot be created: {reason}; choose another"
        ) from error


def remove(url: str) -> None:
    """Delete a file or a directory tree; absent is fine."""
    fs, path = filesystem(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def list_names(url: str) -> list[str]:
    """Sorted names directly below a directory; empty if it does not exist."""
    fs, path = filesystem(url)
    if not fs.exists(path):
        return []
    fs.invalidate_cache(path)
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))


def sha256_bytes(data: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(url: str) -> str:
    """Hex digest of a file, read in chunks."""
    fs, path = filesystem(url)
    digest = hashlib.sha256()
    with fs.open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Hex digest of a JSON-able value, independent of key order."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


class StorageFullError(OSError, ValueError):
    """There is no room to write, or no right to: a sentence that names the place and the mend."""


def write_bytes(url: str, data: bytes) -> None:
    """Write a file that appears whole or not at all.

    Local: temporary file, fsync, rename. Object stores publish an object only when it is complete.

    Raises:
        StorageFullError: the place is full or may not be written.
    """
    try:
        _write_whole(url, data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise StorageFullError(
            f"{url} cannot be written ({error.strerror}); free space or grant rights there, or put "
            "`output` elsewhere, and run the same command again"
        ) from error


def _write_whole(url: str, data: bytes) -> None:
    fs, path = filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        with fs.open(path, "wb") as stream:
            stream.write(data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read_bytes(url: str) -> bytes:
    """The whole content of a (small) file."""
    fs, path = filesystem(url)
    with fs.open(path, "rb") as stream:
        return bytes(stream.read())


def write_json(url: str, value: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    write_bytes(url, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(url: str) -> Any:
    """Parse a JSON file; a damaged one raises a ValueError that names it."""
    try:
        return json.loads(read_bytes(url))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{url} is not valid JSON ({error}); delete it or restore it") from error
