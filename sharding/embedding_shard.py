"""Embedding tables sharded over ranks, updated in their backward.

Shape legend: n looked-up ids of this rank, D table width, V table rows.
"""

from collections.abc import Mapping

from torch import Tensor

from configs.sharding import SparseOptimizerConfig
from sharding.embedding_plan import EmbeddingPlan
from sharding.process_group import DistributedContext


class ShardedTables:
    """The sparse half: every sharded table of a plan, with its fused optimizer."""

    def __init__(
        self,
        plan: EmbeddingPlan,
        optimizer: SparseOptimizerConfig,
        ctx: DistributedContext,
        seed: int,
    ) -> None:
        raise NotImplementedError

    @property
    def plan(self) -> EmbeddingPlan:
        """The plan these tables follow."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sharded tables (possibly none)."""
        raise NotImplementedError

    def lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of every table: table → ids [n] int64 gives table → [n, D]. Collective.

        Every rank names the same tables; n may differ between ranks and be 0. Connected to
        autograd: the backward (collective too) makes one fused update. Id 0 gives zeros and
        receives no gradient.
        """
        raise NotImplementedError

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next fused update."""
        raise NotImplementedError

    def gather(self, name: str) -> Tensor:
        """The whole table [V, D] on every rank. Collective; for tests and small tables."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and fused optimizer state as sharded tensors that share memory with the tables.

        Keys `<table>.weight` [V, D] and, by optimizer, `<table>.momentum1` ([V, number of column
        shards] for rowwise_adagrad, [V, D] for adagrad, absent for sgd). Every rank has every key,
        with no local shard where it owns nothing, so that DCP can save and load them in place:
        loading into this dict restores the tables.
        """
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy shards of `state` (laid out as `state_dict()`) into the tables, if not in place."""
        raise NotImplementedError
