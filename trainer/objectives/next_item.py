"""Next-item prediction: the loss module of pretraining and the supervised term of alignment.

Shape legend: B sequences, T tokens, R negatives, U unique rows of a step, V catalogue, D width.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.objectives import FullSoftmaxConfig, ItemObjective, SampledSoftmaxConfig
from models.base import SequenceModel, TableModel
from models.batch import JaggedBatch
from sharding.loss_module import LossOutput
from trainer.objectives.full_softmax import full_softmax
from trainer.objectives.sampled_softmax import sampled_softmax


@dataclass(frozen=True)
class NextItemInputs:
    """A micro batch with its negatives."""

    batch: JaggedBatch
    negative_ids: Tensor | None
    """int64 [R] shared by the batch, [B, R] by a sequence, or [T, R]; None for the full softmax."""
    negative_logq: Tensor | None
    """float32, log of the expected count of each negative, broadcast to `negative_ids`."""
    step_seed: int
    """Seeds dropout."""

    def to(self, device: torch.device | str) -> "NextItemInputs":
        """Copy on `device`."""
        ids, logq = self.negative_ids, self.negative_logq
        return replace(
            self,
            batch=self.batch.to(device),
            negative_ids=None if ids is None else ids.to(device, non_blocking=True),
            negative_logq=None if logq is None else logq.to(device, non_blocking=True),
        )


class NextItemLoss(nn.Module):
    """Sum over positions of the cross entropy of the next item."""

    def __init__(self, model: SequenceModel, objective: ItemObjective, num_items: int) -> None:
        """Raises ValueError where the full softmax would score more items than allowed."""
        super().__init__()
        check_catalogue(objective, num_items)
        self.model = model
        self.objective = objective
        self.num_items = num_items

    def required_ids(self, inputs: NextItemInputs) -> dict[str, dict[str, Tensor]]:
        """Ids of the model's inputs, and of positives and negatives or of the catalogue."""
        ids = model_ids(self.model, inputs.batch)
        ids["item"] |= scored_ids(self.objective, inputs, self.num_items)
        return ids

    def weight(self, inputs: NextItemInputs) -> Tensor:
        """Positions that predict something."""
        return (inputs.batch.target_ids > 0).sum().float()

    def forward(
        self,
        inputs: NextItemInputs,
        rows: dict[str, Tensor],
        index: dict[str, dict[str, Tensor]],
    ) -> LossOutput:
        """Loss of a micro batch; metric `target_probability` is what the target was given."""
        embeddings = model_rows(self.model, rows, index)
        queries = self.model(inputs.batch, embeddings, inputs.step_seed)
        keys = self.model.item_keys(rows["item"])
        losses = next_item_losses(self.objective, queries, keys, inputs, index["item"])
        with torch.no_grad():
            probability = ((-losses).exp() * (inputs.batch.target_ids > 0)).sum()
        return LossOutput(losses.sum(), {"target_probability": probability})

    def flops_per_token(self, mean_length: float) -> float:
        """Forward FLOPs per token of the model and of scoring its candidates."""
        match self.objective:
            case FullSoftmaxConfig():
                candidates = self.num_items
            case SampledSoftmaxConfig() as sampled:
                uniform = sampled.negatives != "in_batch"
                in_batch = sampled.negatives != "uniform"
                candidates = 1 + uniform * sampled.num_negatives
                candidates += in_batch * sampled.in_batch_negatives
        width = self.model.table_specs()[0].width
        return self.model.flops_per_token(mean_length) + 2 * width * candidates


def check_catalogue(objective: ItemObjective, num_items: int) -> None:
    """Raise ValueError where the full softmax would score more items than `max_catalogue`."""
    if isinstance(objective, FullSoftmaxConfig) and num_items > objective.max_catalogue:
        raise ValueError(
            f"objective.kind='full_softmax' would score {num_items:,} items at every position, "
            f"more than objective.max_catalogue={objective.max_catalogue:,}; use "
            "objective.kind=sampled_softmax or raise objective.max_catalogue"
        )


def model_ids(model: TableModel, batch: JaggedBatch) -> dict[str, dict[str, Tensor]]:
    """Ids of the model's own inputs, as the feature `history` of each table."""
    return {table: {"history": ids} for table, ids in model.input_ids(batch).items()}


def model_rows(
    model: TableModel, rows: dict[str, Tensor], index: dict[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The rows of `model_ids`, gathered for the model's forward."""
    names = [spec.name for spec in model.table_specs()]
    return {name: F.embedding(index[name]["history"], rows[name]) for name in names}


def scored_ids(
    objective: ItemObjective, inputs: NextItemInputs, num_items: int
) -> dict[str, Tensor]:
    """Item ids whose keys `next_item_losses` compares with the queries."""
    if isinstance(objective, FullSoftmaxConfig):
        device = inputs.batch.item_ids.device
        return {"catalogue": torch.arange(1, num_items + 1, device=device)}
    assert inputs.negative_ids is not None, "sampled softmax needs negatives"
    return {"positive": inputs.batch.target_ids, "negative": inputs.negative_ids}


def next_item_losses(
    objective: ItemObjective,
    queries: Tensor,
    keys: Tensor,
    inputs: NextItemInputs,
    index: dict[str, Tensor],
) -> Tensor:
    """Cross entropy of each position, [T] float32; 0 where nothing is predicted.

    Args:
        objective: the kind of softmax.
        queries: [T, D] of the batch's positions.
        keys: [U, D] of the step's item rows.
        inputs: targets and log-expectations.
        index: feature → positions into `keys`, of `scored_ids`.
    """
    batch = inputs.batch
    match objective:
        case FullSoftmaxConfig():
            catalogue = F.embedding(index["catalogue"], keys)
            return full_softmax(
                queries,
                catalogue,
                batch.target_ids - 1,
                objective.temperature,
                objective.chunk_tokens,
            )
        case SampledSoftmaxConfig():
            positives = torch.where(batch.target_ids > 0, index["positive"], -1)
            return sampled_softmax(
                queries,
                keys,
                batch.offsets,
                positives,
                index["negative"],
                objective.shared,
                objective.temperature,
                inputs.negative_logq,
            )
