"""`.metadata` is a pickle from storage: it must be read without running anything."""

import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from sharding.safe_metadata import read_metadata

FILES = {"__0_0.distcp": 10_000}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What DCP itself writes."""
    path = tmp_path_factory.mktemp("dcp")
    state = {
        "weight": torch.ones(3, 4),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.ones(0, 5),
        "bytes": torch.ones(2, 3, dtype=torch.uint8),
    }
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = dcp.FileSystemWriter(str(path))
    writer.path = str(path)  # type: ignore[assignment]
    dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    return (path / ".metadata").read_bytes()


def test_what_dcp_writes_is_read_as_dcp_reads_it(written: bytes) -> None:
    expected = pickle.loads(written)  # noqa: S301 - written above
    read = read_metadata(written, FILES)
    assert read.state_dict_metadata == expected.state_dict_metadata
    assert read.storage_data == expected.storage_data
    assert set(read.state_dict_metadata) == {"weight", "half", "scalar", "empty", "bytes"}


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def metadata(**changes: Any) -> Metadata:
    """Good metadata of one tensor, with some fields replaced."""
    tensor = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32),
        torch.Size([4, 2]),
        [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 2]))],
    )
    stored = {MetadataIndex("w", [0, 0]): _StorageInfo("__0_0.distcp", 0, 32)}
    fields: dict[str, Any] = {"state_dict_metadata": {"w": tensor}, "storage_data": stored}
    return Metadata(**(fields | changes))


@pytest.mark.parametrize("place", ["root", "state_dict_metadata", "planner_data", "key"])
def test_a_crafted_pickle_does_not_execute(place: str, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    attack = Call(os.system, f"touch {witness}")
    crafted: Any = {
        "root": attack,
        "state_dict_metadata": metadata(state_dict_metadata={"w": attack}),
        "planner_data": metadata(planner_data=attack),
        "key": metadata(storage_data={attack: 1}),
    }[place]
    data = pickle.dumps(crafted)
    with pytest.raises(ValueError, match=r"posix.system"):
        read_metadata(data, FILES)
    assert not witness.exists()
    pickle.loads(data)  # noqa: S301 - proves that the attack works on the plain unpickler
    assert witness.exists()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (eval, "builtins.eval"),
        (torch.load, "torch.serialization.load"),
        (getattr, "builtins.getattr"),
    ],
)
def test_only_listed_names_are_known(function: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        read_metadata(pickle.dumps(metadata(version=Call(function, "1"))), FILES)


def test_a_dotted_name_does_not_reach_through_a_listed_module() -> None:
    module = b"\x8c\x25torch.distributed.checkpoint.metadata"
    data = b"\x80\x04" + module + b"\x8c\x09os.system\x93\x8c\x04true\x85R."
    with pytest.raises(ValueError, match=r"metadata.os.system"):
        read_metadata(data, FILES)


def test_old_protocols_and_memory_bombs_are_refused() -> None:
    with pytest.raises(ValueError, match="opcode"):
        read_metadata(pickle.dumps(metadata(), protocol=0), FILES)
    bomb = b"\x80\x04Nr\xff\xff\xff\x7f."  # a memo slot that would take 32 GB
    with pytest.raises(ValueError, match="LONG_BINPUT"):
        read_metadata(bomb, FILES)


def test_classes_cannot_be_rewritten() -> None:
    """BUILD on a class instead of an instance would set the class's attributes."""
    module = b"\x8c\x25torch.distributed.checkpoint.metadata"
    data = b"\x80\x04" + module + b"\x8c\x08Metadata\x93N}\x8c\x07version\x8c\x03badsb\x86b."
    for crafted in (data, data.replace(b"\x86b", b"b")):
        with pytest.raises(ValueError, match="refused"):
            read_metadata(crafted, FILES)
    assert Metadata.version is None


def test_pickled_entries_are_refused() -> None:
    """DCP would unpickle such an entry's content without any check."""
    crafted = metadata(state_dict_metadata={"w": BytesStorageMetadata()})
    with pytest.raises(ValueError, match="BytesStorageMetadata"):
        read_metadata(pickle.dumps(crafted), FILES)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "__1_0.distcp", "", ".metadata/.."])
