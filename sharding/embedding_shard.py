"""Embedding tables sharded over ranks by TorchRec, updated in their backward.

Shape legend: n looked-up ids of this rank, D table width, V table rows.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as TensorShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingEnv
from torchrec.distributed.types import ShardMetadata as PlannedShard

from configs.sharding import SparseOptimizerConfig
from models.base import TableSpec
from models.ops.hashing import as_signed, mix64
from sharding.embedding_plan import EmbeddingPlan, Shard, TablePlan
from sharding.process_group import DistributedContext

INIT_CHUNK = 1 << 20  # elements drawn at once
TRUNCATION = 2.0  # standard deviations
OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}


@dataclass(frozen=True)
class LocalShard:
    """A shard that lies on this rank; tensors share memory with the fused kernels."""

    shard: Shard
    weight: Tensor
    """[rows, columns]; the padding columns of the kernels' storage are left out."""
    momentum: Tensor | None
    """[rows, 1] of rowwise_adagrad, [rows, columns] of adagrad."""


class ShardedTables:
    """The sparse half: every sharded table of a plan, with its fused optimizer."""

    def __init__(
        self,
        plan: EmbeddingPlan,
        optimizer: SparseOptimizerConfig,
        ctx: DistributedContext,
        seed: int,
    ) -> None:
        assert plan.world_size == ctx.world_size, "the plan is for another world size"
        self.plan = plan
        self.names = tuple(table.spec.name for table in plan.sharded)
        self._ctx = ctx
        self._optimizer = optimizer
        groups: dict[tuple[int, bool], list[TablePlan]] = {}
        for table in plan.sharded:
            key = (table.spec.width, table.placement == "column_wise")
            groups.setdefault(key, []).append(table)
        self._collections = [_Collection(tables, optimizer, ctx) for tables in groups.values()]
        self._local = {
            name: shards for group in self._collections for name, shards in group.local.items()
        }
        self._lr = optimizer.lr
        for table in plan.sharded:
            for local in self._local[table.spec.name]:
                initialize_rows(local.weight, table.spec, local.shard, seed)

    def lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of every table: table → ids [n] int64 gives table → [n, D] float32. Collective.

        Every rank names the same tables; n may differ between ranks and be 0. Connected to
        autograd: the backward (collective too) makes one fused update with the gradient divided by
        the world size. Ids should be distinct (a repeated one costs traffic); id 0 gives zeros and
        receives no gradient. Ids beyond the table are undefined.
        """
        rows: dict[str, Tensor] = {}
        for group in self._collections:
            rows |= group.lookup(ids)
        return rows

    def set_lr(self, lr: float) -> None:
        """Learning rate of the updates of later lookups."""
        if lr != self._lr:
            self._lr = lr
            for group in self._collections:
                group.set_lr(lr)

    def local_tensors(self) -> Iterable[Tensor]:
        """Weights on this rank."""
        return (local.weight for shards in self._local.values() for local in shards)

    def gather(self, name: str) -> Tensor:
        """The whole table [V, D] on every rank. Collective; for tests and small tables."""
        spec = next(table.spec for table in self.plan.sharded if table.spec.name == name)
        full = torch.zeros(spec.num_rows, spec.width, device=self._ctx.device)
        for local in self._local[name]:
            _window(full, local.shard).copy_(local.weight)
        return self._ctx.all_reduce_sum(full)

    def state_dict(self) -> dict[str, ShardedTensor]:
        """Weights and fused optimizer state as sharded tensors, for DCP to save or to load into.

        Keys `<table>.weight` [V, D] and `<table>.momentum1`: [V, column blocks] of rowwise_adagrad,
        [V, D] of adagrad, absent for sgd. Every rank has every key, with no local shard where it
        owns nothing. A shard shares memory with the table unless its rows are padded there: call
        `load_state_dict` after loading.
        """
        return {key: self._sharded_tensor(size, entries) for key, size, entries in self._entries()}

    def load_state_dict(self, state: Mapping[str, ShardedTensor]) -> None:
        """Copy the local shards of `state`, laid out as `state_dict()`, into the tables.

        Keys that `state` lacks (weights only) are left as they are.
        """
        for key, _, entries in self._entries():
            if key not in state:
                continue
            ours = [tensor for _, tensor in entries if tensor is not None]
            for target, source in zip(ours, state[key].local_shards(), strict=True):
                if target.data_ptr() != source.tensor.data_ptr():
                    target.copy_(source.tensor)

    def _entries(self) -> Iterator[tuple[str, tuple[int, int], list[tuple[Shard, Tensor | None]]]]:
        """Key, global size, and every shard's place in it with its local tensor if any."""
        for table in self.plan.sharded:
            name, kind = table.spec.name, self._optimizer.kind
            local = {entry.shard: entry for entry in self._local[name]}
            size = (table.spec.num_rows, table.spec.width)
            shards = [shard for shard in table.shards if shard.rows]
            held = [local.get(shard) for shard in shards]
            weights = [entry.weight if entry else None for entry in held]
            yield f"{name}.weight", size, list(zip(shards, weights, strict=True))
            if kind == "sgd":
                continue
            if kind == "rowwise_adagrad":
                size = (table.spec.num_rows, table.column_blocks)
                shards = [_accumulator(shard, table) for shard in shards]
            momenta = [entry.momentum if entry else None for entry in held]
            yield f"{name}.momentum1", size, list(zip(shards, momenta, strict=True))

    def _sharded_tensor(
        self, size: tuple[int, int], entries: list[tuple[Shard, Tensor | None]]
    ) -> ShardedTensor:
        """A sharded tensor from the place of every shard and the local ones' memory."""
        device = self._ctx.device.type
        metadata = [
            ShardMetadata(
                [box.row, box.column], [box.rows, box.columns], f"rank:{box.rank}/{device}"
            )
            for box, _ in entries
        ]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            [
                TensorShard(tensor.contiguous(), place)
                for place, (_, tensor) in zip(metadata, entries, strict=True)
                if tensor is not None
            ],
            ShardedTensorMetadata(
                metadata, torch.Size(size), TensorProperties(dtype=torch.float32)
            ),
        )


