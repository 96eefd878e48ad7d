"""Which rank holds which part of which embedding table.

TorchRec's planner places what the recipe leaves to it; a plan can be made for a world that does
not exist here. Shape legend: D width of a table, V its rows, W ranks.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ModuleSharder, ParameterSharding

from configs.sharding import Placement, ShardingConfig, SparseOptimizerConfig
from models.base import TableSpec
from sharding.process_group import DistributedContext, hush_libraries

LANES = 4  # the fused kernels hold rows whose width is a multiple of this
FLOAT_BYTES = 4
GIB = 1 << 30
PLANNED: tuple[Placement, ...] = ("row_wise", "table_wise")
"""What `auto` chooses from. Column-wise tables keep one row-wise accumulator per block of columns,
which changes the update with the world size, so that is for the recipe to ask for."""


def padded(width: int) -> int:
    """Columns that the fused kernels store for a row of `width`."""
    return -(-width // LANES) * LANES


@dataclass(frozen=True)
class Shard:
    """A rectangle of a table that one rank owns."""

    rank: int
    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True)
class TablePlan:
    """A table, its placement (never `auto`), and its shards in global order.

    A replicated table has no shards: it lives in the dense half on every rank.
    """

    spec: TableSpec
    placement: Placement
    shards: tuple[Shard, ...]

    @property
    def column_blocks(self) -> int:
        """Shards that a row is cut into."""
        return len({shard.column for shard in self.shards})

    @property
    def block_width(self) -> int:
        """Columns of the first (widest) shard."""
        return self.shards[0].columns

    @property
    def stored_width(self) -> int:
        """Columns of a shard in memory: `block_width` padded to what the kernels hold."""
        return padded(self.block_width)

    @property
    def stored_rows(self) -> int:
        """Rows of the table in memory: padded where a row-wise shard would have none."""
        if self.placement != "row_wise":
            return self.spec.num_rows
        block, last = self.shards[0].rows, len(self.shards) - 1
        return max(self.spec.num_rows, block * last + 1)

    def stored(self, shard: Shard) -> Shard:
        """A shard as it lies in memory, padding included."""
        width = self.stored_width
        column = shard.column // self.block_width * width
        if self.placement != "row_wise":
            return Shard(shard.rank, shard.row, column, shard.rows, width)
        block = self.shards[0].rows
        row = shard.rank * block
        return Shard(shard.rank, row, column, min(block, self.stored_rows - row), width)


@dataclass(frozen=True)
class Machine:
    """What the planner must know of where ranks run; every rank is taken to have the same."""

    memory: int
    """Bytes that a rank may use for tables."""
    ranks_per_node: int


@dataclass(frozen=True)
class EmbeddingPlan:
    """The plan of all tables for a world size, which need not be the current one."""

    tables: tuple[TablePlan, ...]
    world_size: int
    device: str
    optimizer: SparseOptimizerConfig

    @cached_property
    def sharded(self) -> tuple[TablePlan, ...]:
        """Tables of the sparse half."""
        return tuple(table for table in self.tables if table.placement != "replicated")

    @cached_property
    def replicated(self) -> tuple[TablePlan, ...]:
        """Tables that live in the dense half."""
        return tuple(table for table in self.tables if table.placement == "replicated")

    def bytes_of_rank(self, rank: int) -> tuple[int, int]:
        """Bytes of table weights and of their optimizer state on a rank (no padding)."""
        shards = [shard for table in self.sharded for shard in table.shards if shard.rank == rank]
        weights = sum(shard.rows * shard.columns for shard in shards)
        state = sum(self._state_size(shard) for shard in shards)
        for table in self.replicated:
            weights += table.spec.num_rows * table.spec.width
            state += 2 * table.spec.num_rows * table.spec.width  # AdamW, before ZeRO divides it
        return weights * FLOAT_BYTES, state * FLOAT_BYTES

    def _state_size(self, shard: Shard) -> int:
        match self.optimizer.kind:
            case "rowwise_adagrad":
                return shard.rows
            case "adagrad":
                return shard.rows * shard.columns
            case "sgd":
                return 0

    def render(self) -> str:
        """A printable table: rows, width, placement, shards and bytes per rank."""
        header = ("table", "rows", "width", "placement", "shards (rank: rows × columns)")
        lines = [header] + [
            (
                table.spec.name,
                f"{table.spec.num_rows:,}",
                str(table.spec.width),
                table.placement,
                _describe_shards(table),
            )
            for table in self.tables
        ]
        widths = [max(len(line[at]) for line in lines) for at in range(4)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False))
            + f"  {line[4]}"
            for line in lines
        ]
        by_bytes: dict[tuple[int, int], list[int]] = {}
        for rank in range(self.world_size):
            by_bytes.setdefault(self.bytes_of_rank(rank), []).append(rank)
        for (weights, state), ranks in by_bytes.items():
            text.append(
                f"{_describe_ranks(ranks)}: weights {_describe_bytes(weights)}, "
                f"optimizer {_describe_bytes(state)}"
            )
        cut = [t.spec.name for t in self.sharded if t.placement == "column_wise"]
        if cut and self.optimizer.kind == "rowwise_adagrad":
            text.append(
                f"note: row-wise Adagrad sums each block of columns of {', '.join(cut)} by itself, "
                "so that losses depend on the number of blocks"
            )
        return "\n".join(text)


def agree_on_plan(
    specs: Sequence[TableSpec], config: ShardingConfig, ctx: DistributedContext
) -> EmbeddingPlan:
    """The one plan of a worker group, made by rank 0 for the smallest machine. Collective.

    Ranks that planned for themselves would name different owners wherever their nodes differ, and
    look up rows that nobody holds.

    Raises:
        ValueError: as `plan_tables` does, with the same sentence on every rank.
    """
    machines = ctx.all_gather_object(_this_machine(config, ctx.world_size, ctx.device.type))
    smallest = Machine(
        memory=min(machine.memory for machine in machines),
        ranks_per_node=min(machine.ranks_per_node for machine in machines),
    )
    plan: EmbeddingPlan | None = None
    failure: str | None = None
    if ctx.rank == 0:
        try:
            plan = plan_tables(specs, config, ctx.world_size, ctx.device.type, smallest)
        except ValueError as error:
            failure = str(error)
    plan, failure = ctx.broadcast_object((plan, failure))
    if failure is not None:
        raise ValueError(failure)
    assert plan is not None
    return plan


def plan_tables(
    specs: Sequence[TableSpec],
    config: ShardingConfig,
    world_size: int,
    device: str,
    machine: Machine | None = None,
) -> EmbeddingPlan:
    """Place every table; `auto` is the planner's choice of row-wise or table-wise.

    Args:
        specs: tables of the model.
        config: placements, optimizer and memory limits of the recipe.
        world_size: ranks to plan for; none of them need exist.
        device: `cpu` or `cuda`.
        machine: where the ranks run; None takes this process's machine for all of them.

    Raises:
        ValueError: a table is too large to replicate, or the tables do not fit the ranks.
    """
    hush_libraries()  # TorchRec warns of any topology that one makes oneself
    machine = machine or _this_machine(config, world_size, device)
    wanted = {spec.name: config.placement.get(spec.name, config.default) for spec in specs}
    for spec in specs:
        if wanted[spec.name] == "replicated" and spec.num_rows > config.max_replicated_rows:
            raise ValueError(
                f"table {spec.name!r} has {spec.num_rows:,} rows, too many to be replicated "
                f"(sharding.max_replicated_rows={config.max_replicated_rows:,}); place it row_wise "
                "or raise the limit"
            )
    chosen = _planner_choice(
        [spec for spec in specs if wanted[spec.name] in ("auto", "table_wise")],
        wanted,
        _topology(machine, world_size, device),
    )
    tables = tuple(_place(spec, wanted[spec.name], chosen, world_size) for spec in specs)
    plan = EmbeddingPlan(tables, world_size, device, config.optimizer)
    _check_memory(plan, machine.memory)
    return plan


def _place(
    spec: TableSpec, wanted: Placement, chosen: dict[str, ParameterSharding], world_size: int
) -> TablePlan:
    """Cut a table as its placement says."""
    placement, rank = wanted, 0
    if spec.name in chosen:
        sharding = chosen[spec.name]
        placement = "row_wise" if sharding.sharding_type == "row_wise" else "table_wise"
        assert sharding.ranks is not None
        rank = sharding.ranks[0]
    match placement:
        case "row_wise":
            shards = _row_shards(spec, world_size)
        case "column_wise":
            shards = _column_shards(spec, world_size)
        case "table_wise":
            shards = (Shard(rank, 0, 0, spec.num_rows, spec.width),)
        case _:
            shards = ()
    return TablePlan(spec, placement, shards)


def _row_shards(spec: TableSpec, world_size: int) -> tuple[Shard, ...]:
    """Blocks of ceil(V / W) rows, as TorchRec routes ids; trailing ones may be empty."""
    block = -(-spec.num_rows // world_size)
    starts = [min(rank * block, spec.num_rows) for rank in range(world_size)]
    return tuple(
        Shard(rank, start, 0, min(block, spec.num_rows - start), spec.width)
        for rank, start in enumerate(starts)
    )


def _column_shards(spec: TableSpec, world_size: int) -> tuple[Shard, ...]:
    """Equal blocks of columns, one a rank, none narrower than the kernels' lanes."""
    blocks = min(world_size, max(1, spec.width // LANES))
    columns = -(-spec.width // blocks)
    starts = range(0, spec.width, columns)
    return tuple(
        Shard(rank, 0, start, spec.num_rows, min(columns, spec.width - start))
        for rank, start in enumerate(starts)
    )


def _planner_choice(
    specs: Sequence[TableSpec],
    wanted: dict[str, Placement],
    topology: Topology,
) -> dict[str, ParameterSharding]:
    """What TorchRec's planner decides for tables that the recipe leaves to it, by name."""
    if not specs:
        return {}
    allowed = {
        spec.name: PLANNED if wanted[spec.name] == "auto" else ("table_wise",) for spec in specs
    }
    model = torch.nn.ModuleDict()
    for width in sorted({spec.width for spec in specs}):
        stored = padded(width)
        model[f"width_{width}"] = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=spec.name,
                    num_embeddings=spec.num_rows,
                    embedding_dim=stored,
                    feature_names=[spec.name],
                )
                for spec in specs
                if spec.width == width
            ],
            device=torch.device("meta"),
        )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
        constraints={
            name: ParameterConstraints(
                sharding_types=list(kinds), compute_kernels=[EmbeddingComputeKernel.FUSED.value]
            )
            for name, kinds in allowed.items()
        },
    )
    sharders: list[ModuleSharder[torch.nn.Module]] = [EmbeddingCollectionSharder()]
    try:
        plan = planner.plan(model, sharders)
    except PlannerError as error:
        raise ValueError(
            f"the tables {sorted(allowed)} do not fit {topology.world_size} ranks "
            f"({str(error).splitlines()[0]}); add workers, or raise sharding.hbm_gb"
        ) from error
    return {name: sharding for module in plan.plan.values() for name, sharding in module.items()}


