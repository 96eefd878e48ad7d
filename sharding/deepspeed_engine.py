"""The dense half under DeepSpeed ZeRO 0-3."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from configs.training import OptimizerConfig, TrainingConfig
from sharding.process_group import DistributedContext

FullState = dict[str, dict[str, Tensor]]
"""Parameter name → {"weight", "exp_avg", "exp_avg_sq"}, fp32 and of the parameter's full shape."""


class DenseEngine:
    """A module whose parameters, gradients and AdamW state DeepSpeed partitions over ranks."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
        ctx: DistributedContext,
    ) -> None:
        raise NotImplementedError

    @property
    def adam_step(self) -> int:
        """Updates made so far, as AdamW's bias correction counts them."""
        raise NotImplementedError

    def full_state(self) -> FullState:
        """Every parameter's fp32 weight and Adam moments, whole, on every rank. Collective.

        Copies on the CPU; moments are zeros before the first step.
        """
        raise NotImplementedError

    def load_full_state(
        self, state: Mapping[str, Mapping[str, Tensor]], adam_step: int
    ) -> None:
        """Restore what `full_state` gave, under any ZeRO stage and world size. Collective.

        A parameter without moments (weights only) starts with zero moments; pass adam_step=0 then.
        """
        raise NotImplementedError

    def full_weights(self) -> dict[str, Tensor]:
        """Every parameter's fp32 weight, whole, on every rank. Collective."""
        raise NotImplementedError


__all__ = ["DenseEngine", "FullState", "Sequence"]
