"""Where the sparse and the dense half meet: one training step over both.

Shape legend: n requested ids, U distinct ids of a step, T tokens, D width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.recipe import Recipe
from configs.training import OptimizerConfig, ScheduleConfig
from models.base import SequenceModel, TableModel, TableSpec
from models.batch import JaggedBatch
from sharding.deepspeed_engine import DenseEngine
from sharding.dense_half import DenseHalf, Index, Rows
from sharding.distinct import distinct_ids
from sharding.embedding_plan import agree_on_plan
from sharding.embedding_shard import ShardedTables
from sharding.loss_module import LossModule, LossOutput, NonFiniteLossError
from sharding.process_group import DistributedContext
from sharding.step_result import StepResult

__all__ = ["LossModule", "LossOutput", "ParallelModel", "parallelize"]

NAMED_SAMPLES = 64  # sample ids in an error message


class ParallelModel:
    """A loss module with its tables and its dense engine."""

    def __init__(
        self,
        dense: DenseHalf,
        tables: ShardedTables,
        engine: DenseEngine,
        ctx: DistributedContext,
        schedule: Callable[[int], float],
        peaks: tuple[float, float],
        clips: tuple[float | None, float | None],
    ) -> None:
        self.tables = tables
        self.engine = engine
        self.ctx = ctx
        self.step = 0
        """Optimizer steps done; a checkpoint restores it by assignment."""
        self.lr_ratio = 1.0
        """Multiplies the schedule of both halves; what lowers it says so in its own state."""
        self.may_skip = False
        """Steps that are not finite may be left out (`skip_step`): on CUDA, too, every step then
        waits for the device to know it, instead of an assert that ends the process."""
        self.before_change: Callable[[], None] = _nothing
        """Called before weights, rows or optimizer state change. A save behind training copies
        them while the next step computes its gradient, and waits here until it has them."""
        self._dense = dense
        self._loss: LossModule = dense.loss_module
        self._schedule = schedule
        self._sparse_lr, self._lr = peaks
        self._sparse_clip, self._dense_clip = clips
        self._num_rows = {t.spec.name: t.spec.num_rows for t in tables.plan.tables}
        _check_halves(dense, tables, engine)

    @property
    def model(self) -> TableModel:
        """The model inside the loss module."""
        return self._loss.model

    def train_step(
        self,
        micro_inputs: Sequence[Any],
        sample_ids: Sequence[int] | None = None,
        stop: bool = False,
    ) -> StepResult:
        """One update of both halves from this rank's micro batches. Collective.

        Every rank passes the same number of micro batches, at least one, empty where it has less.
        The gradient is that of sum(loss) / (global weight), so neither world size nor accumulation
        changes it. `sample_ids` are named in the error if something is not finite. That this rank
        was asked to end (`stop`) rides along to the others at no cost.

        Raises:
            NonFiniteLossError: the loss or its gradient is not finite; no weight has changed then.
                (On CUDA a device-side assert, a RuntimeError, says so, unless `may_skip`.)
        """
        micro = [inputs.to(self.ctx.device) for inputs in micro_inputs]
        weights = torch.stack([self._loss.weight(inputs) for inputs in micro]).double()
        # Global weight, how many micro batches of any rank are empty, and ranks that shall end.
        told = weights.new_tensor(float(stop))
        shared = torch.stack([weights.sum(), (weights == 0).sum().double(), told])
        wait = self.ctx.all_reduce_sum_later(shared)
        self.engine.train(True)
        factor = self.lr_ratio * self._schedule(self.step)
        lr, sparse_lr = factor * self._lr, factor * self._sparse_lr
        self.tables.set_lr(sparse_lr)  # before the lookup: its kernels keep the rate for the update
        distinct, index = self._distinct([self._loss.required_ids(inputs) for inputs in micro])
        rows = self._sharded_rows(distinct)
        leaves = {name: value.detach().requires_grad_() for name, value in rows.items()}
        wait()
        _, empty, ending = shared.tolist()  # the one time that a step waits for the device
        totals, names, counted = self._backward(micro, distinct, leaves, index, shared, empty > 0)
        self._check_finite(totals, sample_ids)
        self.before_change()
        self._update_tables(rows, leaves, totals[2])
        if self._dense_clip is not None:
            self.engine.scale_grads(_clip_factor(totals[1], self._dense_clip))
        self.engine.step(lr)
        self._balance_experts()
        self.step += 1
        return StepResult(self.step, ending > 0, lr, sparse_lr, names, counted, totals)

    def _distinct(self, required: Sequence[Index]) -> tuple[dict[str, Tensor], list[Index]]:
        """Distinct ids of every table over all micro batches, and each one's positions."""
        distinct: dict[str, Tensor] = {}
        index: list[Index] = [{} for _ in required]
        for name in required[0]:
            ids = [values for wanted in required for values in wanted[name].values()]
            distinct[name], positions = distinct_ids(name, ids, self._num_rows[name])
            places = iter(positions)
            for at, wanted in enumerate(required):
                index[at][name] = {feature: next(places) for feature in wanted[name]}
        return distinct, index

    def _sharded_rows(self, distinct: Mapping[str, Tensor]) -> Rows:
        """Rows of every sharded table that `distinct` names; the lookup covers all of them."""
        nothing = torch.zeros(0, dtype=torch.int64, device=self.ctx.device)
        rows = self.tables.lookup({n: distinct.get(n, nothing) for n in self.tables.names})
        return {name: value for name, value in rows.items() if name in distinct}

    def _backward(
        self,
        micro: Sequence[Any],
        distinct: Mapping[str, Tensor],
        leaves: Rows,
        index: Sequence[Index],
        shared: Tensor,
        deferred: bool,
    ) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
        """Forward and backward of all micro batches; local sums and names as `StepResult` has
        them."""
        # Both halves average over ranks: undo that, and divide by the global weight instead.
        scale = (self.ctx.world_size / shared[0].clamp(min=1.0)).float()
        sums: list[Tensor] = []
        names: tuple[str, ...] = ()
        counted: tuple[str, ...] = ()
        with self.engine.accumulate(deferred=deferred):
            for at, inputs in enumerate(micro):
                # A copy of the leaves: ZeRO 3 replaces tensors inside the arguments of a forward.
                loss, metrics, terms = self.engine(
                    DenseHalf.loss, distinct, dict(leaves), inputs, index[at]
                )
                names, counted = tuple(sorted(metrics)), tuple(sorted(terms))
                told = [*(metrics[name] for name in names), *(terms[name] for name in counted)]
                sums.append(torch.stack([loss.detach(), *told]))
                self.engine.backward(loss * scale, last=at == len(micro) - 1)
        squares = [_row_gradient(leaf, distinct[name]) for name, leaf in leaves.items()]
        sparse = torch.stack(squares).sum() if squares else scale.new_zeros(())
        sparse = sparse / self.ctx.world_size**2
        local = torch.stack([scale.new_zeros(()), self.engine.grad_square(), sparse])
        totals = torch.cat([local, torch.stack(sums).float().sum(0)]).double()
        totals[0] = shared[0] / self.ctx.world_size
        return totals, names, counted

    def _check_finite(self, totals: Tensor, sample_ids: Sequence[int] | None) -> None:
        """Sum `totals` over ranks in place, and stop every rank if something is not finite."""
        mine = totals[2:].isfinite().all()  # the dense gradient is everybody's by now
        self.ctx.all_reduce_sum(totals)
        samples = "unknown" if sample_ids is None else _name_samples(sample_ids)
        where = f"step {self.step + 1}, rank {self.ctx.rank} (samples {samples})"
        mend = "nothing was updated; lower training.optimizer.lr, or inspect these samples"
        if not self.may_skip:
            mend += ", or leave such steps out by failures.non_finite.action=skip"
        sentence = f"{where}: the loss or its gradient is not finite; {mend}"
        _require(mine, sentence, mine=True, wait=self.may_skip)
        theirs = totals.isfinite().all()
        sentence = f"{where}: what is not finite came from another rank; {mend}"
        _require(theirs, sentence, mine=False, wait=self.may_skip)

    def skip_step(self) -> None:
        """Leave out the step whose `train_step` raised NonFiniteLossError. Collective."""
        self.engine.drop_grads()
        load = self.model.expert_load()
        if load is not None:  # counted in the forward; no checkpoint has it
            self.model.update_balance(torch.zeros_like(load))
        self.step += 1

    def _update_tables(self, rows: Rows, leaves: Rows, square: Tensor) -> None:
        """The one fused update of a step."""
        if not rows:
            return
        grads = [leaf.grad for leaf in leaves.values()]
        if self._sparse_clip is not None:
            factor = _clip_factor(square, self._sparse_clip)
            grads = [grad * factor for grad in grads if grad is not None]
        torch.autograd.backward([rows[name] for name in leaves], grads)

    def _balance_experts(self) -> None:
        """Every rank moves its experts' biases by what all of them were loaded with."""
        load = self.model.expert_load()
        if load is not None:
            self.model.update_balance(self.ctx.all_reduce_sum(load))

    def lookup(self, ids: Mapping[str, Tensor]) -> Rows:
        """Rows [n, D] of any tables, sharded or replicated, without gradient. Collective.

        Every rank names the same tables; n may differ and be 0.
        """
        distinct, index, rows = self._rows_of(ids)
        rows = self._forward(DenseHalf.own_rows, distinct, rows)
        return {name: F.embedding(index[name], rows[name]) for name in ids}

    def query(self, batch: JaggedBatch) -> Tensor:
        """Queries [T, D] float32 of the model in evaluation mode. Collective."""

        def use(model: TableModel, embeddings: dict[str, Tensor]) -> Tensor:
            assert isinstance(model, SequenceModel), "a model that writes codes has no queries"
            queries: Tensor = model(batch, embeddings, 0)
            return queries.float()

        batch = batch.to(self.ctx.device)
        queries: Tensor = self.infer(batch, use)
        return queries

    def infer(self, batch: JaggedBatch, use: Callable[[TableModel, dict[str, Tensor]], Any]) -> Any:
        """`use(model, embeddings)` in evaluation mode, without gradient. Collective.

        `embeddings` are those that the model's forward wants for `batch`, which lies on the
        device.
        """
        ids = self.model.input_ids(batch)
        distinct, index, rows = self._rows_of(ids)
        return self._forward(DenseHalf.infer, distinct, rows, index, use)

    def item_keys(self, ids: Tensor) -> Tensor:
        """Keys [n, D] float32 of items [n]. Collective."""
        distinct, index, rows = self._rows_of({"item": ids})
        return F.embedding(index["item"], self._forward(DenseHalf.item_keys, distinct, rows))

    def _rows_of(self, ids: Mapping[str, Tensor]) -> tuple[Rows, Rows, Rows]:
        """Distinct ids of every table, positions of `ids` in them, and the sharded tables' rows."""
        required: Index = {name: {"ids": v.to(self.ctx.device)} for name, v in ids.items()}
        distinct, [index] = self._distinct([required])
        with torch.no_grad():
            rows = self._sharded_rows(distinct)
        return distinct, {name: features["ids"] for name, features in index.items()}, rows

    @torch.no_grad()
    def _forward(
        self, use: Callable[..., Any], distinct: Mapping[str, Tensor], rows: Rows, *args: Any
    ) -> Any:
        """`use` of the dense half in evaluation mode."""
        self.engine.train(False)
        return self.engine(use, distinct, rows, *args)


