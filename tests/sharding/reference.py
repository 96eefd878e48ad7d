"""Unsharded plain-PyTorch twins that the sharded halves are compared with."""

import torch
from torch import Tensor

from configs.sharding import Placement, ShardingConfig, SparseOptimizerConfig
from models.base import TableSpec
from sharding.embedding_plan import Shard, plan_tables
from sharding.embedding_shard import ShardedTables, initialize_rows
from sharding.process_group import current_context


class ReferenceTable:
    """One embedding table on one process, with the fused optimizers written from their formulas."""

    def __init__(
        self, spec: TableSpec, optimizer: SparseOptimizerConfig, seed: int, column_blocks: int = 1
    ) -> None:
        self.weight = torch.empty(spec.num_rows, spec.width)
        initialize_rows(self.weight, spec, Shard(0, 0, 0, spec.num_rows, spec.width), seed)
        self.optimizer = optimizer
        columns = -(-spec.width // column_blocks)
        self.blocks = [slice(at, at + columns) for at in range(0, spec.width, columns)]
        self.squares = torch.zeros(spec.num_rows, spec.width)

    def update(self, ids: Tensor, grad: Tensor, lr: float) -> None:
        """One update from the gradient [n, D] of rows `ids` [n], which may repeat."""
        total = torch.zeros_like(self.weight).index_add_(0, ids, grad)
        total[0] = 0
        touched = torch.zeros(len(total), dtype=torch.bool)
        touched[ids] = True
        touched[0] = False
        match self.optimizer.kind:
            case "sgd":
                self.weight -= lr * total
            case "adagrad":
                self.squares += total**2
                self.weight -= lr * total / (self.squares.sqrt() + self.optimizer.eps)
            case "rowwise_adagrad":
                for block in self.blocks:
                    part = total[:, block]
                    self.squares[:, block] += (part**2).mean(1, keepdim=True)
                    step = lr * part / (self.squares[:, block].sqrt() + self.optimizer.eps)
                    self.weight[:, block] -= step * touched[:, None]


def make_tables(
    specs: tuple[TableSpec, ...],
    placement: Placement | dict[str, Placement],
    optimizer: SparseOptimizerConfig,
    seed: int = 7,
) -> ShardedTables:
    """Sharded tables in the current process group."""
    ctx = current_context("cpu")
    if isinstance(placement, str):
        config = ShardingConfig(default=placement, optimizer=optimizer)
    else:
        config = ShardingConfig(placement=placement, optimizer=optimizer)
    plan = plan_tables(specs, config, ctx.world_size, "cpu")
    return ShardedTables(plan, optimizer, ctx, seed)
