"""What lies in a checkpoint's files, and that any part of it is read, of new files and of old."""

import io
import pickle
import zipfile
from collections.abc import Callable
from copy import copy as copy_of
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from configs import storage
from sharding.checkpoint_files import ALIGNMENT, METADATA, CheckpointReader, CheckpointWriter
from sharding.checkpoint_manifest import CheckpointFile, build_manifest, write_manifest
from sharding.checkpoint_tensors import CheckpointTensors
from sharding.safe_metadata import read_metadata

NAME = "step-00000001-0000000000000001"
STATE = {
    "table": torch.arange(300 * 40, dtype=torch.float32).reshape(300, 40),
    "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "scalar": torch.tensor(7),
    "empty": torch.ones(0, 5),
    "cube": torch.arange(24, dtype=torch.int32).reshape(2, 3, 4),
    "turned": torch.arange(12.0).reshape(3, 4).t(),
}


def save(root: str) -> Metadata:
    """A checkpoint of `STATE`, and where its tensors lie."""
    url = storage.join(root, NAME)
    writer = CheckpointWriter(url)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(dict(STATE), storage_writer=writer, planner=planner, no_dist=True)
    commit(url, writer)
    data = storage.read_bytes(storage.join(url, METADATA))
    return read_metadata(data, {name: entry.bytes for name, entry in writer.written.items()})


def commit(url: str, writer: CheckpointWriter) -> None:
    files = tuple(writer.written.values())
    content = {"created": 1.0, "world_size": 1, "versions": {}, "fingerprints": {}}
    write_manifest(url, build_manifest(name=NAME, step=1, files=files, **content))


def as_it_was(root: str) -> None:
    """Rewrite the checkpoint as releases of before did: each tensor an archive of `torch.save`."""
    metadata, url = save(root), storage.join(root, NAME)
    body, places = io.BytesIO(), {}
    for index, place in metadata.storage_data.items():
        archive = archive_of(STATE[index.fqn])
        places[index] = replace(place, offset=body.tell(), length=len(archive))
        body.write(archive)
    metadata.storage_data = places
    rewrite(url, pickle.dumps(metadata), body.getvalue())


def rewrite(url: str, metadata: bytes, body: bytes) -> None:
    writer = CheckpointWriter(url)
    for name, data in ((METADATA, metadata), ("__0_0.distcp", body)):
        storage.write_bytes(storage.join(url, name), data)
        digest = storage.sha256_bytes(data)
        writer.written[name] = CheckpointFile(path=name, bytes=len(data), sha256=digest)
    commit(url, writer)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("written", [save, as_it_was])
@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_every_part_is_read(written: Callable[[str], object], scheme: str, tmp_path: Path) -> None:
    root = str(tmp_path) if scheme == "file" else f"memory:/{tmp_path}"
    written(root)
    tensors = CheckpointTensors(storage.join(root, NAME))
    tensors.verify()
    assert set(tensors.saved) == set(STATE)
    for name, value in STATE.items():
        blocks = list(tensors.blocks(name, 1000)) or [tensors.rows(name, 0, 0)]
        assert same(torch.cat(blocks) if value.dim() else blocks[0], value)
    for first, count in ((0, 1), (17, 100), (299, 1)):
        assert same(tensors.rows("table", first, count), STATE["table"][first : first + count])
    assert same(tensors.rows("cube", 1, 1), STATE["cube"][1:])


def test_some_columns_of_a_stored_piece_are_read(tmp_path: Path) -> None:
    """As a table that is cut otherwise asks for; into other memory layouts and types, too."""
    metadata = save(str(tmp_path))
    offsets, lengths = torch.Size([3, 5]), torch.Size([290, 7])
    index = MetadataIndex("table", [0, 0])
    zero = torch.Size([0, 0])
    item = ReadItem(LoadItemType.TENSOR, index, zero, index, offsets, lengths)

    class Planner:
        def __init__(self, target: Tensor) -> None:
            self.target = target

        def resolve_tensor(self, item: ReadItem) -> Tensor:
            return self.target

        def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
            pass

    expected = STATE["table"][3:293, 5:12]
    for target in (torch.zeros(290, 7), torch.zeros(7, 290).t(), torch.zeros(290, 7).double()):
        reader = CheckpointReader(str(tmp_path / NAME), metadata)
        reader.read_data(LoadPlan([item]), Planner(target))  # type: ignore[arg-type]
        assert torch.equal(target.float(), expected)


