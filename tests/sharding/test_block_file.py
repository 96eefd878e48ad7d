"""What is written in blocks is what was given, on any file system, and so is its hash."""

import errno
import hashlib
import os
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import storage
from configs.storage_faults import StorageError
from sharding import block_file
from sharding.block_file import BLOCK_BYTES, NUM_BUFFERS, block_digest, block_writer

SMALL_BLOCK = 3 * block_file.SECTOR_BYTES


def reference(data: bytes, block: int) -> str:
    """The hash, from its definition."""
    parts = [data[begin : begin + block] for begin in range(0, len(data), block)]
    return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def write(url: str, pieces: list[bytes]) -> str:
    with block_writer(url) as out:
        for piece in pieces:
            out.write(piece)
        return out.finish()


@given(st.lists(st.integers(0, 5 * SMALL_BLOCK), max_size=6), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_file_holds_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    pieces = [draw.bytes(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_file, "BLOCK_BYTES", SMALL_BLOCK)
        path = tmp_path_factory.getbasetemp() / "blocks"
        digest = write(str(path), pieces)
    assert path.read_bytes() == b"".join(pieces)
    assert digest == reference(b"".join(pieces), SMALL_BLOCK)
    assert digest == block_digest(str(path), SMALL_BLOCK)


def test_more_blocks_than_buffers(tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes((NUM_BUFFERS + 2) * BLOCK_BYTES + 12_345)
    digest = write(str(tmp_path / "large"), [data[:77], data[77:]])
    assert (tmp_path / "large").read_bytes() == data
    assert digest == block_digest(str(tmp_path / "large"), BLOCK_BYTES)
    assert digest == reference(data, BLOCK_BYTES)


def refuse_at_open(patch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    patch.setattr(block_file.os, "open", refusing)


def refuse_at_write(patch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def refusing(handle: int, data: memoryview, offset: int) -> int:
        if block_file._is_direct(handle):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle, data, offset)

    patch.setattr(block_file.os, "pwrite", refusing)


def take_little(patch: pytest.MonkeyPatch) -> None:
    """A write takes an odd part of what it is given."""
    real = os.pwrite
    patch.setattr(block_file.os, "pwrite", lambda h, data, offset: real(h, data[:5001], offset))


@pytest.mark.skipif(not block_file._DIRECT, reason="this system has no direct writes")
@pytest.mark.parametrize("limit", [refuse_at_open, refuse_at_write, take_little])
def test_file_systems_that_write_otherwise(
    limit: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(limit)
    monkeypatch.setattr(block_file, "BLOCK_BYTES", SMALL_BLOCK)
    data = np.random.default_rng(2).bytes(5 * SMALL_BLOCK + 100)
    limit(monkeypatch)
    assert write(str(tmp_path / "file"), [data]) == reference(data, SMALL_BLOCK)
    assert (tmp_path / "file").read_bytes() == data


def test_a_store_of_objects() -> None:
    data, url = bytes(range(256)) * 50, "memory://blocks/file"
    digest = write(url, [data[:9], data[9:]])
    assert fsspec.filesystem("memory").cat_file("/blocks/file") == data
    assert digest == block_digest(url, BLOCK_BYTES) == reference(data, BLOCK_BYTES)


def test_a_write_that_fails_is_said_and_its_threads_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(block_file, "BLOCK_BYTES", SMALL_BLOCK)
    monkeypatch.setattr(block_file.os, "pwrite", full)
    before = threading.active_count()
    with pytest.raises(StorageError, match="space"):
        write(str(tmp_path / "file"), [bytes(9 * SMALL_BLOCK)])
    assert threading.active_count() == before
    assert storage.exists(str(tmp_path / "file"))  # no manifest names it
