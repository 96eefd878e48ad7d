"""How DCP reads and writes a checkpoint's files: on any file system, hashed on the way out.

A rank's file is the bytes of its tensors, one after the other, and `.metadata` says where each
lies. So what is asked for is read alone and in place, and nothing in it can be executed. Hashing
what is written, not what is read back, also catches what the disk changed in between.

Files of before are archives of `torch.save`; they are longer than their tensor, and still read.
"""

import io
import math
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from configs import storage
from configs.storage_faults import patiently
from sharding.block_file import BLOCK_BYTES, block_writer
from sharding.checkpoint_manifest import CheckpointFile

METADATA = ".metadata"
ALIGNMENT = 64
"""Bytes; each tensor begins at a multiple."""
_ARCHIVE_BYTES = 1 << 14
"""Most that an archive of `torch.save` is longer than its tensor."""


class CheckpointWriter(StorageWriter):
    """DCP writer into the fresh directory `url`; `written` then has the hashes of its files."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.written: dict[str, CheckpointFile] = {}
        """Files this process wrote, by name."""

    def reset(self, checkpoint_id: Any = None) -> None:
        """DCP's hook; a writer is used once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """DCP's hook; there is nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the directory."""
        storage.make_directory(self._url)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank the name of its file."""
        return [replace(plan, storage_data=f"__{rank}_0.distcp") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors into one file."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(patiently(lambda: self._write_file(plan, planner)) if plan.items else [])
        return done

    def _write_file(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        name, results = str(plan.storage_data), []
        with block_writer(storage.join(self._url, name)) as stream:
            for item in plan.items:
                stream.write(bytes(-stream.size % ALIGNMENT))
                begin, value = stream.size, planner.resolve_data(item)
                assert isinstance(value, Tensor), "a checkpoint's state is tensors"
                stream.write(_bytes_of(value.detach().cpu().contiguous()))
                length = stream.size - begin
                place = _StorageInfo(name, begin, length)
                results.append(WriteResult(item.index, length, place))
            digest = stream.finish()
        self.written[name] = CheckpointFile(
            path=name, bytes=stream.size, sha256=digest, block=BLOCK_BYTES
        )
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write what tells where every tensor lies; on the coordinator, once all have written."""
        places = {result.index: result.storage_data for rank in results for result in rank}
        metadata.storage_data = places
        data = pickle.dumps(metadata)
        storage.write_bytes(storage.join(self._url, METADATA), data)
        self.written[METADATA] = CheckpointFile(
            path=METADATA, bytes=len(data), sha256=storage.sha256_bytes(data)
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """DCP's hook to choose a writer by itself: never this one."""
        return False


class CheckpointReader(StorageReader):
    """DCP reader of directory `url` that takes metadata already read safely."""

    def __init__(self, url: str, metadata: Metadata) -> None:
        super().__init__()
        self._url, self._metadata = url, metadata
        self._chunks = _chunks(metadata)

    def reset(self, checkpoint_id: Any = None) -> None:
        """DCP's hook; a reader is used once."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What was given."""
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """DCP's hook; there is nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for into the planner's tensors, each file from front to back."""
        by_file: dict[str, list[tuple[_StorageInfo, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            place = self._metadata.storage_data[item.storage_index]
            by_file[place.relative_path].append((place, item))
        for name, wanted in sorted(by_file.items()):
            with storage.open_to_read(storage.join(self._url, name)) as stream:
                for place, item in sorted(wanted, key=lambda entry: entry[0].offset):
                    target = planner.resolve_tensor(item).detach()
                    size, dtype = self._chunks[item.storage_index]
                    _read_item(stream, place, item, size, dtype, target)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """DCP's hook to choose a reader by itself: never this one."""
        return False


class TensorLoadPlanner(DefaultLoadPlanner):
    """Loads tensors into a flat dict, in place; never unpickles anything."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("safe_metadata lets no pickled entries through")


def _chunks(metadata: Metadata) -> dict[MetadataIndex, tuple[torch.Size, torch.dtype]]:
    """Size and dtype of every stored piece."""
    found = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata), "safe_metadata lets only tensors through"
        for chunk in tensor.chunks:
            found[MetadataIndex(name, chunk.offsets)] = (chunk.sizes, tensor.properties.dtype)
    return found


def _read_item(
    stream: IO[bytes],
    place: _StorageInfo,
    item: ReadItem,
    size: torch.Size,
    dtype: torch.dtype,
    target: Tensor,
) -> None:
    """Fill `target` with the part of a stored piece that `item` names."""
    if place.length != size.numel() * dtype.itemsize:
        archived = _read_archive(stream, place, size, dtype)
        for dimension, (begin, length) in enumerate(
            zip(item.storage_offsets, item.lengths, strict=True)
        ):
            archived = archived.narrow(dimension, begin, length)
        target.copy_(archived)
        return
    for rows, first, count in _row_blocks(item, size, dtype):
        stream.seek(place.offset + first * math.prod(size[1:]) * dtype.itemsize)
        into = target[rows] if size else target
        wanted = _columns(item, size)
        whole = all(length == full for (_, length), full in zip(wanted, size[1:], strict=True))
        if whole and into.dtype == dtype and into.is_contiguous() and into.device.type == "cpu":
            _fill(stream, into)
            continue
        block = torch.empty([count, *size[1:]] if size else [], dtype=dtype)
        _fill(stream, block)
        for dimension, (begin, length) in enumerate(wanted, 1):
            block = block.narrow(dimension, begin, length)
        into.copy_(block)


def _row_blocks(
    item: ReadItem, size: torch.Size, dtype: torch.dtype
) -> Iterator[tuple[slice, int, int]]:
    """Rows of the target, and first row and number of rows in the piece, a block at a time."""
    begin, rows = (item.storage_offsets[0], item.lengths[0]) if size else (0, 1)
    row_bytes = max(1, math.prod(size[1:]) * dtype.itemsize)
    per_block = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, rows, per_block):
        count = min(per_block, rows - first)
        yield slice(first, first + count), begin + first, count


def _columns(item: ReadItem, size: torch.Size) -> list[tuple[int, int]]:
    """First entry and number of entries of every dimension but the first."""
    return list(zip(item.storage_offsets, item.lengths, strict=True))[1 : len(size)]


def _read_archive(
    stream: IO[bytes], place: _StorageInfo, size: torch.Size, dtype: torch.dtype
) -> Tensor:
    """A whole stored piece that `torch.save` wrote; only tensors are unpickled.

    Raises:
        ValueError: something else lies there, or what would take more memory than the piece.
    """
    wrong = f"{place.relative_path} holds something else than its metadata say"
    if place.length > size.numel() * dtype.itemsize + _ARCHIVE_BYTES:
        raise ValueError(f"{wrong}: {place.length:,} bytes where there are fewer")
    stream.seek(place.offset)
    archive = io.BytesIO(stream.read(place.length))
    try:
        with zipfile.ZipFile(archive) as members:
            inside = members.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in inside)
        grows = packed or sum(member.file_size for member in inside) > place.length
        archive.seek(0)
        tensor = None if grows else torch.load(archive, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no archive raises nearly anything, and gives odd advice
        raise ValueError(f"{wrong}: no archive of ours ({type(error).__name__})") from error
    if grows:
        raise ValueError(f"{wrong}: an archive that grows when it is read")
    if not isinstance(tensor, Tensor) or tensor.size() != size or tensor.dtype != dtype:
        raise ValueError(f"{wrong}: another tensor")
    return tensor


def _fill(stream: IO[bytes], tensor: Tensor) -> None:
    """Read a contiguous CPU tensor's bytes. Raises ValueError where the file ends before."""
    view = _bytes_of(tensor)
    while len(view):
        count = stream.readinto(view)  # type: ignore[attr-defined]  # binary files have it
        if not count:
            raise ValueError("a file ends before its tensors")
        view = view[count:]


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's own bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