class _Collection:
    """Tables that TorchRec looks up together: of one width, all or none of them column-wise."""

    def __init__(
        self, tables: list[TablePlan], optimizer: SparseOptimizerConfig, ctx: DistributedContext
    ) -> None:
        self._tables = tables
        self._names = [table.spec.name for table in tables]
        self._rank, self._device = ctx.rank, ctx.device
        self._scale = self._padding_scale(optimizer)
        sharder = EmbeddingCollectionSharder(
            fused_params={
                "optimizer": OPTIMIZERS[optimizer.kind],
                "learning_rate": optimizer.lr * self._scale,
                "eps": optimizer.eps * self._scale,
            }
        )
        assert dist.group.WORLD is not None
        self._module = sharder.shard(
            _describe(tables),
            {table.spec.name: self._parameter_sharding(table) for table in tables},
            ShardingEnv.from_process_group(dist.group.WORLD),
            device=ctx.device,
        )
        self.local = self._local_shards()

    def lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of this collection's tables."""
        values = [ids[name] for name in self._names]
        counts = [value.numel() for value in values]
        features = KeyedJaggedTensor(
            keys=self._names,
            values=torch.cat(values) if len(values) > 1 else values[0],
            lengths=torch.tensor(counts, device=self._device),
            stride=1,
            length_per_key=counts,
        )
        looked_up = self._module(features)
        return {
            table.spec.name: self._unpad(looked_up[table.spec.name].values(), table, value)
            for table, value in zip(self._tables, values, strict=True)
        }

    def set_lr(self, lr: float) -> None:
        """Learning rate of the updates of later lookups."""
        fused = self._module.fused_optimizer
        for group in fused.param_groups:
            group["lr"] = lr * self._scale
        fused.step()  # hands the rate to the kernels; the update itself happens in the backward

    @staticmethod
    def _unpad(stored: Tensor, table: TablePlan, ids: Tensor) -> Tensor:
        """Looked-up rows without the padding columns; cuts the gradient of id 0."""
        width, block = table.spec.width, table.block_width
        if table.stored_width != block:
            stored = stored.view(-1, table.column_blocks, table.stored_width)[:, :, :block]
            stored = stored.reshape(-1, table.column_blocks * block)
        rows = stored[:, :width]
        if rows.requires_grad:
            rows.register_hook(lambda grad: grad.masked_fill((ids == 0).unsqueeze(1), 0.0))
        return rows

    def _padding_scale(self, optimizer: SparseOptimizerConfig) -> float:
        """Factor on learning rate and eps that undoes the padding columns.

        Row-wise Adagrad divides the squared gradient of a row by the stored width S, not by the
        width C it has: its accumulator is C/S of the true one. With lr and eps scaled by sqrt(C/S)
        the update is that of the unpadded table.
        """
        if optimizer.kind != "rowwise_adagrad":
            return 1.0
        scales = {
            math.sqrt(shard.columns / table.stored_width)
            for table in self._tables
            for shard in table.shards
            if shard.rank == self._rank
        }
        assert len(scales) <= 1, "tables of one collection are padded alike"
        return scales.pop() if scales else 1.0

    def _parameter_sharding(self, table: TablePlan) -> ParameterSharding:
        """The plan of a table as TorchRec reads it, in stored columns."""
        boxes = [table.stored(shard) for shard in table.shards]
        shards = [
            PlannedShard(
                shard_offsets=[box.row, box.column],
                shard_sizes=[box.rows, box.columns],
                placement=self._place(box.rank),
            )
            for box in boxes
        ]
        return ParameterSharding(
            sharding_type=table.placement,
            compute_kernel=EmbeddingComputeKernel.FUSED.value,
            ranks=[shard.rank for shard in table.shards],
            sharding_spec=EnumerableShardingSpec(shards),
        )

    def _place(self, rank: int) -> str:
        """A rank's device as torch.distributed writes it."""
        if self._device.type == "cpu":
            return f"rank:{rank}/cpu"
        return f"rank:{rank}/cuda:{rank % torch.cuda.device_count()}"

    def _local_shards(self) -> dict[str, list[LocalShard]]:
        """This rank's shards as views of the kernels' memory, padding zeroed."""
        weights = self._module.state_dict()
        momenta = self._module.fused_optimizer.state_dict()["state"]
        local: dict[str, list[LocalShard]] = {}
        for table in self._tables:
            key = f"embeddings.{table.spec.name}.weight"
            stored = [shard.tensor for shard in weights[key].local_shards()]
            states = momenta.get(key, {})
            momentum = states.get(f"{table.spec.name}.momentum1")
            held = momentum.local_shards() if momentum is not None else []
            accumulators = [entry.tensor for entry in held]
            mine = [shard for shard in table.shards if shard.rank == self._rank]
            local[table.spec.name] = []
            for at, shard in enumerate(mine):
                stored[at].zero_()
                window = (slice(shard.rows), slice(shard.columns))
                accumulator = accumulators[at] if accumulators else None
                if accumulator is not None:
                    flat = accumulator.dim() == 1
                    accumulator = (accumulator[:, None] if flat else accumulator)[window]
                local[table.spec.name].append(LocalShard(shard, stored[at][window], accumulator))
        return local


