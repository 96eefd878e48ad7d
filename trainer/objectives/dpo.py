"""Preference optimisation on logged pairs: DPO, IPO and S-DPO, with a supervised term.

With ρ = log π(y | x) − log π_ref(y | x): DPO (arXiv 2305.18290) −log σ(β(ρ_w − ρ_l)); IPO (arXiv
2310.12036) (ρ_w − ρ_l − 1/(2β))²; S-DPO (arXiv 2406.09215) log(1 + Σ_l exp β(ρ_l − ρ_w)). Winner
and losers share their context, so that the normaliser of a catalogue softmax cancels.

Shape legend: B pairs, K losers of a pair, T tokens of their contexts.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.alignment import (
    DPOConfig,
    GeneratedAlignment,
    GeneratedPairsBase,
    IPOConfig,
    IterativePreferenceConfig,
    OfflineAlignment,
    SelfPlayConfig,
    SoftmaxDPOConfig,
)
from sharding.loss_module import LossOutput
from trainer.objectives.scoring import Candidates, Ids, Scorer, Supervised

TIE = 1e-4
"""Log ratios (nats) whose difference is no more than this are equal up to float32 rounding."""


def dpo_loss(log_ratio_difference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ), elementwise.

    Args:
        log_ratio_difference: Δ = ρ_w − ρ_l.
        beta: strength of the pull towards the reference.
        label_smoothing: ε, probability that a label is wrong.
    """
    reward_margin = beta * log_ratio_difference
    right, wrong = F.logsigmoid(reward_margin), F.logsigmoid(-reward_margin)
    return -(1.0 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(log_ratio_difference: Tensor, beta: float) -> Tensor:
    """(Δ − 1/(2β))², elementwise."""
    return (log_ratio_difference - 0.5 / beta).square()


def softmax_dpo_loss(log_ratio_differences: Tensor, there: Tensor, beta: float) -> Tensor:
    """log(1 + Σ_l exp(−βΔ_l)) of each list: [B].

    Args:
        log_ratio_differences: [B, K], Δ_l = ρ_w − ρ_l.
        there: [B, K] bool, which losers exist; a list without any has loss 0.
        beta: as in `dpo_loss`.
    """
    against = (-beta * log_ratio_differences).masked_fill(~there, torch.finfo(torch.float32).min)
    own = against.new_zeros(against.shape[0], 1)
    return torch.cat([own, against], dim=1).logsumexp(dim=1)


@torch.no_grad()
def pairs_won(log_ratio_difference: Tensor) -> Tensor:
    """float32: 1 where Δ is positive, 0 where it is negative, and 1/2 where rounding decides.

    A policy that has not moved is its own reference, whose accuracy is then one half.
    """
    won = (log_ratio_difference > TIE).float()
    return won + 0.5 * (log_ratio_difference.abs() <= TIE).float()


@dataclass(frozen=True)
class PreferenceInputs:
    """A micro batch of B pairs."""

    candidates: Candidates
    """[B, 1 + K]: the winner, then its losers; 0 behind the last one."""
    reference: Tensor
    """[B, 1 + K] float32, log π_ref of the candidates; anything where there is none."""
    supervised: Supervised | None
    """For the supervised loss on the pairs' own contexts and winners; None without it."""
    measures: dict[str, Tensor] = field(default_factory=dict)
    """Name → [B] float32, to be averaged and logged."""
    log_probs: Tensor | None = None
    """[B, 1 + K] float32, complete log π of the candidates, to be logged where the scorer leaves
    log Z out; None where that was not computed."""
    per_pair: Tensor | None = None
    """Scalar float32: entries of the global batch for each of them that has a loser, 0 where none
    has one; None where all have."""

    def to(self, device: torch.device | str) -> "PreferenceInputs":
        """Copy on `device`."""
        return replace(
            self,
            candidates=self.candidates.to(device),
            reference=self.reference.to(device, non_blocking=True),
            supervised=None if self.supervised is None else self.supervised.to(device),
            measures={name: values.to(device) for name, values in self.measures.items()},
            log_probs=None if self.log_probs is None else self.log_probs.to(device),
            per_pair=None if self.per_pair is None else self.per_pair.to(device),
        )


class PreferenceLoss(nn.Module):
    """Sum over pairs of the preference loss + λ · mean supervised loss over context and winner.

    Every pair counts once, however long its context is. What has no loser is no pair: the mean of
    the preference loss is over pairs, that of the supervised one over all contexts. Dropout stays
    off also in training mode, because the reference's log-probabilities were taken without it.
    """

    def __init__(self, scorer: Scorer, config: OfflineAlignment | GeneratedAlignment) -> None:
        super().__init__()
        self.model = scorer.model
        self.config = config
        self._scorer = scorer
        self._weight = 1.0
        if isinstance(config, GeneratedPairsBase):
            self._weight = config.preference_weight

    def train(self, mode: bool = True) -> "PreferenceLoss":
        """Switch the mode; the model's dropout stays off."""
        super().train(mode)
        self.model.eval()
        return self

    def required_ids(self, inputs: PreferenceInputs) -> Ids:
        """Ids of the contexts, of winners and losers, and of the supervised term."""
        return self._scorer.required_ids(inputs.candidates, inputs.supervised)

    def weight(self, inputs: PreferenceInputs) -> Tensor:
        """Number of pairs, and of contexts without one."""
        items = inputs.candidates.items
        return torch.tensor(float(items.shape[0]), device=items.device)

    def forward(self, inputs: PreferenceInputs, rows: dict[str, Tensor], index: Ids) -> LossOutput:
        """Loss of a micro batch.

        Metrics, means over pairs, not measured without one: `accuracy` (share of losers below
        their winner; a tie is half), `margin` (β Δ, mean over a winner's losers),
        `preference_loss`; where log π is complete also `rewards/chosen` and `rewards/rejected`
        (β ρ_w, and β ρ_l's mean over losers). Over contexts: `supervised_loss`, and the inputs' own
        measures.
        """
        scored = self._scorer(inputs.candidates, inputs.supervised, rows, index)
        there = inputs.candidates.items > 0
        log_probs = scored.log_probs.sum(-1)
        ratios = (log_probs - inputs.reference).where(there, 0.0)
        differences, losers = ratios[:, :1] - ratios[:, 1:], there[:, 1:]
        losses = self._losses(differences, losers)
        margins = self.config.beta * differences.detach()
        metrics = {
            "preference_loss": losses.detach().sum(),
            "accuracy": _mean(pairs_won(differences), losers).sum(),
            "margin": _mean(margins, losers).sum(),
        }
        complete = log_probs.detach() if self._scorer.normalised else inputs.log_probs
        if complete is not None:
            rewards = self.config.beta * (complete - inputs.reference).where(there, 0.0)
            metrics["rewards/chosen"] = (rewards[:, 0] * losers.any(1)).sum()
            metrics["rewards/rejected"] = _mean(rewards[:, 1:], losers).sum()
        terms = dict.fromkeys(metrics, losers.any(1).float().sum())
        metrics |= {name: values.sum() for name, values in inputs.measures.items()}
        total = self._weight * losses.sum()
        if inputs.per_pair is not None:
            total = total * inputs.per_pair
        if scored.supervised is not None:
            total = total + self.config.supervised_weight * scored.supervised.sum()
            metrics["supervised_loss"] = scored.supervised.detach().sum()
        return LossOutput(total, metrics, terms)

    def flops_per_token(self, mean_length: float) -> float:
        """Forward FLOPs per context token; scoring a pair's items is left out."""
        return self.model.flops_per_token(mean_length)

    def _losses(self, differences: Tensor, losers: Tensor) -> Tensor:
        """Preference loss of each pair [B], from Δ [B, K]."""
        match self.config:
            case SoftmaxDPOConfig(beta=beta):
                return softmax_dpo_loss(differences, losers, beta)
            case IPOConfig(beta=beta):
                return _mean(ipo_loss(differences, beta), losers)
            case SelfPlayConfig(beta=beta, losers=several) if several > 1:
                return softmax_dpo_loss(differences, losers, beta)
            case (
                DPOConfig(beta=beta, label_smoothing=smoothing)
                | IterativePreferenceConfig(beta=beta, label_smoothing=smoothing)
                | SelfPlayConfig(beta=beta, label_smoothing=smoothing)
            ):
                return _mean(dpo_loss(differences, beta, smoothing), losers)


def _mean(values: Tensor, there: Tensor) -> Tensor:
    """Mean over those of values [B, K] that are there: [B]."""
    return (values * there).sum(1) / there.sum(1).clamp(min=1)
