"""Which rank holds which part of which embedding table."""

from collections.abc import Sequence
from dataclasses import dataclass

from configs.sharding import Placement, ShardingConfig, SparseOptimizerConfig
from models.base import TableSpec


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


@dataclass(frozen=True)
class EmbeddingPlan:
    """The plan of all tables for a world size, which need not be the current one."""

    tables: tuple[TablePlan, ...]
    world_size: int
    device: str
    optimizer: SparseOptimizerConfig

    @property
    def sharded(self) -> tuple[TablePlan, ...]:
        """Tables of the sparse half."""
        return tuple(table for table in self.tables if table.placement != "replicated")

    @property
    def replicated(self) -> tuple[TablePlan, ...]:
        """Tables that live in the dense half."""
        return tuple(table for table in self.tables if table.placement == "replicated")

    def render(self) -> str:
        """A printable table: rows, width, placement, shards and bytes per rank."""
        raise NotImplementedError


def plan_tables(
    specs: Sequence[TableSpec], config: ShardingConfig, world_size: int, device: str
) -> EmbeddingPlan:
    """Place every table; `auto` is the planner's choice."""
    raise NotImplementedError
