"""Tables that a checkpoint holds in another cut than the model: other blocks of columns, in the
other half (sharded or replicated), or with other rows.

Weights are carried over bit for bit. So is the optimizer's state where both cuts keep the same
numbers; otherwise it passes through one form that all of them have, the sum over updates of each
weight's squared gradient. Adagrad keeps that sum, row-wise Adagrad its mean over a block of
columns, and Adam the running mean v, of which t updates make the sum t · v / (1 - beta2^t).

Shape legend: V rows of a table, D its width, n rows of a block, C columns that a part keeps.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sharding.checkpoint_manifest import CheckpointInfo
from sharding.checkpoint_state import State, size_and_dtype, weights
from sharding.checkpoint_tensors import CheckpointTensors
from sharding.embedding_plan import TablePlan, padded
from sharding.parallelize import ParallelModel

BLOCK_BYTES = 64 << 20
"""What is read at once of a table, in bytes of its weights."""
T = TypeVar("T")
Part = Literal["weight", "momentum1", "exp_avg", "exp_avg_sq"]
KeptRows = Callable[[int, int], Iterable[tuple[Tensor, Tensor]]]
"""The first row and the number of rows of a stretch of the model's table → those of them that the
checkpoint has, int64 [n], with where each lies there, int64 [n]; in any order, in pieces."""


def same_rows(first: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every row lies where it lay."""
    rows = torch.arange(first, first + count)
    yield rows, rows


@dataclass(frozen=True)
class SavedTable:
    """How a table lies in a checkpoint."""

    name: str
    rows: int
    width: int
    sharded: bool
    """Otherwise it was replicated, under Adam."""
    columns: tuple[int, ...]
    """Width of each block of columns, in order."""
    momentum: int
    """Columns of its Adagrad sums; 0 where there are none."""

    @classmethod
    def find(cls, name: str, saved: Mapping[str, TensorStorageMetadata]) -> "SavedTable | None":
        """Table `name` of a checkpoint with these tensors; None if it has no such table."""
        for part, sharded in ((f"tables/{name}.", True), (f"dense/tables.{name}.weight/", False)):
            weight = saved.get(f"{part}weight")
            if weight is None:
                continue
            rows, width = weight.size
            starts = sorted({chunk.offsets[1] for chunk in weight.chunks if chunk.sizes[0]})
            ends = [*starts[1:], width]
            columns = tuple(end - start for start, end in zip(starts, ends, strict=True))
            sums = saved.get(f"{part}momentum1")
            kept = int(sums.size[1]) if sums is not None else 0
            return cls(name, rows, width, sharded, columns, kept)
        return None

    def key(self, part: Part) -> str:
        """The name of a part in the checkpoint."""
        if self.sharded:
            return f"tables/{self.name}.{part}"
        return f"dense/tables.{self.name}.weight/{part}"

    def keeps(self, kind: str) -> bool:
        """Whether its optimizer was this one."""
        match kind:
            case "rowwise_adagrad":
                return self.sharded and self.momentum == len(self.columns)
            case "adagrad":
                return self.sharded and self.momentum == self.width
            case "sgd":
                return self.sharded and self.momentum == 0
            case _:
                return not self.sharded


def starting_state(model: ParallelModel, saved: Mapping[str, TensorStorageMetadata]) -> State:
    """The weights, and the fused optimizer's state of tables of which the checkpoint has some.

    Adagrad without the sums of earlier gradients would move each row by the whole learning rate at
    its first update. Collective.
    """
    state, kind = weights(model), model.tables.plan.optimizer.kind
    sums = model.tables.state_dict()
    for table in model.tables.names:
        found = SavedTable.find(table, saved)
        if found is not None and (found.keeps(kind) or not found.sharded):
            state |= {f"tables/{key}": v for key, v in sums.items() if key == f"{table}.momentum1"}
    return state