def _nothing() -> None:
    """What goes before a change where no save copies."""


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
    """Shard the tables, wrap the dense half, and join them. Collective.

    Args:
        loss_module: the objective with its model; weights of rank 0 are what training starts from.
        specs: tables that the model describes.
        recipe: placements, ZeRO stage, precision, and the seed of the tables' first values.
        ctx: this rank.
        total_steps: optimizer steps of the whole run, for the schedule.
        optimizer: AdamW of the dense half, and the schedule of both.
        sparse_lr: peak learning rate of the sharded tables.

    Raises:
        ValueError: the tables do not fit, or are too large to replicate; alike on every rank.
    """
    plan = agree_on_plan(specs, recipe.sharding, ctx)
    tables = ShardedTables(plan, recipe.sharding.optimizer, ctx, recipe.seed)
    autocast = recipe.training.precision == "bf16"
    dense = DenseHalf(loss_module, plan.replicated, autocast, recipe.seed)
    engine = DenseEngine(dense, optimizer, recipe.training, ctx)
    return ParallelModel(
        dense,
        tables,
        engine,
        ctx,
        schedule=lambda step: learning_rate_factor(optimizer.schedule, step, total_steps),
        peaks=(sparse_lr, optimizer.lr),
        clips=(plan.optimizer.clip_norm, optimizer.clip_norm),
    )


