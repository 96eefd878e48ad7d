"""Where the sparse and the dense half meet: one training step over both.

Shape legend: n ids of one table in one micro batch, T tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from configs.recipe import Recipe
from configs.training import OptimizerConfig
from models.base import SequenceModel, TableSpec
from models.batch import JaggedBatch
from sharding.deepspeed_engine import DenseEngine
from sharding.embedding_shard import ShardedTables
from sharding.process_group import DistributedContext


@dataclass(frozen=True)
class LossOutput:
    """What a loss module returns for a micro batch."""

    loss_sum: Tensor
    """Scalar, sum over the micro batch's valid terms."""
    metrics: dict[str, Tensor]
    """Scalar sums that are divided by the global weight."""


class LossModule(Protocol):
    """An nn.Module that turns looked-up embeddings into a loss; `inputs` has `.to(device)`."""

    model: SequenceModel

    def required_ids(self, inputs: Any) -> dict[str, dict[str, Tensor]]:
        """Table → feature → int64 ids (any shape) whose rows `forward` wants; ids may repeat."""

    def weight(self, inputs: Any) -> Tensor:
        """Scalar count of valid terms, known before the forward."""

    def forward(
        self, inputs: Any, rows: dict[str, Tensor], index: dict[str, dict[str, Tensor]]
    ) -> LossOutput:
        """Loss of one micro batch.

        Args:
            inputs: what `required_ids` was given.
            rows: table → [U, D], the distinct rows of the whole step; the row of id 0 is zeros.
            index: table → feature → positions in `rows`, shaped like the feature's ids.
        """


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks."""

    step: int
    """Steps done, this one included."""
    loss: float
    metrics: dict[str, float]
    weight: float
    sparse_grad_norm: float
    dense_grad_norm: float
    lr: float
    sparse_lr: float


class ParallelModel:
    """A loss module with its tables and its dense engine."""

    tables: ShardedTables
    engine: DenseEngine
    ctx: DistributedContext
    step: int
    """Optimizer steps done; a checkpoint restores it by assignment."""

    def train_step(
        self, micro_inputs: Sequence[Any], sample_ids: Sequence[int] | None = None
    ) -> StepResult:
        """One update of both halves from this rank's micro batches. Collective.

        Every rank passes the same number of micro batches. `sample_ids` are named when the loss
        is not finite; nothing is updated then.
        """
        raise NotImplementedError

    def lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows [n, D] of any tables, sharded or replicated, without gradient. Collective."""
        raise NotImplementedError

    def query(self, batch: JaggedBatch) -> Tensor:
        """Queries [T, D] float32 of the model in eval mode. Collective."""
        raise NotImplementedError

    def item_keys(self, ids: Tensor) -> Tensor:
        """Keys [n, D] float32 of items [n]. Collective."""
        raise NotImplementedError


def parallelize(
    loss_module: LossModule,
    specs: Sequence[TableSpec],
    recipe: Recipe,
    ctx: DistributedContext,
    *,
    total_steps: int,
    optimizer: OptimizerConfig,
    sparse_lr: float,
) -> ParallelModel:
    """Shard the tables, wrap the dense half, and join them."""
    raise NotImplementedError
