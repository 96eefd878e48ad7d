"""Read DCP's `.metadata`, which is a pickle, without letting it run anything.

Unpickling calls whatever the bytes name. Here no unpickler runs: the few opcodes that describe
plain data are followed by hand, every name must be on a list and stands for an inert record, and
the real metadata is built from records that were checked field by field. So a crafted file can be
wrong, but it cannot execute, cannot leave the checkpoint's directory, cannot make DCP unpickle a
payload of its own, and costs no more time and memory than its length allows.
"""

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
_MOST_DIMENSIONS = 16
_MOST_ELEMENTS = 1 << 59
"""Of a tensor: its bytes still are an offset."""
_LEAST_CHUNK_BYTES = 4
"""Of a pickle, for each piece of a tensor; fewer mean that one list stands for many."""


@dataclass(frozen=True)
class _Name:
    """Something that the pickle would import."""

    name: str


@dataclass(eq=False)
class _Record:
    """Inert stand-in of one pickled object: the name it was pickled under, and its content."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


class _Mark:
    """Where on the stack the members of a collection begin."""


@dataclass
class _Machine:
    """Follows a pickle's opcodes; whatever does not fit raises."""

    stack: list[Any] = field(default_factory=list)
    memo: list[Any] = field(default_factory=list)

    def members(self) -> list[Any]:
        """What was put onto the stack since the last mark."""
        place = len(self.stack) - 1
        while not isinstance(self.stack[place], _Mark):
            place -= 1
            if place < 0:
                raise ValueError("a collection has no beginning")
        members = self.stack[place + 1 :]
        del self.stack[place:]
        return members

    def name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it names {module}.{name}, which no checkpoint of ours contains")
        self.stack.append(_Record(name, ()) if name in _DTYPES else _Name(name))

    def call(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, _Name):
            raise ValueError("something that is no name is called")
        self.stack.append(_Record(called.name, _instance(arguments, tuple)))

    def build(self) -> None:
        state, record = self.stack.pop(), self.stack[-1]
        _instance(record, _Record).state = state

    def collect(self, count: int) -> None:
        members = self.stack[len(self.stack) - count :] if count else []
        if len(members) < count:
            raise ValueError("a tuple is cut off")
        del self.stack[len(self.stack) - count :]
        self.stack.append(tuple(members))

    def extend(self, members: list[Any]) -> None:
        _list(self.stack[-1]).extend(members)

    def fill(self, members: list[Any]) -> None:
        pairs = list(zip(members[::2], members[1::2], strict=True))
        if not all(isinstance(key, str | _Record) for key, _ in pairs):
            raise ValueError("a key is no text")  # the hash of nested tuples could take forever
        _dict(self.stack[-1]).update(pairs)

    def last(self, count: int) -> list[Any]:
        members = [self.stack.pop() for _ in range(count)]
        return members[::-1]


_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda machine, value: None,
    "FRAME": lambda machine, value: None,
    "MARK": lambda machine, value: machine.stack.append(_Mark()),
    "MEMOIZE": lambda machine, value: machine.memo.append(machine.stack[-1]),
    **dict.fromkeys(
        ("BINGET", "LONG_BINGET"),
        lambda machine, value: machine.stack.append(machine.memo[value]),
    ),
    "STACK_GLOBAL": lambda machine, value: machine.name(),
    "NEWOBJ": lambda machine, value: machine.call(),
    "REDUCE": lambda machine, value: machine.call(),
    "BUILD": lambda machine, value: machine.build(),
    "NONE": lambda machine, value: machine.stack.append(None),
    "NEWTRUE": lambda machine, value: machine.stack.append(True),
    "NEWFALSE": lambda machine, value: machine.stack.append(False),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"),
        lambda machine, value: machine.stack.append(value),
    ),
    "EMPTY_TUPLE": lambda machine, value: machine.stack.append(()),
    "TUPLE": lambda machine, value: machine.stack.append(tuple(machine.members())),
    "TUPLE1": lambda machine, value: machine.collect(1),
    "TUPLE2": lambda machine, value: machine.collect(2),
    "TUPLE3": lambda machine, value: machine.collect(3),
    "EMPTY_LIST": lambda machine, value: machine.stack.append([]),
    "APPEND": lambda machine, value: machine.extend(machine.last(1)),
    "APPENDS": lambda machine, value: machine.extend(machine.members()),
    "EMPTY_DICT": lambda machine, value: machine.stack.append({}),
    "SETITEM": lambda machine, value: machine.fill(machine.last(2)),
    "SETITEMS": lambda machine, value: machine.fill(machine.members()),
}
"""What dataclasses of numbers and strings are pickled with. Others could exhaust the memory."""