def learning_rate_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at update `step` (0 is the first)."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    match schedule.kind:
        case "constant":
            return 1.0
        case "cosine":
            progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
            return schedule.final_ratio + (1.0 - schedule.final_ratio) * share


def _require(finite: Tensor, sentence: str, *, mine: bool, wait: bool) -> None:
    """Stop unless `finite`; CUDA asserts on the device, which the host need not wait for."""
    if finite.device.type != "cpu" and not wait:
        torch._assert_async(finite, sentence)
    elif not finite:
        raise NonFiniteLossError(sentence, mine)


def _row_gradient(leaf: Tensor, ids: Tensor) -> Tensor:
    """Squared norm of a table's gradient, made zero where there is none and for id 0."""
    if leaf.grad is None:
        leaf.grad = torch.zeros_like(leaf)
    first = leaf.grad[:1]  # ids are sorted
    first.masked_fill_((ids[:1] == 0).unsqueeze(1), 0.0)
    return leaf.grad.square().sum()


def _clip_factor(square: Tensor, limit: float) -> Tensor:
    """What a gradient of squared norm `square` is multiplied with."""
    return (limit / (square.sqrt() + 1e-6)).clamp(max=1.0).float()


def _check_halves(dense: DenseHalf, tables: ShardedTables, engine: DenseEngine) -> None:
    """The halves own every table and parameter between them, and nothing twice."""
    sharded, replicated = set(tables.names), set(dense.tables)
    planned = {table.spec.name for table in tables.plan.tables}
    assert not sharded & replicated, "a table lives in both halves"
    assert sharded | replicated == planned, "a table lives in neither half"
    memory = {tensor.untyped_storage().data_ptr() for tensor in tables.local_tensors()}
    for name, parameter in dense.named_parameters():
        assert parameter.untyped_storage().data_ptr() not in memory, f"{name} is a sharded table"
    assert {name for name, _ in dense.named_parameters()} == set(engine.names)


def _name_samples(sample_ids: Sequence[int]) -> str:
    shown = ", ".join(str(int(sample)) for sample in sample_ids[:NAMED_SAMPLES])
    return shown + (", …" if len(sample_ids) > NAMED_SAMPLES else "") if shown else "none"
