"""What a training step tells of itself."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks. Reading a number waits for the device."""

    step: int
    """Steps done, this one included."""
    stop: bool
    """A rank was asked to end; known to all of them alike."""
    lr: float
    sparse_lr: float
    _names: tuple[str, ...]
    _counted: tuple[str, ...]
    """Of the metrics that have terms of their own."""
    _totals: Tensor
    """Weight, squared norms of the dense and of the rows' gradient, loss, then the metrics, then
    the terms of those that have their own."""

    @property
    def weight(self) -> float:
        """Valid terms of the global batch."""
        return float(self._totals[0])

    @property
    def sparse_grad_norm(self) -> float:
        """Norm of the looked-up rows' gradient before clipping, over all ranks."""
        return math.sqrt(float(self._totals[2]))

    @property
    def dense_grad_norm(self) -> float:
        """Norm of the dense half's gradient before clipping."""
        return math.sqrt(float(self._totals[1]))

    @property
    def loss(self) -> float:
        """Mean over valid terms; 0 without one."""
        return float(self._totals[3]) / max(self.weight, 1.0)

    @property
    def metrics(self) -> dict[str, float]:
        """Means over valid terms, or over a metric's own terms; without those it has none."""
        weight, _, _, _, *values = self._totals.tolist()
        terms = dict.fromkeys(self._names, weight)
        terms |= dict(zip(self._counted, values[len(self._names) :], strict=True))
        sums = zip(self._names, values, strict=False)
        return {name: total / terms[name] for name, total in sums if terms[name] > 0}

    @property
    def unmeasured(self) -> set[str]:
        """Names of metrics that this step has no term of."""
        return set(self._names) - self.metrics.keys()
