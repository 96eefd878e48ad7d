"""Read DCP's `.metadata`, which is a pickle, without letting it run anything.

Unpickling calls whatever the bytes name. Here every opcode and every name must be on a list, each
name stands for an inert record instead of the real class, and the real metadata is built from
records that were checked field by field. So a crafted file can be wrong, but it cannot execute,
cannot leave the checkpoint's directory, and cannot make DCP unpickle a payload of its own.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

T = TypeVar("T")
_DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = frozenset(
    {
        *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *((_METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata")),
        *((_METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        *(("torch", name) for name in _DTYPES),
    }
)
_OPCODES = """
    PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET STACK_GLOBAL NEWOBJ REDUCE BUILD
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 SHORT_BINUNICODE BINUNICODE
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
"""
"""What dataclasses of numbers and strings are pickled with. Others could exhaust the memory."""


class _Record:
    """Inert stand-in of one pickled object: the name it was pickled under, and its content.

    `__setstate__` exists so that no pickle can write to attributes, of an instance or of a class.
    """

    name: str
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "_Record":
        record = super().__new__(cls)
        record.name, record.arguments, record.state = cls.__name__, arguments, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it names {module}.{name}, which no checkpoint of ours contains")
        stand_in = type(name, (_Record,), {})
        return stand_in() if name in _DTYPES else stand_in


def read_metadata(data: bytes, files: Collection[str]) -> Metadata:
    """The metadata in `data`, the content of a `.metadata` file.

    Args:
        data: the pickle.
        files: names of the checkpoint's files; a tensor stored anywhere else is refused.

    Raises:
        ValueError: it names something that is not allowed, is damaged, or describes tensors that
            are not whole.
    """
    try:
        known = set(_OPCODES.split())
        for opcode, _, _ in pickletools.genops(data):
            if opcode.name not in known:
                raise ValueError(f"it has the opcode {opcode.name}, which we never write")
        root = _Unpickler(io.BytesIO(data)).load()
        fields = _fields(root, "Metadata")
        tensors = {_text(k): _tensor(v) for k, v in _dict(fields["state_dict_metadata"]).items()}
        stored = {_index(k): _place(v, files) for k, v in _dict(fields["storage_data"]).items()}
        _check_whole(tensors, stored)
    except ValueError as error:
        raise ValueError(f".metadata is refused: {error}") from error
    except Exception as error:  # damaged pickles raise nearly anything
        kind = type(error).__name__
        raise ValueError(f".metadata is refused: it is damaged ({kind})") from error
    return Metadata(tensors, storage_data=stored)  # type: ignore[arg-type]


def _check_whole(
    tensors: dict[str, TensorStorageMetadata], stored: dict[MetadataIndex, _StorageInfo]
) -> None:
    """Chunks lie inside their tensor, fill it, and are stored; DCP would leave gaps unnoticed."""
    for key, tensor in tensors.items():
        volume = 0
        for chunk in tensor.chunks:
            ends = [start + size for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            inside = len(ends) == len(tensor.size) and all(
                end <= size for end, size in zip(ends, tensor.size, strict=True)
            )
            if not inside or MetadataIndex(key, chunk.offsets) not in stored:
                raise ValueError(f"a chunk of {key!r} is out of place")
            volume += math.prod(chunk.sizes)
        if volume != math.prod(tensor.size):
            raise ValueError(f"the chunks of {key!r} do not fill it")


def _tensor(value: Any) -> TensorStorageMetadata:
    fields = _fields(value, "TensorStorageMetadata")
    properties = _record(fields["properties"], "TensorProperties").state
    dtype, layout = properties[0], _record(properties[1], "_get_layout")
    if not isinstance(dtype, _Record) or dtype.name not in _DTYPES:
        raise ValueError("a tensor has no dtype")
    if layout.arguments != ("torch.strided",):
        raise ValueError("a tensor is not strided")
    chunks = [_chunk(chunk) for chunk in _list(fields["chunks"])]
    return TensorStorageMetadata(
        TensorProperties(dtype=getattr(torch, dtype.name)), _size(fields["size"]), chunks
    )


def _chunk(value: Any) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata")
    return ChunkStorageMetadata(_size(fields["offsets"]), _size(fields["sizes"]))


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, "MetadataIndex")
    offset, hint = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields["fqn"]),
        None if offset is None else _size(offset),
        None if hint is None else _count(hint),
    )


def _place(value: Any, files: Collection[str]) -> _StorageInfo:
    fields = _fields(value, "_StorageInfo")
    path = _text(fields["relative_path"])
    if path not in files:
        raise ValueError(f"it stores a tensor in {path!r}, which is not a file of the checkpoint")
    if fields.get("transform_descriptors"):
        raise ValueError("it asks for a stream transform, which we never write")
    return _StorageInfo(path, _count(fields["offset"]), _count(fields["length"]))


def _size(value: Any) -> torch.Size:
    (sizes,) = _record(value, "Size").arguments
    return torch.Size([_count(size) for size in sizes])


def _fields(value: Any, name: str) -> dict[str, Any]:
    return _dict(_record(value, name).state)


def _record(value: Any, name: str) -> _Record:
    if not isinstance(value, _Record) or value.name != name:
        raise ValueError(f"something else stands where {name} is due")
    return value


def _dict(value: Any) -> dict[Any, Any]:
    return _instance(value, dict)


def _list(value: Any) -> list[Any]:
    return _instance(value, list)


def _text(value: Any) -> str:
    return _instance(value, str)


def _count(value: Any) -> int:
    if isinstance(value, bool) or _instance(value, int) < 0:
        raise ValueError("a size or offset is negative")
    return int(value)


def _instance(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"something else stands where a {kind.__name__} is due")
    return value
