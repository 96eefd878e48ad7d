"""Weights of a checkpoint as safetensors files, which any framework reads.

Tensors stream through in blocks, so that a table larger than the memory exports as well. The layout
is that of sharded safetensors: `model-00001-of-00003.safetensors` … and an index beside them,
which is written last.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from configs import storage
from sharding.checkpoint_tensors import CheckpointTensors

BLOCK_BYTES = 64 << 20
INDEX = "model.safetensors.index.json"
RECIPE = "recipe.json"
UNFINISHED = "export.unfinished"
"""Stands in a directory that is being exported into, so that the same command can be run again."""
_METADATA = "__metadata__"
"""What a file of safetensors says of itself stands among its tensors."""
_OURS = re.compile(
    rf"model-\d{{5,}}-of-\d{{5,}}\.safetensors|{re.escape(RECIPE)}|{re.escape(INDEX)}"
)
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class _Export:
    """A tensor that is exported: its names there and in the checkpoint."""

    name: str
    saved: str
    num_bytes: int


def exported_name(saved: str) -> str | None:
    """What a tensor of a checkpoint is called outside; None for what is no weight.

    Dense weights and buffers are named as in the model's own `state_dict`, below `model.`; tables
    are `tables.<name>.weight`, wherever they were placed.
    """
    if saved.startswith("tables/"):
        return f"tables.{saved.removeprefix('tables/')}" if saved.endswith(".weight") else None
    if saved.startswith("dense/") and saved.endswith("/weight"):
        inner = saved.removeprefix("dense/").removesuffix("/weight")
    elif saved.startswith("buffers/"):
        inner = saved.removeprefix("buffers/")
    else:
        return None
    return inner.removeprefix("loss_module.")


def export_safetensors(
    url: str, target: str, *, max_file_bytes: int, progress: Callable[[int, int], None]
) -> list[str]:
    """Write the weights of checkpoint `url` into directory `target`; the files written.

    Args:
        url: a checkpoint, whose files are verified first.
        target: a directory (any URL) that is empty or absent, or holds what an export left that
            did not finish: that is written anew.
        max_file_bytes: a file takes tensors up to this; a larger one has a file of its own.
        progress: called with bytes done and in all.

    Raises:
        ValueError: the checkpoint is damaged, or `target` holds something.
    """
    found = storage.list_names(target)
    if found and UNFINISHED not in found:
        raise ValueError(f"{target} is not empty: name a fresh directory to export into")
    tensors = _verified(url)
    recipe = tensors.recipe()
    exports = [
        _Export(name, saved, tensors.num_bytes(saved))
        for saved in tensors.saved
        if (name := exported_name(saved)) is not None
    ]
    _refuse_names(exports)
    files = _packed(sorted(exports, key=lambda export: export.name), max_file_bytes)
    total, done = sum(export.num_bytes for export in exports), 0
    names = [f"model-{at:05d}-of-{len(files):05d}.safetensors" for at in range(1, len(files) + 1)]
    _begin(target, found)
    for name, members in zip(names, files, strict=True):
        done = _write_file(storage.join(target, name), tensors, members, done, total, progress)
    storage.write_json(storage.join(target, RECIPE), recipe)
    index = {
        "metadata": {
            "total_size": total,
            "checkpoint": tensors.manifest.fingerprint,
            "step": tensors.manifest.step,
            **{f"hash/{key}": value for key, value in tensors.manifest.fingerprints.items()},
        },
        "weight_map": {
            export.name: name
            for name, members in zip(names, files, strict=True)
            for export in members
        },
    }
    storage.write_json(storage.join(target, INDEX), index)
    storage.remove(storage.join(target, UNFINISHED))
    return [*names, RECIPE, INDEX]


def _refuse_names(exports: list[_Export]) -> None:
    """Raises ValueError where a file of safetensors could not tell two tensors apart."""
    taken = {_METADATA: "the file's own notes"}
    for export in exports:
        if export.name in taken:
            raise ValueError(
                f"tensor {export.saved!r} would be exported as {export.name!r}, which is the name "
                f"of {taken[export.name]}, too: nothing is exported"
            )
        taken[export.name] = repr(export.saved)


def _begin(target: str, found: list[str]) -> None:
    """Mark `target` as unfinished, and clear it of what an export before this one left."""
    storage.make_directory(target)
    mark = storage.join(target, UNFINISHED)
    storage.write_bytes(mark, b"tandem checkpoint export did not finish: run it again\n")
    for name in found:
        if _OURS.fullmatch(name):
            storage.remove(storage.join(target, name))


def _verified(url: str) -> CheckpointTensors:
    try:
        tensors = CheckpointTensors(url)
        tensors.verify()
    except ValueError as error:
        raise ValueError(
            f"checkpoint {url} is not exported: {error}; `tandem checkpoint verify "
            f"{url.rsplit('/', 1)[0]}` tells which others are whole: name one of them"
        ) from error
    return tensors


def _packed(exports: list[_Export], max_file_bytes: int) -> list[list[_Export]]:
    files: list[list[_Export]] = []
    room = -1
    for export in exports:
        if export.num_bytes > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(export)
        room -= export.num_bytes
    return files


def _write_file(
    url: str,
    tensors: CheckpointTensors,
    members: list[_Export],
    done: int,
    total: int,
    progress: Callable[[int, int], None],
) -> int:
    """A safetensors file: length of the header, header, raw bytes of the tensors in its order."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset = 0
    for export in members:
        header[export.name] = {
            "dtype": _DTYPES[tensors.dtype(export.saved)],
            "shape": list(tensors.shape(export.saved)),
            "data_offsets": [offset, offset := offset + export.num_bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin aligned
    with storage.open_to_write(url) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for export in members:
            for block in tensors.blocks(export.saved, BLOCK_BYTES):
                data = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
                stream.write(data)
                done += len(data)
                progress(done, total)
    whole, there = 8 + len(text) + offset, storage.size(url)
    if there != whole:
        raise ValueError(f"{url} holds {there:,} of {whole:,} bytes: export again")
    return done