def _topology(machine: Machine, world_size: int, device: str) -> Topology:
    """Machines as the planner sees them: memory per rank, ranks per node."""
    local = min(world_size, machine.ranks_per_node)
    while world_size % local:
        local -= 1
    if device == "cuda":
        return Topology(world_size, device, local_world_size=local, hbm_cap=machine.memory)
    return Topology(world_size, device, local_world_size=local, ddr_cap=machine.memory)


def _this_machine(config: ShardingConfig, world_size: int, device: str) -> Machine:
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Machine(_memory_limit(config, device), ranks_per_node)


def _memory_limit(config: ShardingConfig, device: str) -> int:
    """Bytes that a rank may use for tables."""
    if config.hbm_gb is not None:
        return int(config.hbm_gb * GIB)
    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_memory(plan: EmbeddingPlan, limit: int) -> None:
    for rank in range(plan.world_size):
        needed = sum(plan.bytes_of_rank(rank))
        if needed > limit:
            raise ValueError(
                f"rank {rank} would hold {_describe_bytes(needed)} of tables, more than "
                f"{_describe_bytes(limit)}; add workers, or raise sharding.hbm_gb"
            )


def _describe_shards(table: TablePlan) -> str:
    if table.placement == "replicated":
        return "dense half, every rank"
    groups: dict[tuple[int, int], list[int]] = {}
    for shard in table.shards:
        groups.setdefault((shard.rows, shard.columns), []).append(shard.rank)
    return "; ".join(
        f"{_describe_ranks(ranks)}: {rows:,} × {columns}"
        for (rows, columns), ranks in groups.items()
    )


def _describe_ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return "ranks " + ",".join(map(str, ranks))


def _describe_bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
