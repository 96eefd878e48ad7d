"""Large files, written and hashed in blocks: several at a time, and past the page cache.

A file's hash is that of its blocks' SHA-256 digests, one after the other, so that threads share the
work: one of them hashes more slowly than a good disk writes.

Local files are written directly (`O_DIRECT`) where the file system can. The process that wrote a
checkpoint does not read it again; in the page cache it would take memory that training may need,
and cost a second copy: where free pages were never touched, or are given back to a machine's host,
finding them takes several times as long as the disk.
"""

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from typing import IO, Any, Protocol

import numpy as np

from configs import storage

BLOCK_BYTES = 8 << 20
SECTOR_BYTES = 4096
"""Addresses, offsets and lengths of direct writes are multiples of it: what any disk asks for."""
NUM_BUFFERS = 4
"""Blocks in flight: one is filled or read while others are hashed and written."""
HASHING_THREADS = min(2, max(1, (os.cpu_count() or 1) - 1))
"""More than one only where the thread that writes keeps a core of its own."""


class BlockWriter:
    """Takes bytes from front to back; hashes and writes them in blocks behind the caller."""

    def __init__(self, sink: "_Sink") -> None:
        self._sink = sink
        self._memory = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(NUM_BUFFERS)]
        self._buffers = [np.frombuffer(each, dtype=np.uint8) for each in self._memory]
        self._busy: list[tuple[Future[Any], ...]] = [()] * NUM_BUFFERS
        self._digests: list[Future[bytes]] = []
        self._hashing, self._writing = ThreadPoolExecutor(HASHING_THREADS), ThreadPoolExecutor(1)
        self._current = self._filled = 0
        self.size = 0
        """Bytes that were given."""

    def write(self, data: Any) -> None:
        """All of `data`, bytes; they are copied. Raises OSError where a write before failed."""
        source, begin = np.frombuffer(data, dtype=np.uint8), 0
        self.size += len(source)
        while begin < len(source):
            if not self._filled:
                self._wait_for(self._current)
            count = min(BLOCK_BYTES - self._filled, len(source) - begin)
            # Not by memoryview, whose copies keep Python's other threads, training's, waiting.
            buffer = self._buffers[self._current]
            buffer[self._filled : self._filled + count] = source[begin : begin + count]
            self._filled += count
            begin += count
            if self._filled == BLOCK_BYTES:
                self._submit()

    def finish(self) -> str:
        """Have the rest written, and kept for good; the file's hash, as of `block_digest`."""
        if self._filled:
            self._submit()
        for number in range(NUM_BUFFERS):
            self._wait_for(number)
        self._sink.finish(self.size)
        return _combined(self._digests)

    def close(self) -> None:
        """End the threads."""
        self._hashing.shutdown()
        self._writing.shutdown()

    def _submit(self) -> None:
        memory, number = self._memory[self._current], self._current
        block = memoryview(memory)[: self._filled]
        hashed = self._hashing.submit(_digest, block)
        written = self._writing.submit(self._sink.put, memory, self._filled)
        self._digests.append(hashed)
        self._busy[number] = (hashed, written)
        self._current, self._filled = (number + 1) % NUM_BUFFERS, 0

    def _wait_for(self, number: int) -> None:
        busy, self._busy[number] = self._busy[number], ()
        for each in busy:
            each.result()


class _Sink(Protocol):
    """Where blocks go, one after the other."""

    def put(self, memory: mmap.mmap, count: int) -> None:
        """Write the first `count` bytes of a block's memory."""

    def finish(self, size: int) -> None:
        """All `size` bytes were put."""


class _StreamSink:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def put(self, memory: mmap.mmap, count: int) -> None:
        block = memoryview(memory)[:count]
        while len(block):  # a raw file may take less than it was given
            block = block[self._stream.write(block) :]

    def finish(self, size: int) -> None:
        """The stream's owner closes it."""


class _DirectSink:
    """A local file, past the page cache where its file system takes direct writes."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._offset = 0

    def put(self, memory: mmap.mmap, count: int) -> None:
        whole = -(-count // SECTOR_BYTES) * SECTOR_BYTES  # what is too much is cut off at the end
        block = memoryview(memory)[:whole]
        while len(block):
            try:
                written = os.pwrite(self._handle, block, self._offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not _is_direct(self._handle):
                    raise
                _leave_direct(self._handle)
                continue
            if written % SECTOR_BYTES:  # of a disk that is nearly full; the next write says so
                _leave_direct(self._handle)
            block, self._offset = block[written:], self._offset + written

    def finish(self, size: int) -> None:
        os.ftruncate(self._handle, size)
        os.fsync(self._handle)


@contextmanager
def block_writer(url: str) -> Iterator[BlockWriter]:
    """Writes a new file; what is written in part is no file of anything until a manifest names it.

    Raises:
        StorageError: the place is full or may not be written.
    """
    if not storage.is_local(url):
        with (
            storage.open_to_write(url) as stream,
            _closing(BlockWriter(_StreamSink(stream))) as out,
        ):
            yield out
        return
    path = storage.filesystem(url)[1]
    with storage.explained(url, "written"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle = _open_direct(path)
        try:
            with _closing(BlockWriter(_DirectSink(handle))) as out:
                yield out
        finally:
            os.close(handle)


def block_digest(url: str, block_bytes: int) -> str:
    """The hash of a file's blocks' SHA-256 digests, as hexadecimal digits.

    Raises:
        FileNotFoundError: there is none.
    """
    whole, busy = hashlib.sha256(), deque[Future[bytes]]()
    buffers = [bytearray(block_bytes) for _ in range(NUM_BUFFERS)]
    with storage.open_to_read(url) as stream, ThreadPoolExecutor(HASHING_THREADS) as hashing:
        for buffer in cycle(buffers):
            if len(busy) == NUM_BUFFERS:
                whole.update(busy.popleft().result())
            block = memoryview(buffer)
            count = _read_into(stream, block)
            if not count:
                break
            busy.append(hashing.submit(_digest, block[:count]))
        for each in busy:
            whole.update(each.result())
    return whole.hexdigest()


def _read_into(stream: IO[bytes], block: memoryview) -> int:
    """Fill `block`, or as much of it as the file still has."""
    filled = 0
    while filled < len(block):
        count = stream.readinto(block[filled:])  # type: ignore[attr-defined]  # binary files have it
        if not count:
            break
        filled += count
    return filled


def _digest(block: memoryview) -> bytes:
    return hashlib.sha256(block).digest()


def _combined(digests: list[Future[bytes]]) -> str:
    return hashlib.sha256(b"".join(each.result() for each in digests)).hexdigest()


@contextmanager
def _closing(writer: BlockWriter) -> Iterator[BlockWriter]:
    try:
        yield writer
    finally:
        writer.close()


def _open_direct(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file system that knows no direct writes
            raise
        return os.open(path, flags, 0o666)


_DIRECT = os.O_DIRECT if hasattr(os, "O_DIRECT") else 0
"""Not every system has it."""


def _is_direct(handle: int) -> bool:
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & _DIRECT)


def _leave_direct(handle: int) -> None:
    fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~_DIRECT)
