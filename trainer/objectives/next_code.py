"""Next-code prediction: cross entropy of an item's semantic id, level by level.

Formulas: algorithms reference §4 (teacher forcing) and §5 (log-probabilities over legal codes).

Shape legend: B sequences, T tokens, N requests, S items of a request (1, or those of a session), L
levels, K_l codes of level l, M most children of a trie state, U unique rows of a step.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.objectives import NextCodeConfig
from models.base import CodeDecoder
from models.batch import JaggedBatch
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.log_probs import child_log_probs
from sharding.loss_module import LossOutput
from trainer.objectives.next_item import model_ids, model_rows


@dataclass(frozen=True)
class NextCodeInputs:
    """A micro batch of N requests: one per token, or one per window."""

    batch: JaggedBatch
    """Histories with their codes."""
    target_ids: Tensor
    """[N, S] int64, the items to write; 0 = none here."""
    target_codes: Tensor
    """[N, S, L] int64, their semantic ids; anything where target_ids is 0."""
    step_seed: int
    """Seeds dropout."""

    def to(self, device: torch.device | str) -> "NextCodeInputs":
        """Copy on `device`."""
        return replace(
            self,
            batch=self.batch.to(device),
            target_ids=self.target_ids.to(device, non_blocking=True),
            target_codes=self.target_codes.to(device, non_blocking=True),
        )


class NextCodeLoss(nn.Module):
    """Sum over requests of the mean over levels of the cross entropy of the next code."""

    def __init__(
        self, model: CodeDecoder, objective: NextCodeConfig, trie: CatalogueTrie | None = None
    ) -> None:
        """`trie` of the catalogue, on the model's device; needed by normalization="catalogue"."""
        super().__init__()
        assert trie is not None or objective.normalization == "codebook", "the trie is missing"
        self.model = model
        self.objective = objective
        self._trie = trie

    def required_ids(self, inputs: NextCodeInputs) -> dict[str, dict[str, Tensor]]:
        """Ids of the model's inputs; codes are no ids of a table."""
        return model_ids(self.model, inputs.batch)

    def weight(self, inputs: NextCodeInputs) -> Tensor:
        """Items to write."""
        return (inputs.target_ids > 0).sum().float()

    def forward(
        self,
        inputs: NextCodeInputs,
        rows: dict[str, Tensor],
        index: dict[str, dict[str, Tensor]],
    ) -> LossOutput:
        """Loss of a micro batch; metric `code_accuracy_l`: share of right codes of level l."""
        embeddings = model_rows(self.model, rows, index)
        every = self.model.supervision == "every_position"
        context = self.model.encode(
            inputs.batch, embeddings, inputs.step_seed, "every" if every else "last"
        )
        logits = self.model.teacher_forced(context, inputs.target_codes.flatten(1))
        wanted = inputs.target_ids > 0
        levels = inputs.target_codes.shape[2]
        loss_sum, right = logits[0].new_zeros(()), torch.zeros(levels, device=wanted.device)
        for item in range(wanted.shape[1]):
            scores = logits[item * levels : (item + 1) * levels]
            codes, here = inputs.target_codes[:, item], wanted[:, item]
            losses = code_losses(scores, codes, self.objective, self._trie)
            loss_sum = loss_sum + torch.where(here.unsqueeze(1), losses, 0.0).sum() / levels
            right += _right_codes(scores, codes, here)
        names = [f"code_accuracy_{level + 1}" for level in range(levels)]
        return LossOutput(loss_sum, dict(zip(names, right.unbind(), strict=True)))

    def flops_per_token(self, mean_length: float) -> float:
        """Forward FLOPs per history token."""
        return self.model.flops_per_token(mean_length)


@torch.no_grad()
def _right_codes(logits: list[Tensor], codes: Tensor, wanted: Tensor) -> Tensor:
    """[L] float32, how often the likeliest code of a level is the right one of `codes` [N, L]."""
    hits = [(scores.argmax(-1) == codes[:, at]) & wanted for at, scores in enumerate(logits)]
    return torch.stack(hits).sum(1).float()


def code_losses(
    logits: list[Tensor], codes: Tensor, objective: NextCodeConfig, trie: CatalogueTrie | None
) -> Tensor:
    """Cross entropy of each code: [N, L] float32.

    Args:
        logits: L tensors [N, K_l] float32.
        codes: [N, L] int64 right codes. Where the trie is used, an id that no item has costs
            infinitely much from the first code that leaves the trie.
        objective: who competes, and label smoothing.
        trie: the catalogue, for normalization="catalogue".
    """
    if objective.normalization == "codebook":
        smoothing = objective.label_smoothing
        losses = [
            F.cross_entropy(scores, codes[:, level], reduction="none", label_smoothing=smoothing)
            for level, scores in enumerate(logits)
        ]
        return torch.stack(losses, dim=1)
    assert trie is not None, "the catalogue's trie is missing"
    states = codes.new_zeros(codes.shape[0])
    losses = []
    for level, scores in enumerate(logits):
        tokens, following, legal = trie.children(level, states)
        log_probs = child_log_probs(scores, tokens, legal)
        states = trie.child(level, states, codes[:, level])
        place = (states - following[:, 0]).clamp(min=0)  # children are consecutive
        each = _smoothed(log_probs, place, legal, objective.label_smoothing)
        losses.append(each.masked_fill(states < 0, torch.inf))
    return torch.stack(losses, dim=1)


def _smoothed(log_probs: Tensor, place: Tensor, legal: Tensor, smoothing: float) -> Tensor:
    """Cross entropy [N] of the child at `place` [N] among the legal ones, [N, M]."""
    finite = log_probs.masked_fill(~legal, 0.0)
    right = -finite.gather(1, place.unsqueeze(1)).squeeze(1)
    spread = -finite.sum(-1) / legal.sum(-1).clamp(min=1)
    return (1.0 - smoothing) * right + smoothing * spread
