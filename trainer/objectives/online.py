"""The loss of online alignment: a policy gradient over generated groups, beside other terms.

Shape legend: N prompts, G generated candidates of a prompt, C = G, or G + 1 with the logged item,
L parts of a candidate's log π.
"""

from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor, nn

from configs.alignment import ECPOConfig, GBPOConfig, GRPOConfig, OnlineAlignment
from sharding.loss_module import LossOutput
from trainer.objectives import policy_gradient as pg
from trainer.objectives.logged import impression_losses
from trainer.objectives.scoring import Candidates, Ids, Scorer, Supervised


@dataclass(frozen=True)
class OnlineInputs:
    """The groups of a micro batch of N prompts."""

    candidates: Candidates
    """[N, C]: the group, then the logged item where impressions are learnt from."""
    mask: Tensor
    """[N, G, L] bool, parts of candidates that there are."""
    old: Tensor
    """[N, G, L] float32, log π when the group was generated."""
    reference: Tensor | None
    """[N, G, L] float32, log π_ref; None where none is held."""
    advantages: Tensor
    """[N, G] float32."""
    logged_advantages: Tensor | None
    """[N] float32, of the logged item; None where impressions are not learnt from."""
    measures: dict[str, Tensor]
    """Name → [N, G] float32, to be averaged and logged."""
    supervised: Supervised | None
    """For the supervised loss on the prompts; None without it."""
    weights: Tensor | None = None
    """[N, G] float32 of mean 1, what candidates count in an expectation under the policy that
    generated them; None where all count alike."""

    def to(self, device: torch.device | str) -> "OnlineInputs":
        """Copy on `device`."""

        def moved(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device, non_blocking=True)

        return replace(
            self,
            candidates=self.candidates.to(device),
            mask=self.mask.to(device),
            old=self.old.to(device),
            reference=moved(self.reference),
            advantages=self.advantages.to(device),
            logged_advantages=moved(self.logged_advantages),
            measures={name: values.to(device) for name, values in self.measures.items()},
            supervised=None if self.supervised is None else self.supervised.to(device),
            weights=moved(self.weights),
        )


class OnlineLoss(nn.Module):
    """Mean over candidates, as `reduction` weighs them, of what the algorithm minimises.

    A prompt's supervised loss and its logged item weigh what its group does. Dropout stays off also
    in training mode: rollouts and the reference are without it.
    """

    def __init__(self, scorer: Scorer, config: OnlineAlignment) -> None:
        """`scorer` gives complete log-probabilities."""
        super().__init__()
        assert scorer.normalised, "ratios and divergences need log Z"
        self.model = scorer.model
        self.config = config
        self._scorer = scorer

    def train(self, mode: bool = True) -> "OnlineLoss":
        """Switch the mode; the model's dropout stays off."""
        super().train(mode)
        self.model.eval()
        return self

    def required_ids(self, inputs: OnlineInputs) -> Ids:
        """Ids of the prompts, of candidates and of the supervised term."""
        return self._scorer.required_ids(inputs.candidates, inputs.supervised)

    def weight(self, inputs: OnlineInputs) -> Tensor:
        """Generated candidates, or their codes (reduction="dapo")."""
        return pg.term_weights(inputs.mask, self.config.reduction).sum()

    def forward(self, inputs: OnlineInputs, rows: dict[str, Tensor], index: Ids) -> LossOutput:
        """Loss of a micro batch.

        Metrics, means over generated candidates: `policy_loss`, `ratio`, `clip_low`, `clip_high`,
        `bounded` and what the inputs measured. `entropy` and `kl`, of a part of log π, are those of
        the policy: means of -log π and of the divergence weighted by the inputs' `weights`; of
        beams or a nucleus, which have none, they describe likely candidates only.
        `supervised_loss`, `logged_loss`, `liked` and `disliked` (shares of impressions) over
        prompts.
        """
        config, mask = self.config, inputs.mask
        scored = self._scorer(inputs.candidates, inputs.supervised, rows, index)
        size = mask.shape[1]
        # What is masked may be infinite; zeros have a gradient of zero, infinities none.
        new = torch.where(mask, scored.log_probs[:, :size], 0.0)
        old = torch.where(mask, inputs.old, 0.0)
        terms = self._terms(new, old, inputs.advantages, mask)
        total = -self._sum(terms.objective, mask)
        metrics = {"policy_loss": total.detach()} | self._measured(terms, new, inputs)
        if inputs.reference is not None:
            reference = torch.where(mask, inputs.reference, 0.0)
            divergences = pg.divergences(new, reference, config.kl.estimator)
            metrics["kl"] = self._sum(_weighed(divergences.detach(), inputs), mask)
            total = total + config.kl.weight * self._sum(divergences, mask)
        if config.entropy_weight > 0:
            bonus = self._sum(pg.sampled_entropies(new, old), mask)
            total = total - config.entropy_weight * bonus
        weights = pg.term_weights(mask, config.reduction)
        if inputs.logged_advantages is not None:
            assert isinstance(config, GBPOConfig) and config.logged is not None
            logged = scored.log_probs[:, size:]
            losses = impression_losses(logged, inputs.logged_advantages, config.ratio)
            total = total + config.logged.weight * (weights * losses).sum()
            metrics["logged_loss"] = (weights * losses).sum().detach()
            metrics["liked"] = (weights * (inputs.logged_advantages > 0)).sum()
            metrics["disliked"] = (weights * (inputs.logged_advantages < 0)).sum()
        if scored.supervised is not None:
            term = (weights * scored.supervised).sum()
            total = total + config.supervised_weight * term
            metrics["supervised_loss"] = term.detach()
        return LossOutput(total, metrics)

    def flops_per_token(self, mean_length: float) -> float:
        """Forward FLOPs per token of a prompt; generating and scoring a group is left out."""
        return self.model.flops_per_token(mean_length)

    def _sum(self, values: Tensor, mask: Tensor) -> Tensor:
        return pg.reduced(values, mask, self.config.reduction)

    def _terms(self, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> pg.Terms:
        """What the algorithm makes of the ratios."""
        config = self.config
        new, old = (pg.at_level(values, mask, config.ratio) for values in (new, old))
        match config:
            case GRPOConfig(clip_low=low, clip_high=high):
                return pg.grpo_terms(new, old, advantages, low, high)
            case ECPOConfig(clip_low=low, clip_high=high, delta=delta):
                return pg.ecpo_terms(new, old, advantages, low, high, delta)
            case GBPOConfig():
                return pg.gbpo_terms(new, old, advantages)
            case _:
                assert_never(config)

    @torch.no_grad()
    def _measured(self, terms: pg.Terms, new: Tensor, inputs: OnlineInputs) -> dict[str, Tensor]:
        """Sums to be divided by the global weight."""
        mask = inputs.mask
        flags = {
            "clip_low": terms.clipped_low,
            "clip_high": terms.clipped_high,
            "bounded": terms.bounded,
        }
        means = {"ratio": terms.ratio, "entropy": _weighed(-new, inputs)}
        means |= {name: flag.float() for name, flag in flags.items()}
        means |= {name: values[..., None] for name, values in inputs.measures.items()}
        return {name: self._sum(values, mask) for name, values in means.items()}


def _weighed(values: Tensor, inputs: OnlineInputs) -> Tensor:
    """Values [N, G, L] whose mean over candidates is the expectation under the policy."""
    return values if inputs.weights is None else values * inputs.weights[..., None]