def test_tensors_lie_bare_and_aligned_in_the_file(tmp_path: Path) -> None:
    metadata = save(str(tmp_path))
    data = (tmp_path / NAME / "__0_0.distcp").read_bytes()
    for index, place in metadata.storage_data.items():
        value = STATE[index.fqn].contiguous()
        assert place.offset % ALIGNMENT == 0
        raw = bytes(value.reshape(-1).view(torch.uint8).numpy())
        assert data[place.offset : place.offset + place.length] == raw


def test_a_file_that_ends_early_is_a_sentence(tmp_path: Path) -> None:
    """As one that shrank after it was verified."""
    save(str(tmp_path))
    tensors = CheckpointTensors(str(tmp_path / NAME))
    (tmp_path / NAME / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(ValueError, match=f"'table' of checkpoint .*{NAME} .* ends before its"):
        tensors.rows("table", 0, 300)


def longer(piece: bytes) -> bytes:
    return piece + bytes(4)


def compressed(piece: bytes) -> bytes:
    """An archive of `torch.save` that takes 16 MB to read, where 48 kB are due."""
    whole, packed = zipfile.ZipFile(io.BytesIO(archive_of(torch.zeros(4 << 20)))), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as members:
        for name in whole.namelist():
            members.writestr(name, whole.read(name))
        members.writestr("archive/filling", bytes(36_000), zipfile.ZIP_STORED)
    return packed.getvalue()


def named_twice(piece: bytes) -> bytes:
    """An archive whose members lie in the same bytes."""
    body = io.BytesIO(archive_of(torch.zeros(300, 40)))
    with zipfile.ZipFile(body, "a") as members:
        big = max(members.infolist(), key=lambda member: member.file_size)
        for copy in range(3):
            members.NameToInfo[f"archive/data/{copy + 1}"] = twin = copy_of(big)
            twin.filename = f"archive/data/{copy + 1}"
            members.filelist.append(twin)
        members._didModify = True
    return body.getvalue()


def of_another_shape(piece: bytes) -> bytes:
    return archive_of(torch.zeros(40, 300))


def of_another_type(piece: bytes) -> bytes:
    return archive_of(torch.zeros(300, 40).int())


def of_another_thing(piece: bytes) -> bytes:
    return archive_of({"a": 1}) + bytes(48000)


def archive_of(value: object) -> bytes:
    archive = io.BytesIO()
    torch.save(value, archive)
    return archive.getvalue()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (longer, "no archive of ours"),
        (compressed, "an archive that grows"),
        (named_twice, "an archive that grows"),
        (of_another_shape, "another tensor"),
        (of_another_type, "another tensor"),
        (of_another_thing, "another tensor"),
    ],
)
def test_a_piece_that_is_not_what_the_metadata_say_is_a_sentence(
    make: Callable[[bytes], bytes], told: str, tmp_path: Path
) -> None:
    """As crafted, with hashes that match."""
    metadata, url = save(str(tmp_path)), tmp_path / NAME
    [(index, place)] = [e for e in metadata.storage_data.items() if e[0].fqn == "table"]
    body = (url / "__0_0.distcp").read_bytes()
    piece = make(body[place.offset : place.offset + place.length])
    metadata.storage_data[index] = replace(place, offset=len(body), length=len(piece))
    rewrite(str(url), pickle.dumps(metadata), body + piece)
    tensors = CheckpointTensors(str(url))
    tensors.verify()
    with pytest.raises(ValueError, match="'table' of checkpoint") as error:
        tensors.rows("table", 0, 300)
    assert f"__0_0.distcp holds something else than its metadata say: {told}" in str(error.value)
    assert "weights_only" not in str(error.value)
