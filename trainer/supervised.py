"""Targets of the supervised loss that runs beside alignment."""

from collections.abc import Sequence

from models.base import CodeDecoder, TableModel
from trainer.objectives.scoring import Candidates, Supervised
from trainer.policy import Worker
from trainer.pretrain import NextItemInputsMaker
from trainer.scoring import next_code_targets


class SupervisedTargets:
    """Makes what a scorer's supervised loss wants, for either family of models."""

    def __init__(self, worker: Worker, model: TableModel, weight: float) -> None:
        """With a `weight` of 0 there is no such loss."""
        self._worker = worker
        self._model = model
        self._weight = weight
        self._next_item: NextItemInputsMaker | None = None
        if weight > 0 and not isinstance(model, CodeDecoder):
            self._next_item = NextItemInputsMaker(worker)

    def __call__(self, micro: Sequence[Candidates], step: int) -> Sequence[Supervised | None]:
        """Targets of each micro batch's contexts. Collective if positives are shared."""
        if self._weight == 0:
            return [None] * len(micro)
        if self._next_item is not None:
            return self._next_item([each.batch for each in micro], step)
        assert isinstance(self._model, CodeDecoder)
        return [next_code_targets(self._worker, self._model, each.batch) for each in micro]
