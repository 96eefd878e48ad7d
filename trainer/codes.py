"""From batches of user sequences to requests of a model that writes semantic ids.

Shape legend: B sequences, T tokens, N requests, S items of a request, L levels.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from configs.objectives import NextCodeConfig
from models.base import CodeDecoder
from models.batch import JaggedBatch
from models.ops.windows import sliding_sessions, sliding_windows
from trainer.objectives.negatives import seed_of_step
from trainer.objectives.next_code import NextCodeInputs
from trainer.policy import Worker


class NextCodeInputsMaker:
    """Turns a step's batches into loss inputs: windows, and the codes of every item in them."""

    def __init__(self, worker: Worker, model: CodeDecoder) -> None:
        objective, codes = worker.recipe.objective, worker.semantic_ids
        assert isinstance(objective, NextCodeConfig) and codes is not None
        self._codes = codes.codes
        self._model = model
        self._session_items = len(model.codebook_sizes) // len(codes.codebook_sizes)
        self._per_sequence = objective.windows_per_user
        self._seed = worker.recipe.seed
        self._device = worker.ctx.device

    def __call__(self, batches: Sequence[JaggedBatch], step: int) -> list[NextCodeInputs]:
        """Inputs of each micro batch of this rank."""
        return [self._inputs(batch, step).to(self._device) for batch in batches]

    def _inputs(self, batch: JaggedBatch, step: int) -> NextCodeInputs:
        targets = batch.target_ids.unsqueeze(1)
        if self._model.supervision == "last_position":
            batch, targets = sliding_sessions(
                batch,
                self._model.longest_history,
                self._session_items,
                per_sequence=self._per_sequence,
                seed=self._seed,
                step=step,
            )
        return NextCodeInputs(
            batch=with_codes(batch, self._codes),
            target_ids=targets,
            target_codes=self._codes[targets].long(),
            step_seed=seed_of_step(self._seed, step),
        )


def with_codes(batch: JaggedBatch, codes: Tensor) -> JaggedBatch:
    """The batch with its items' semantic ids from `codes` [V+1, L], which lie beside it."""
    return replace(batch, item_codes=codes[batch.item_ids].long())


def last_requests(model: CodeDecoder, batch: JaggedBatch) -> JaggedBatch:
    """The batch cut to what the model reads for one request after each sequence's last token.

    Last tokens keep their targets. No sequence may be empty. On the CPU or the device, without host
    synchronisation.
    """
    if model.supervision == "every_position":
        return batch
    last = torch.zeros_like(batch.target_ids)
    last[batch.offsets[1:] - 1] = 1
    windows, _ = sliding_windows(
        replace(batch, target_ids=last), model.longest_history, per_sequence=None, seed=0, step=0
    )
    targets = torch.zeros_like(windows.target_ids)
    targets[windows.offsets[1:] - 1] = batch.target_ids[batch.offsets[1:] - 1]
    return replace(windows, sample_ids=batch.sample_ids, target_ids=targets)
