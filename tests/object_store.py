"""An object store as unkind as they come, on a directory that several processes share.

Objects appear whole when they are closed. Nothing can be renamed, moved or copied, there are no
directories, and a listing tells of what was written or deleted only after a while; a look at an
object itself always tells the truth. About every n-th request finds the connection broken, with n
from `OBJECT_STORE_BREAKS`.
"""

import errno
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

LAG_S = 1.0
"""Seconds until a listing tells of a change."""
DELETED = ".deleted"
BREAKS = "OBJECT_STORE_BREAKS"


class ObjectStore(AbstractFileSystem):
    """`objects:///directory!/key`, whose objects are files of `directory`, named by their key."""

    protocol = "objects"
    cachable = False
    requests = 0
    """Of this process, as each call of `configs.storage` makes a store of its own."""

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return str(path).removeprefix("objects://").rstrip("/")

    @staticmethod
    def _place(path: str) -> Path:
        bucket, _, key = path.partition("!/")
        return Path(bucket) / quote(key, safe="")

    def _request(self) -> None:
        ObjectStore.requests += 1
        every = int(os.environ.get(BREAKS, "0"))
        scattered = (self.requests * 2_654_435_761 >> 7) % 4_294_967_296
        if every and scattered % every == 0:
            raise ConnectionResetError(errno.ECONNRESET, "the store hung up")

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> "_Object":
        if mode not in ("rb", "wb"):
            raise NotImplementedError(f"objects are not opened to {mode}")
        return _Object(self, path, mode, **kwargs)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        self._request()
        path = self._strip_protocol(path)
        place = self._place(path)
        if place.is_file():
            stat = place.stat()
            return {"name": path, "size": stat.st_size, "type": "file", "mtime": stat.st_mtime}
        if self._listed(path):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(errno.ENOENT, "no such object", path)

    def _listed(self, path: str) -> dict[str, int]:
        """Keys below a prefix → bytes, as they were a while ago."""
        bucket, _, prefix = path.partition("!/")
        prefix = f"{prefix}/" if prefix else ""
        found: dict[str, int] = {}
        now = time.time()
        for place in Path(bucket).glob("*"):
            name = place.name.removesuffix(DELETED)
            key = unquote(name)
            stat = place.stat()
            old = now - stat.st_mtime >= LAG_S
            if key.startswith(prefix) and old != place.name.endswith(DELETED):
                found[f"{bucket}!/{key}"] = stat.st_size
        return found

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        self._request()
        path = self._strip_protocol(path)
        bare = path if "!/" in path else f"{path}!/".replace("!!", "!")
        found: dict[str, dict[str, Any]] = {}
        base = bare.rstrip("/") + ("/" if not bare.endswith("!/") else "")
        for key, size in self._listed(bare).items():
            rest = key.removeprefix(base)
            first, _, below = rest.partition("/")
            name = base + first
            kind = "directory" if below else "file"
            found[name] = {"name": name, "size": 0 if below else size, "type": kind}
        if not found:
            if self._place(path).is_file():
                return [self.info(path)] if detail else [path]
            raise FileNotFoundError(errno.ENOENT, "nothing is listed below", path)
        return list(found.values()) if detail else sorted(found)

    def rm_file(self, path: str) -> None:
        self._request()
        place = self._place(self._strip_protocol(path))
        place.unlink()
        place.with_name(place.name + DELETED).touch()

    _rm = rm_file

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no directories."""

    mkdir = makedirs

    def rmdir(self, path: str) -> None:
        """There are no directories."""

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("an object cannot be renamed, moved or copied")

    mv = move = rename = cp_file = copy = mv_file = _refuse


class _Object(AbstractBufferedFile):
    """Written to the side, and there when it is closed."""

    def __init__(self, fs: ObjectStore, path: str, mode: str, **kwargs: Any) -> None:
        super().__init__(fs, path, mode, **{**kwargs, "cache_type": "none"})
        self._store = fs

    def _initiate_upload(self) -> None:
        place = ObjectStore._place(self.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent.parent)
        self._side = os.fdopen(handle, "wb"), name

    def _upload_chunk(self, final: bool = False) -> bool:
        stream, name = self._side
        stream.write(self.buffer.getvalue())
        if final:
            stream.close()
            place = ObjectStore._place(self.path)
            os.replace(name, place)
            place.with_name(place.name + DELETED).unlink(missing_ok=True)
        return True

    def _fetch_range(self, start: int, end: int) -> bytes:
        self._store._request()
        with ObjectStore._place(self.path).open("rb") as stream:
            stream.seek(start)
            return stream.read(end - start)


def bucket(directory: Path) -> str:
    """URL of an empty bucket on a directory; registers the store in this process."""
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    directory.mkdir(parents=True, exist_ok=True)
    return f"objects://{directory}!/run"