class Recut:
    """The tables of a model that a checkpoint holds in another cut."""

    def __init__(
        self,
        model: ParallelModel,
        saved: Mapping[str, TensorStorageMetadata],
        target: State,
        kept: Mapping[str, KeptRows] | None,
    ) -> None:
        """Find them.

        Args:
            model: what is loaded into.
            saved: the checkpoint's tensors.
            target: the model's, those that are wanted.
            kept: rows of tables whose rows may have moved. If given, the checkpoint may also have
                other tables; without it, all rows lie where they lay.
        """
        self._target, self._kept = target, kept or {}
        self._optimizer = model.tables.plan.optimizer.kind
        self._beta2 = model.engine.beta2
        self._tables: list[tuple[TablePlan, SavedTable]] = []
        for table in model.tables.plan.tables:
            found = SavedTable.find(table.spec.name, saved)
            if found is not None and self._differs(table, found, saved):
                self._tables.append((table, found))
        here = {table.spec.name for table in model.tables.plan.tables}
        there = set(filter(None, map(_table_of, saved)))
        self._added, self._removed = here - there, there - here
        if kept is None:
            self._added, self._removed = set(), set()
        own = {saved_table.name for _, saved_table in self._tables} | self._added | self._removed
        self._keys = {key for key in (*saved, *target) if _table_of(key) in own}

    def plain(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Those of a checkpoint's or a model's tensors that belong to none of these tables."""
        return {key: value for key, value in tensors.items() if key not in self._keys}

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not carried over as it was, a sentence a table."""
        notes = [self._note(table, saved) for table, saved in self._tables]
        notes += [f"table {name!r} is new: it begins with nothing" for name in sorted(self._added)]
        notes += [
            f"table {name!r} is left out: no such table here" for name in sorted(self._removed)
        ]
        return tuple(note for note in notes if note is not None)

    def read(self, info: CheckpointInfo) -> None:
        """Fill in these tables' tensors on this rank.

        Raises:
            ValueError: another checkpoint lies there now.
        """
        if not self._tables:
            return
        tensors = CheckpointTensors(info.url)
        if tensors.manifest.fingerprint != info.hash:
            raise ValueError("it was replaced since it was verified")
        updates = int(tensors.rows("adam_step", 0, 1))
        for table, saved in self._tables:
            reader = _Reader(tensors, saved, table, self._optimizer, self._beta2, updates)
            kept = self._kept.get(saved.name, same_rows)
            for part in ("weight", "momentum1", "exp_avg", "exp_avg_sq"):
                value = self._target.get(_key(table, part))
                if value is not None:
                    for row, column, window in _windows(value):
                        reader.fill(part, row, column, window, kept)

    def _differs(
        self, table: TablePlan, found: SavedTable, saved: Mapping[str, TensorStorageMetadata]
    ) -> bool:
        """Whether a table can be brought into the model's cut, and must be."""
        name = table.spec.name
        if found.width != table.spec.width:
            return False
        if name in self._kept:
            return True
        replicated = table.placement == "replicated"
        if found.rows != table.spec.num_rows:
            return False
        if replicated == found.sharded:
            return True
        wanted = [key for key in self._target if _table_of(key) == name]
        alike = all(
            key in saved and size_and_dtype(self._target[key])[0] == saved[key].size
            for key in wanted
        )
        return not alike and found.keeps(self._optimizer)

    def _note(self, table: TablePlan, saved: SavedTable) -> str | None:
        name = f"table {saved.name!r}"
        if table.placement == "replicated" and saved.sharded:
            return (
                f"{name} was sharded and is replicated now: AdamW goes on with second moments made "
                "of its Adagrad sums, and without first ones"
            )
        if table.placement != "replicated" and not saved.sharded:
            return (
                f"{name} was replicated and is sharded now: {self._optimizer} goes on with sums "
                "made of its Adam moments"
            )
        if saved.keeps("rowwise_adagrad") and saved.momentum != table.column_blocks:
            return (
                f"{name} lay in {saved.momentum} blocks of columns and lies in "
                f"{table.column_blocks} now: its Adagrad sums are averaged over the new blocks"
            )
        return None


class _Reader:
    """Reads rows of one saved table in the model's form."""

    def __init__(
        self,
        tensors: CheckpointTensors,
        saved: SavedTable,
        table: TablePlan,
        optimizer: str,
        beta2: float,
        updates: int,
    ) -> None:
        self._tensors, self._saved, self._table = tensors, saved, table
        self._kind = "adamw" if table.placement == "replicated" else optimizer
        self._decay = 1.0 - beta2**updates
        self._updates = updates
        self._block = max(1, BLOCK_BYTES // (saved.width * torch.float32.itemsize))

    def fill(self, part: Part, row: int, column: int, window: Tensor, kept: KeptRows) -> None:
        """Fill in a window of a part that begins at (row, column) of the whole.

        Rows that the checkpoint lacks keep their weights; their optimizer has seen nothing.
        """
        if part != "weight":
            window.zero_()
        for here, there in kept(row, len(window)):
            for chosen, first, count in _stretches(there, self._block):
                values = self._read(part, first, count)[there[chosen] - first]
                values = values[:, column : column + window.shape[1]].to(window)
                window.index_copy_(0, (here[chosen] - row).to(window.device), values)

    def _read(self, part: Part, first: int, count: int) -> Tensor:
        """Rows [n, C] of a part as the model keeps it."""
        saved, table = self._saved, self._table
        if part == "weight":
            return self._tensors.rows(saved.key("weight"), first, count)
        same_blocks = len(saved.columns) == table.column_blocks or self._kind != "rowwise_adagrad"
        if saved.keeps(self._kind) and same_blocks:
            return self._tensors.rows(saved.key(part), first, count)
        if part == "exp_avg":
            return torch.zeros(count, saved.width)
        squares = self._squares(first, count)
        if part == "exp_avg_sq":
            return squares * (self._decay / max(self._updates, 1))
        if self._kind == "adagrad":
            return squares
        blocks = squares.split(table.block_width, dim=1)
        return torch.stack(
            [block.sum(1) / table.stored_width for block in blocks], dim=1
        )  # the kernels divide by the width that they store

    def _squares(self, first: int, count: int) -> Tensor:
        """Sums of squared gradients [n, D] of rows."""
        saved = self._saved
        if not saved.sharded:
            moments = self._tensors.rows(saved.key("exp_avg_sq"), first, count)
            return moments * (self._updates / self._decay if self._updates else 0.0)
        if not saved.momentum:
            return torch.zeros(count, saved.width)
        sums = self._tensors.rows(saved.key("momentum1"), first, count)
        if not saved.keeps("rowwise_adagrad"):
            return sums
        stored = padded(max(saved.columns))
        means = [
            (sums[:, at : at + 1] * (stored / columns)).expand(-1, columns)
            for at, columns in enumerate(saved.columns)
        ]
        return torch.cat(means, dim=1)


def _table_of(key: str) -> str | None:
    """The table that a tensor of a checkpoint belongs to; None for all else."""
    found = re.match(r"tables/([^./]+)\.|dense/tables\.([^./]+)\.weight/", key)
    return None if found is None else found[1] or found[2]


def _key(table: TablePlan, part: Part) -> str:
    if table.placement == "replicated":
        return f"dense/tables.{table.spec.name}.weight/{part}"
    return f"tables/{table.spec.name}.{part}"


def _windows(value: Tensor) -> list[tuple[int, int, Tensor]]:
    """Row, column and memory of what this rank holds of a tensor."""
    if not isinstance(value, ShardedTensor):
        return [(0, 0, value)]
    shards = value.local_shards()
    return [(*shard.metadata.shard_offsets, shard.tensor) for shard in shards]  # type: ignore[misc]


def _stretches(rows: Tensor, block: int) -> Iterator[tuple[Tensor, int, int]]:
    """Cut rows, int64 [n], into stretches of at most `block`: which of them, first row, count."""
    stretch = rows // block
    for number in stretch.unique().tolist():
        chosen = (stretch == number).nonzero().squeeze(1)
        first, last = (int(bound) for bound in rows[chosen].aminmax())
        yield chosen, first, last - first + 1
