"""The dense half of a policy: the loss module and the replicated tables, in one module.

Shape legend: n requested ids, U distinct ids of a step, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import SequenceModel, TableModel, TableSpec
from sharding.embedding_plan import Shard, TablePlan
from sharding.embedding_shard import initialize_rows
from sharding.loss_module import LossModule

Rows = dict[str, Tensor]
"""Table → rows [U, D]."""
Index = dict[str, dict[str, Tensor]]
"""Table → feature → positions in the table's rows."""


class ReplicatedTable(nn.Module):
    """A small table in the dense half, under its AdamW. Row 0 stays zero."""

    def __init__(self, spec: TableSpec, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.num_rows, spec.width))
        with torch.no_grad():
            whole = Shard(0, 0, 0, spec.num_rows, spec.width)
            initialize_rows(self.weight, spec, whole, seed)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [n, D] of ids [n]."""
        return F.embedding(ids, self.weight, padding_idx=0)


class DenseHalf(nn.Module):
    """What DeepSpeed wraps: the loss module and the replicated tables.

    One forward serves every use, because ZeRO 3 gathers parameters only there.
    """

    def __init__(
        self, loss_module: LossModule, replicated: Sequence[TablePlan], autocast: bool, seed: int
    ) -> None:
        super().__init__()
        assert isinstance(loss_module, nn.Module)
        self.loss_module = loss_module
        self.tables = nn.ModuleDict(
            {table.spec.name: ReplicatedTable(table.spec, seed) for table in replicated}
        )
        self._autocast = autocast

    def forward(
        self, use: Callable[..., Any], ids: Mapping[str, Tensor], rows: Rows, *args: Any
    ) -> Any:
        """`use(self, all rows, *args)`, where `rows` lacks the replicated tables' rows of `ids`."""
        rows = rows | {name: table(ids[name]) for name, table in self.tables.items() if name in ids}
        device = next(self.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            return use(self, rows, *args)

    def loss(
        self, rows: Rows, inputs: Any, index: Index
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Loss, metrics and their own terms of a micro batch, as `LossOutput` has them (a tuple:
        DeepSpeed looks for tensors in it)."""
        output = self.loss_module(inputs, rows, index)
        loss = output.loss_sum
        if not loss.requires_grad:  # a rank without data whose loss is a constant still takes part
            parts = list(rows.values()) or list(self.parameters())
            loss = loss + 0.0 * torch.stack([value.sum() for value in parts]).sum()
        metrics = {name: value.detach() for name, value in output.metrics.items()}
        return loss, metrics, output.terms

    def infer(
        self,
        rows: Rows,
        index: Mapping[str, Tensor],
        use: Callable[[TableModel, dict[str, Tensor]], Any],
    ) -> Any:
        """`use` of the model and the embeddings of the ids at `index`."""
        embeddings = {name: F.embedding(index[name], rows[name]) for name in index}
        return use(self.loss_module.model, embeddings)

    def item_keys(self, rows: Rows) -> Tensor:
        """Keys [U, D] of item rows."""
        model = self.loss_module.model
        assert isinstance(model, SequenceModel), "a model that writes codes has no item keys"
        return model.item_keys(rows["item"]).float()

    def own_rows(self, rows: Rows) -> Rows:
        """The rows themselves."""
        return rows
