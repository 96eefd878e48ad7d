"""GBPO on logged impressions: what the user took next, and whether that was liked.

Another system made the impressions, whose probabilities nobody knows: π_old is sg π.

Shape legend: N prompts, L parts of log π.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from configs.alignment import GBPOConfig
from configs.policy_gradient import Ratio
from sharding.loss_module import LossOutput
from trainer.objectives import policy_gradient as pg
from trainer.objectives.scoring import Candidates, Ids, Scorer, Supervised


def impression_losses(log_probs: Tensor, advantages: Tensor, ratio: Ratio) -> Tensor:
    """Loss [N] of the logged item's log π [N, 1, L]; 0 where its advantage [N] is."""
    told = advantages != 0
    mask = told[:, None, None].expand_as(log_probs)
    new = pg.at_level(log_probs, mask, ratio)
    return -pg.gbpo_terms(new, None, advantages[:, None]).objective.mean((1, 2))


@dataclass(frozen=True)
class LoggedInputs:
    """The impressions of a micro batch of N prompts."""

    candidates: Candidates
    """[N, 1]: what the user took next."""
    advantages: Tensor
    """[N] float32: 1 liked, -1 disliked, 0 neither."""
    supervised: Supervised | None
    """For the supervised loss on the prompts; None without it."""
    measures: dict[str, Tensor] = field(default_factory=dict)
    """Name → [N] float32, to be averaged and logged."""

    def to(self, device: torch.device | str) -> "LoggedInputs":
        """Copy on `device`."""
        return replace(
            self,
            candidates=self.candidates.to(device),
            advantages=self.advantages.to(device, non_blocking=True),
            supervised=None if self.supervised is None else self.supervised.to(device),
            measures={name: values.to(device) for name, values in self.measures.items()},
        )


class LoggedLoss(nn.Module):
    """Mean over prompts of GBPO's loss, those without an outcome included, and a supervised term.

    Dropout stays off also in training mode, as in the other losses of alignment.
    """

    def __init__(self, scorer: Scorer, config: GBPOConfig) -> None:
        """`scorer` gives complete log-probabilities; `config` has `logged`."""
        super().__init__()
        assert scorer.normalised, "GBPO's bound needs π itself"
        assert config.logged is not None, "see a recipe's checks"
        self.model = scorer.model
        self.config = config
        self._weight = config.logged.weight
        self._scorer = scorer

    def train(self, mode: bool = True) -> "LoggedLoss":
        """Switch the mode; the model's dropout stays off."""
        super().train(mode)
        self.model.eval()
        return self

    def required_ids(self, inputs: LoggedInputs) -> Ids:
        """Ids of the prompts, of what was taken and of the supervised term."""
        return self._scorer.required_ids(inputs.candidates, inputs.supervised)

    def weight(self, inputs: LoggedInputs) -> Tensor:
        """Number of prompts."""
        return torch.ones_like(inputs.advantages).sum()

    def forward(self, inputs: LoggedInputs, rows: dict[str, Tensor], index: Ids) -> LossOutput:
        """Loss of a micro batch.

        Metrics, means over prompts: `logged_loss`, `liked` and `disliked` (shares of impressions),
        `supervised_loss`, and the inputs' measures.
        """
        scored = self._scorer(inputs.candidates, inputs.supervised, rows, index)
        losses = impression_losses(scored.log_probs, inputs.advantages, self.config.ratio)
        metrics = {
            "logged_loss": losses.detach().sum(),
            "liked": (inputs.advantages > 0).float().sum(),
            "disliked": (inputs.advantages < 0).float().sum(),
        }
        total = self._weight * losses.sum()
        if scored.supervised is not None:
            total = total + self.config.supervised_weight * scored.supervised.sum()
            metrics["supervised_loss"] = scored.supervised.detach().sum()
        metrics |= {name: values.sum() for name, values in inputs.measures.items()}
        return LossOutput(total, metrics)

    def flops_per_token(self, mean_length: float) -> float:
        """Forward FLOPs per token of a prompt; scoring its item is left out."""
        return self.model.flops_per_token(mean_length)
