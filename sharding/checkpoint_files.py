"""How DCP reads and writes a checkpoint's files: on any file system, hashed on the way out.

Hashing what is written, not what is read back, also catches what the disk changed in between.
"""

import hashlib
import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, Any

from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from configs import storage
from sharding.checkpoint_manifest import CheckpointFile


class _HashingStream(io.RawIOBase):
    """Passes writes on and hashes them; DCP writes strictly forward."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """First failed write; torch's writer of archives tells of it in its own words."""
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._stream.write(view)
        except OSError as error:
            self.error = self.error or error
            raise
        self._digest.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.error = self.error or error
            raise

    def fileno(self) -> int:
        return self._stream.fileno()

    def entry(self, name: str) -> CheckpointFile:
        """What the manifest says of this file."""
        return CheckpointFile(path=name, bytes=self._size, sha256=self._digest.hexdigest())


class CheckpointFiles(FileSystem):
    """DCP's view of one checkpoint's directory; paths are URLs directly below it."""

    def __init__(self) -> None:
        self.written: dict[str, CheckpointFile] = {}
        """Files this process wrote, by name."""
        self.error: OSError | None = None
        """First failed write of this process; DCP may wrap it beyond recognition."""

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        fs, place = storage.filesystem(str(path))
        stream: _HashingStream | None = None
        try:
            with fs.open(place, mode) as raw:
                if mode == "rb":
                    yield raw
                    return
                stream = _HashingStream(raw)
                yield stream
        except Exception as error:
            told = error if isinstance(error, OSError) else None
            if told is None and stream is not None:
                told = stream.error
            self.error = self.error or told
            raise
        assert stream is not None, "what is read returned above"
        self.written[_name(path)] = stream.entry(_name(path))

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        fs, place = storage.filesystem(str(path))
        fs.mv(place, storage.filesystem(str(new_path))[1])
        entry = self.written.pop(_name(path))
        self.written[_name(new_path)] = entry.model_copy(update={"path": _name(new_path)})

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return storage.join(str(path), suffix)

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        storage.make_directory(str(path))

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return storage.exists(str(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        storage.remove(str(path))


class CheckpointWriter(FileSystemWriter):
    """DCP writer into directory `url`; `files.written` then has the hashes."""

    def __init__(self, url: str) -> None:
        # Object stores have nothing to fsync, and DCP would sync the whole machine instead.
        super().__init__(url, sync_files=storage.is_local(url), overwrite=False)
        self.files = CheckpointFiles()
        self.fs, self.path = self.files, url


class CheckpointReader(FileSystemReader):
    """DCP reader of directory `url` that takes metadata already read safely."""

    def __init__(self, url: str, metadata: Metadata) -> None:
        super().__init__(url)
        self.fs, self.path = CheckpointFiles(), url
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class TensorLoadPlanner(DefaultLoadPlanner):
    """Loads tensors into a flat dict, in place; never unpickles anything."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("safe_metadata lets no pickled entries through")


def _name(path: str | os.PathLike[str]) -> str:
    return str(path).rsplit("/", 1)[-1]