def _describe(tables: list[TablePlan]) -> EmbeddingCollection:
    """The unsharded collection, without memory."""
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=table.spec.name,
                num_embeddings=table.stored_rows,
                embedding_dim=table.stored_width * table.column_blocks,
                feature_names=[table.spec.name],
                init_fn=_leave,
            )
            for table in tables
        ],
        device=torch.device("meta"),
    )


def _leave(weight: Tensor) -> Tensor:
    """TorchRec's initialisation: none, `initialize_rows` does it."""
    return weight


def _window(full: Tensor, shard: Shard) -> Tensor:
    """The part of a full table that a shard is."""
    return full[shard.row : shard.row + shard.rows, shard.column : shard.column + shard.columns]


def _accumulator(shard: Shard, table: TablePlan) -> Shard:
    """Where a shard's row-wise accumulator lies in the [V, column blocks] tensor of its table."""
    return Shard(shard.rank, shard.row, shard.column // table.block_width, shard.rows, 1)


def initialize_rows(weight: Tensor, spec: TableSpec, shard: Shard, seed: int) -> None:
    """Fill a shard with normal noise of `spec.init_std`, cut at two standard deviations.

    An element is a pure function of (seed, table name, row, column), whatever rank or shard it
    lies in; row 0 is zeros. `weight` [rows, columns] is a shard of the table.
    """
    digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    key = as_signed(int.from_bytes(digest[:8], "little"))
    columns = torch.arange(shard.column, shard.column + shard.columns, dtype=torch.int64)
    tail = 0.5 * math.erfc(TRUNCATION / math.sqrt(2.0))
    chunk = max(1, INIT_CHUNK // max(shard.columns, 1))
    for start in range(0, shard.rows, chunk):
        stop = min(start + chunk, shard.rows)
        rows = torch.arange(shard.row + start, shard.row + stop, dtype=torch.int64)
        counters = rows[:, None] * spec.width + columns
        bits = mix64(mix64(counters + key) + key) >> 12
        # 52 random bits at the centres of their cells, then the inverse of the normal's
        # distribution. Float64, so that rounding to float32 hides how a kernel is vectorised.
        uniform = (bits.double() + (float(1 << 51) + 0.5)) / float(1 << 52)
        noise = torch.special.ndtri(tail + (1.0 - 2.0 * tail) * uniform) * spec.init_std
        weight[start:stop].copy_(noise)
    if shard.row == 0 and shard.rows:
        weight[0].zero_()