def test_tensors_lie_in_the_checkpoints_own_files(path: str) -> None:
    crafted = metadata(storage_data={MetadataIndex("w", [0, 0]): _StorageInfo(path, 0, 32)})
    with pytest.raises(ValueError, match="not a file of the checkpoint"):
        read_metadata(pickle.dumps(crafted), FILES)


def test_stream_transforms_are_refused() -> None:
    info = _StorageInfo("__0_0.distcp", 0, 32, ["zstd"])
    crafted = metadata(storage_data={MetadataIndex("w", [0, 0]): info})
    with pytest.raises(ValueError, match="transform"):
        read_metadata(pickle.dumps(crafted), FILES)


@pytest.mark.parametrize(
    ("offsets", "sizes", "reason"),
    [
        ([0, 0], [3, 2], "do not fill"),
        ([1, 0], [4, 2], "out of place"),
        ([0], [8], "out of place"),
        ([0, 0], [4, -2], "negative"),
    ],
)
def test_tensors_must_be_whole(offsets: list[int], sizes: list[int], reason: str) -> None:
    """DCP itself leaves what no chunk covers as it was."""
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    tensor = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32), torch.Size([4, 2]), [chunk]
    )
    stored = {MetadataIndex("w", offsets): _StorageInfo("__0_0.distcp", 0, 32)}
    crafted = metadata(state_dict_metadata={"w": tensor}, storage_data=stored)
    with pytest.raises(ValueError, match=reason):
        read_metadata(pickle.dumps(crafted), FILES)


def test_what_would_take_forever_is_refused_at_once() -> None:
    """Hashing tuples of tuples takes 2^n steps, and a list may be named a million times."""
    bomb = b"\x80\x04}\x8c\x01a\x85\x94" + b"".join(
        b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(60)
    )
    with pytest.raises(ValueError, match="refused"):
        read_metadata(bomb + b"Ns.", FILES)
    tensor = metadata().state_dict_metadata["w"]
    assert isinstance(tensor, TensorStorageMetadata)
    tensor.chunks = tensor.chunks * 3000
    many = {f"w{n}": tensor for n in range(3000)}
    data = pickle.dumps(metadata(state_dict_metadata=many))
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"9,000,000 pieces"):
        read_metadata(data, FILES)
    assert time.monotonic() - started < 10


def test_a_size_that_nothing_can_hold_is_refused() -> None:
    chunk = ChunkStorageMetadata(torch.Size([0, 0, 0]), torch.Size([1 << 62, 1 << 62, 0]))
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), chunk.sizes, [chunk])
    crafted = metadata(state_dict_metadata={"w": tensor}, storage_data={})
    with pytest.raises(ValueError, match="larger than any storage"):
        read_metadata(pickle.dumps(crafted), FILES)


def test_pieces_that_overlap_are_no_whole_tensor() -> None:
    """Their sizes add up, and DCP would leave the gap as it was."""
    half = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 2])),
        ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([2, 2])),
    ]
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([4, 2]), half)
    stored = {
        MetadataIndex("w", offsets): _StorageInfo("__0_0.distcp", 0, 32)
        for offsets in ([0, 0], [1, 0])
    }
    crafted = metadata(state_dict_metadata={"w": tensor}, storage_data=stored)
    with pytest.raises(ValueError, match="do not fill"):
        read_metadata(pickle.dumps(crafted), FILES)


@pytest.mark.parametrize(
    ("offset", "length", "reason"), [(0, 31, "in part"), (9_990, 32, "behind the end")]
)
def test_pieces_are_stored_in_full(offset: int, length: int, reason: str) -> None:
    info = _StorageInfo("__0_0.distcp", offset, length)
    crafted = metadata(storage_data={MetadataIndex("w", [0, 0]): info})
    with pytest.raises(ValueError, match=reason):
        read_metadata(pickle.dumps(crafted), FILES)


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_damage_is_either_harmless_or_refused(written: bytes, data: st.DataObject) -> None:
    damaged = bytearray(written)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(damaged))) if data.draw(st.booleans()) else len(damaged)
    try:
        read = read_metadata(bytes(damaged[:cut]), FILES)
    except ValueError as error:
        assert "refused" in str(error)
    else:
        assert all(type(v) is TensorStorageMetadata for v in read.state_dict_metadata.values())
        assert all(info.relative_path in FILES for info in read.storage_data.values())
