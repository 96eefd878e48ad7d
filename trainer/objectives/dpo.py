"""Direct preference optimisation over item preferences (arXiv 2305.18290), with a supervised term.

π(item | context) is the softmax of query · key / τ over the catalogue. Winner and loser share their
context, so that its normaliser cancels in log π(w) − log π(l).

Shape legend: B pairs, T tokens of their contexts, D width.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.alignment import DPOConfig
from configs.objectives import FullSoftmaxConfig, ItemObjective
from models.base import SequenceModel
from models.batch import PreferenceBatch
from models.ops.jagged import segment_ids
from sharding.loss_module import LossOutput
from trainer.objectives.full_softmax import log_partition
from trainer.objectives.next_item import (
    NextItemInputs,
    check_catalogue,
    model_ids,
    model_rows,
    next_item_losses,
    scored_ids,
)

TIE = 1e-4
"""Log ratios (nats) whose difference is no more than this are equal up to float32 rounding."""


def dpo_loss(log_ratio_difference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ) of each pair.

    Args:
        log_ratio_difference: [B] Δ = (log π(w) − log π_ref(w)) − (log π(l) − log π_ref(l)).
        beta: strength of the pull towards the reference.
        label_smoothing: ε, probability that a label is wrong.
    """
    reward_margin = beta * log_ratio_difference
    right, wrong = F.logsigmoid(reward_margin), F.logsigmoid(-reward_margin)
    return -(1.0 - label_smoothing) * right - label_smoothing * wrong


@torch.no_grad()
def pairs_won(log_ratio_difference: Tensor) -> Tensor:
    """float32 [B]: 1 where Δ is positive, 0 where it is negative, and 1/2 where rounding decides.

    A policy that has not moved is its own reference, whose accuracy is then one half.
    """
    won = (log_ratio_difference > TIE).float()
    return won + 0.5 * (log_ratio_difference.abs() <= TIE).float()


@dataclass(frozen=True)
class PreferenceInputs:
    """A micro batch of pairs."""

    pairs: PreferenceBatch
    supervised: NextItemInputs | None
    """Negatives for the next-item loss on the pairs' own contexts and winners; None without it."""

    def to(self, device: torch.device | str) -> "PreferenceInputs":
        """Copy on `device`."""
        supervised = None if self.supervised is None else self.supervised.to(device)
        return replace(self, pairs=self.pairs.to(device), supervised=supervised)


class PreferenceLoss(nn.Module):
    """Sum over pairs of DPO + λ · mean next-item loss over the pair's context and winner.

    Every pair counts once, however long its context is. Dropout stays off also in training mode,
    because the reference's log-probabilities were taken without it.
    """

    def __init__(
        self, model: SequenceModel, config: DPOConfig, objective: ItemObjective, num_items: int
    ) -> None:
        super().__init__()
        check_catalogue(objective, num_items)
        self.model = model
        self.config = config
        self.objective = objective
        self.num_items = num_items

    def train(self, mode: bool = True) -> "PreferenceLoss":
        """Switch the mode; the model's dropout stays off."""
        super().train(mode)
        self.model.eval()
        return self

    def required_ids(self, inputs: PreferenceInputs) -> dict[str, dict[str, Tensor]]:
        """Ids of the contexts, of winners and losers, and of the supervised term."""
        ids = model_ids(self.model, inputs.pairs.batch)
        pairs = {"chosen": inputs.pairs.chosen_ids, "rejected": inputs.pairs.rejected_ids}
        ids["item"] |= pairs
        if inputs.supervised is not None:
            ids["item"] |= scored_ids(self.objective, inputs.supervised, self.num_items)
        return ids

    def weight(self, inputs: PreferenceInputs) -> Tensor:
        """Number of pairs."""
        batch = inputs.pairs.batch
        return torch.tensor(float(batch.num_sequences), device=batch.item_ids.device)

    def forward(
        self,
        inputs: PreferenceInputs,
        rows: dict[str, Tensor],
        index: dict[str, dict[str, Tensor]],
    ) -> LossOutput:
        """Loss of a micro batch.

        Metrics: `accuracy` (share of pairs whose margin is positive; a tie is half), `margin`
        (β Δ), `dpo_loss`, `supervised_loss`; with a full softmax, whose normaliser is at hand,
        also `chosen_log_ratio` and `rejected_log_ratio` (log π − log π_ref).
        """
        pairs = inputs.pairs
        queries = self.model(pairs.batch, model_rows(self.model, rows, index), 0)
        keys = self.model.item_keys(rows["item"])
        last = queries.index_select(0, pairs.batch.offsets[1:] - 1)
        chosen, rejected = (
            (last * F.embedding(index["item"][name], keys)).sum(-1) / self.objective.temperature
            for name in ("chosen", "rejected")
        )
        reference = pairs.reference_chosen - pairs.reference_rejected
        difference = chosen - rejected - reference
        losses = dpo_loss(difference, self.config.beta, self.config.label_smoothing)
        metrics = {
            "accuracy": pairs_won(difference).sum(),
            "margin": self.config.beta * difference.detach().sum(),
            "dpo_loss": losses.detach().sum(),
        }
        total = losses.sum()
        if inputs.supervised is not None:
            term = self._supervised(queries, keys, inputs.supervised, index["item"])
            total = total + self.config.supervised_weight * term
            metrics["supervised_loss"] = term.detach()
            metrics |= self._log_ratios(last, keys, pairs, chosen, rejected, index["item"])
        return LossOutput(total, metrics)

    def flops_per_token(self, mean_length: float) -> float:
        """Forward FLOPs per context token; scoring two items per pair is left out."""
        return self.model.flops_per_token(mean_length)

    def _supervised(
        self, queries: Tensor, keys: Tensor, inputs: NextItemInputs, index: dict[str, Tensor]
    ) -> Tensor:
        """Sum over pairs of the mean next-item loss of the pair's positions."""
        batch = inputs.batch
        losses = next_item_losses(self.objective, queries, keys, inputs, index)
        groups = segment_ids(batch.offsets, batch.num_tokens)
        valid = (batch.target_ids > 0).float()
        counts = losses.new_zeros(batch.num_sequences).index_add(0, groups, valid)
        return (losses / counts.clamp(min=1.0)[groups]).sum()

    @torch.no_grad()
    def _log_ratios(
        self,
        last: Tensor,
        keys: Tensor,
        pairs: PreferenceBatch,
        chosen: Tensor,
        rejected: Tensor,
        index: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Sums over pairs of log π − log π_ref, where the catalogue's keys are at hand."""
        if not isinstance(self.objective, FullSoftmaxConfig):
            return {}
        catalogue = F.embedding(index["catalogue"], keys)
        config = self.objective
        log_z = log_partition(last, catalogue, config.temperature, config.chunk_tokens)
        return {
            "chosen_log_ratio": (chosen - log_z - pairs.reference_chosen).sum(),
            "rejected_log_ratio": (rejected - log_z - pairs.reference_rejected).sum(),
        }
