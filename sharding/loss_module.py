"""What an objective is to the training step: ids wanted, rows given, a sum of losses returned.

Apart from parallelize.py so that objectives and their tests load neither TorchRec nor DeepSpeed.

Shape legend: U unique rows of a table in a step, D width.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from models.base import TableModel


class NonFiniteLossError(ValueError):
    """A step's loss or gradient is not finite: the same data would give the same again.

    All ranks raise it at the same step; `mine` tells those whose own samples are at fault.
    """

    def __init__(self, sentence: str, mine: bool = True) -> None:
        super().__init__(sentence, mine)
        self.mine = mine

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class LossOutput:
    """What a loss module returns for a micro batch."""

    loss_sum: Tensor
    """Scalar float32, sum over the micro batch's valid terms."""
    metrics: dict[str, Tensor]
    """Scalar float32 sums without gradient, to be divided by the global weight."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Scalar float32 numbers of terms, by the metrics that are divided by these instead; the same
    names in every micro batch. A metric without a term in the global batch is not measured."""


class ModelInputs(Protocol):
    """One micro batch of an objective."""

    def to(self, device: torch.device | str) -> "ModelInputs":
        """Copy on `device`."""


class LossModule(Protocol):
    """An nn.Module that turns looked-up embeddings into a loss."""

    @property
    def model(self) -> TableModel:
        """The model that the objective trains."""

    def required_ids(self, inputs: Any) -> dict[str, dict[str, Tensor]]:
        """Table → feature → int64 ids of any shape whose rows `forward` wants; ids may repeat."""

    def weight(self, inputs: Any) -> Tensor:
        """Scalar float32 count of valid terms, known before the forward."""

    def forward(
        self, inputs: Any, rows: dict[str, Tensor], index: dict[str, dict[str, Tensor]]
    ) -> LossOutput:
        """Loss of a micro batch.

        Args:
            inputs: what `required_ids` saw.
            rows: table → unique rows [U, D] float32 of the whole step; the row of id 0 is zero.
            index: table → feature → positions into `rows`, shaped as in `required_ids`.
        """