def _described(data: bytes) -> Any:
    """What a pickle describes, of plain values and records."""
    machine = _Machine()
    for opcode, value, _ in pickletools.genops(data):
        if opcode.name == "STOP":
            (root,) = machine.stack
            return root
        step = _STEPS.get(opcode.name)
        if step is None:
            raise ValueError(f"it has the opcode {opcode.name}, which we never write")
        step(machine, value)
    raise ValueError("it has no end")


def read_metadata(data: bytes, files: Mapping[str, int]) -> Metadata:
    """The metadata in `data`, the content of a `.metadata` file.

    Args:
        data: the pickle.
        files: name → bytes of the checkpoint's files; a tensor stored elsewhere is refused.

    Raises:
        ValueError: it names something that is not allowed, is damaged, or describes tensors that
            are not whole.
    """
    try:
        fields = _fields(_described(data), "Metadata")
        described = {_text(k): v for k, v in _dict(fields["state_dict_metadata"]).items()}
        _refuse_bombs(described, len(data) // _LEAST_CHUNK_BYTES)
        tensors = {key: _tensor(value) for key, value in described.items()}
        stored = {_index(k): _place(v, files) for k, v in _dict(fields["storage_data"]).items()}
        for key, tensor in tensors.items():
            _check_whole(key, tensor, stored)
    except ValueError as error:
        raise ValueError(f".metadata is refused: {error}") from error
    except Exception as error:  # damaged pickles raise nearly anything
        kind = type(error).__name__
        raise ValueError(f".metadata is refused: it is damaged ({kind})") from error
    return Metadata(tensors, storage_data=stored)  # type: ignore[arg-type]


def _refuse_bombs(described: dict[str, Any], most_chunks: int) -> None:
    """Refuse lists that were written once and are named so often that none could have room."""
    chunks = sum(
        len(_list(_fields(value, "TensorStorageMetadata")["chunks"]))
        for value in described.values()
    )
    if chunks > most_chunks:
        raise ValueError(f"it describes {chunks:,} pieces, for which it is too short")


def _check_whole(
    key: str, tensor: TensorStorageMetadata, stored: dict[MetadataIndex, _StorageInfo]
) -> None:
    """The pieces are a grid that fills the tensor, and each is stored; DCP would leave gaps."""
    pieces = set()
    for chunk in tensor.chunks:
        ends = [start + size for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        inside = len(ends) == len(tensor.size) and all(
            end <= size for end, size in zip(ends, tensor.size, strict=True)
        )
        place = stored.get(MetadataIndex(key, chunk.offsets))
        if not inside or place is None:
            raise ValueError(f"a chunk of {key!r} is out of place")
        volume = math.prod(chunk.sizes)
        if place.length < volume * tensor.properties.dtype.itemsize:
            raise ValueError(f"a chunk of {key!r} is stored in part")
        if volume:
            pieces.add(tuple(zip(chunk.offsets, ends, strict=True)))
    if math.prod(tensor.size) == 0:
        return
    stretches = [sorted(set(column)) for column in zip(*pieces, strict=True)]
    filled = len(pieces) > 0 and all(
        _fill_up(column, size) for column, size in zip(stretches, tensor.size, strict=True)
    )
    if not filled or len(pieces) != math.prod(map(len, stretches)):
        raise ValueError(f"the chunks of {key!r} do not fill it")


def _fill_up(stretches: list[tuple[int, int]], size: int) -> bool:
    """Whether stretches, in order, cover 0 … size - 1, each once."""
    begins = [0, *(end for _, end in stretches)]
    return [begin for begin, _ in stretches] == begins[:-1] and begins[-1] == size


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


def _place(value: Any, files: Mapping[str, int]) -> _StorageInfo:
    fields = _fields(value, "_StorageInfo")
    path = _text(fields["relative_path"])
    if path not in files:
        raise ValueError(f"it stores a tensor in {path!r}, which is not a file of the checkpoint")
    if fields.get("transform_descriptors"):
        raise ValueError("it asks for a stream transform, which we never write")
    offset, length = _count(fields["offset"]), _count(fields["length"])
    if offset + length > files[path]:
        raise ValueError(f"it stores a tensor behind the end of {path!r}")
    return _StorageInfo(path, offset, length)


def _size(value: Any) -> torch.Size:
    (sizes,) = _record(value, "Size").arguments
    if not isinstance(sizes, tuple) or len(sizes) > _MOST_DIMENSIONS:
        raise ValueError("a size is no short tuple")
    counts = [_count(size) for size in sizes]
    if math.prod(max(count, 1) for count in counts) > _MOST_ELEMENTS:
        raise ValueError("a tensor is larger than any storage")
    return torch.Size(counts)


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
