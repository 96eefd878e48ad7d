"""The dense half under DeepSpeed ZeRO 0-3 with AdamW."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from configs.training import OptimizerConfig, TrainingConfig
from sharding.dense_state import FlatGroup, flat_groups, publish_weights
from sharding.process_group import DistributedContext, hush_libraries

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

FullState = dict[str, dict[str, Tensor]]
"""Parameter name → {"weight", "exp_avg", "exp_avg_sq"}, fp32 and of the parameter's full shape."""

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # elements reduced or gathered at once, at most


class DenseEngine:
    """A module whose AdamW state, gradients and parameters DeepSpeed partitions over ranks.

    Weights, gradients and moments are float32; `bf16` precision is the forward's autocast.
    Clipping is the caller's: all stages alike, and after the gradient is known to be finite.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
        ctx: DistributedContext,
    ) -> None:
        self.stage = int(training.zero_stage)
        self.names = tuple(name for name, _ in module.named_parameters())
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        self._ctx = ctx
        module.to(ctx.device)
        self._adam = torch.optim.AdamW(
            module.parameters(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self._engine = self._initialize(module)
        self._mode: bool | None = None  # modules begin in training mode, but may mix modes inside
        self._groups = flat_groups(self._engine, self.stage)
        covered = {slot.name for group in self._groups for slot in group.slots}
        assert covered == set(self.names), "DeepSpeed partitions every parameter"

    def _initialize(self, module: nn.Module) -> "DeepSpeedEngine":
        """Wrap the module, keeping DeepSpeed from compiling anything and from talking."""
        # Imported here: it settles on an accelerator at import, which `current_context` chooses.
        import deepspeed
        import deepspeed.ops
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        hush_libraries()
        if self._ctx.device.type == "cpu":
            # Its CPU backend would build a shared-memory all-reduce (40 s of g++, and a stale lock
            # hangs it) that only inference uses; ranks talk gloo.
            deepspeed.ops.__compatible_ops__ = dict.fromkeys(ALL_OPS, False)
        import_without_compiling("deepspeed.runtime.zero.muon.muon_optimizer")
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=self._adam, config=self._config(), dist_init_required=False
        )
        return engine

    def _config(self) -> dict[str, Any]:
        bucket = min(self.num_parameters + -self.num_parameters % 8, BUCKET)
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": self._ctx.device.type == "cuda",
        }
        if self.stage in (1, 2):
            zero["compute_grad_norm"] = False  # `grad_square` does, and shares its all-reduce
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "steps_per_print": None,
            "wall_clock_breakdown": False,
            "timers": {"throughput": {"enabled": False, "synchronized": False}},
        }

    def __call__(self, *args: Any) -> Any:
        """Forward of the module. Collective under ZeRO 3."""
        return self._engine(*args)

    @property
    def module(self) -> nn.Module:
        """The wrapped module; under ZeRO 3 its parameters are partitioned."""
        module = self._engine.module
        assert isinstance(module, nn.Module)
        return module

    def train(self, mode: bool) -> None:
        """Training or evaluation mode of the module."""
        if self._mode != mode:
            self._engine.train(mode)
            self._mode = mode

    @contextmanager
    def accumulate(self, *, deferred: bool) -> Iterator[None]:
        """Surrounds the forward and backward passes of one step.

        Deferred, gradients stay local until the end and are reduced once, in the order of the
        parameters. ZeRO 2 and 3 otherwise reduce them as they appear, which asks that every rank's
        backward reaches every parameter in the same order: not so where a rank has no data.
        """
        if self.stage == 0 or not (deferred or self.stage == 1):
            yield
            return
        with self._engine.coalesce_grad_reduction():
            yield
            if self.stage < 3:
                for parameter in self.module.parameters():
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro batch's gradient; `last` marks the final one of the step. Collective."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def grad_square(self) -> Tensor:
        """This rank's part of the squared norm of the mean gradient; sum it over ranks."""
        square = nn.utils.get_total_norm(self._grads()).square()
        return square / self._ctx.world_size if self.stage == 0 else square

    def scale_grads(self, factor: Tensor) -> None:
        """Multiply the gradient by a scalar that is equal on all ranks."""
        for grad in self._grads():
            grad.mul_(factor)

    def _grads(self) -> list[Tensor]:
        """The mean gradient as the coming step uses it: whole (ZeRO 0), or this rank's part."""
        if self.stage == 0:
            return [p.grad for p in self.module.parameters() if p.grad is not None]
        return [
            grad for group in self._engine.optimizer.averaged_gradients.values() for grad in group
        ]

    def step(self, lr: float) -> None:
        """Update with the mean gradient over ranks. Collective."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._engine.step()

    def drop_grads(self) -> None:
        """Forget the gradient of a step that is left out, as DeepSpeed does on overflow."""
        if self.stage == 0:
            self._engine.zero_grad()
            return
        optimizer = self._engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        if self.stage == 3:
            optimizer.averaged_gradients = {}
            return
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None

    @property
    def adam_step(self) -> int:
        """Updates made so far, as AdamW's bias correction counts them."""
        state = self._adam.state.get(self._groups[0].master)
        return int(state["step"]) if state else 0

    @property
    def beta2(self) -> float:
        """Decay of AdamW's second moments."""
        return float(self._adam.param_groups[0]["betas"][1])

    def full_weights(self) -> dict[str, Tensor]:
        """Every parameter's fp32 weight, whole, on the CPU of every rank. Collective."""
        return {
            name: value.cpu() for group in self._groups for name, value in group.whole(group.master)
        }

    def full_state(self) -> FullState:
        """Every parameter's fp32 weight and Adam moments, whole, on the CPU of every rank.

        Moments are zeros before the first step. Collective.
        """
        full: FullState = {name: {"weight": value} for name, value in self.full_weights().items()}
        for group in self._groups:
            state = self._adam.state.get(group.master)
            for key in MOMENTS:
                local = state[key] if state else torch.zeros_like(group.master)
                for name, value in group.whole(local):
                    full[name][key] = value.cpu()
        return full

    def load_full_state(self, state: Mapping[str, Mapping[str, Tensor]], adam_step: int) -> None:
        """Restore what `full_state` gave, under any ZeRO stage and world size. Collective.

        Parameters without moments (weights only) start with zero moments; pass adam_step=0 then.

        Raises:
            ValueError: the state is of another model: a parameter is missing, or has another shape.
        """
        self._check(state)
        with torch.no_grad():
            for group in self._groups:
                weights = {slot.name: state[slot.name]["weight"] for slot in group.slots}
                group.master.view(-1).copy_(group.part(weights))
                self._load_moments(group, state, adam_step)
        publish_weights(self._engine, self.stage)

    def _load_moments(
        self, group: FlatGroup, state: Mapping[str, Mapping[str, Tensor]], adam_step: int
    ) -> None:
        if adam_step == 0:
            self._adam.state.pop(group.master, None)
            return
        moments = {
            key: group.part(
                {
                    slot.name: state[slot.name][key]
                    for slot in group.slots
                    if key in state[slot.name]
                }
            ).view_as(group.master)
            for key in MOMENTS
        }
        step = torch.tensor(float(adam_step), device=group.master.device)
        self._adam.state[group.master] = {"step": step, **moments}

    def _check(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        shapes = {slot.name: slot.shape for group in self._groups for slot in group.slots}
        missing, unknown = (
            sorted(shapes.keys() - state.keys()),
            sorted(state.keys() - shapes.keys()),
        )
        if missing or unknown:
            raise ValueError(
                f"the checkpoint is of another model: it lacks the parameters {missing} and has "
                f"{unknown}; load it with the recipe that wrote it"
            )
        for name, shape in shapes.items():
            found = state[name]["weight"].shape
            if found != shape:
                raise ValueError(
                    f"the checkpoint is of another model: parameter {name!r} is {tuple(found)} "
                    f"there and {tuple(shape)} here; load it with the recipe that wrote it"
                )


def import_without_compiling(module: str) -> None:
    """Import a module whose decorators call torch.compile, leaving its functions eager.

    DeepSpeed's ZeRO imports its Muon optimizer, which loads the whole compiler (2.5 s of every
    worker's start) for functions that AdamW never calls.
    """

    def leave(function: Any = None, **_: Any) -> Any:
        return function if function is not None else leave

    with mock.patch.object(torch, "compile", leave):
        importlib.import_module(module)
