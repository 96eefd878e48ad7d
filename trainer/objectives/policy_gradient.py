"""Policy gradients of groups of candidates: GRPO, ECPO, GBPO. Pure functions of log-probabilities.

Formulas: algorithms reference §6; GRPO arXiv 2402.03300 with the knobs of DAPO (2503.14476),
Dr. GRPO (2503.20783) and GSPO (2507.18071); ECPO arXiv 2506.13695; GBPO arXiv 2508.20900.

Everything is kept as logarithms, so that no ratio of tiny probabilities is formed.

Shape legend: N prompts, G candidates of a prompt, L parts of a candidate's log π (levels of its
semantic id; 1 where items are scored), P = L, or 1 where ratios are of whole candidates.
"""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

Scaling = Literal["group", "batch", "none"]
Ratio = Literal["token", "sequence", "item"]
Reduction = Literal["grpo", "dr_grpo", "dapo"]
Divergence = Literal["k1", "k2", "k3"]

LARGEST_LOG_RATIO = 20.0
"""Ratios beyond its exponential (5e8) count as that, so that squares of gradients are finite."""


@dataclass(frozen=True)
class Terms:
    """What an algorithm maximises, [N, G, P] float32, and what it did to the ratios."""

    objective: Tensor
    """Differentiable in the new log-probabilities."""
    ratio: Tensor
    """π / π'_old, without gradient."""
    clipped_low: Tensor
    """bool, the lower clip stopped the gradient (always false where nothing is clipped)."""
    clipped_high: Tensor
    """bool, the upper clip stopped the gradient."""
    bounded: Tensor
    """bool, π'_old was raised above π_old (ECPO, GBPO)."""


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp, of nothing above LARGEST_LOG_RATIO; its gradient is its value, as of exp.

    An infinite ratio that a clip gives no gradient has one that is not a number: 0 · ∞.
    """
    excess = (log_ratio.detach() - LARGEST_LOG_RATIO).clamp(min=0)
    return (log_ratio - excess).exp()


def group_advantages(
    rewards: Tensor,
    valid: Tensor,
    scaling: Scaling,
    epsilon: float,
    batch_std: Tensor | None = None,
) -> Tensor:
    """(r - mean) / (std + ε) of each candidate in its group: [N, G] float32, 0 where not valid.

    Standard deviations are of samples (n - 1). A group whose rewards are all equal says nothing:
    its advantages are 0.

    Args:
        rewards: [N, G] float32.
        valid: [N, G] bool.
        scaling: by the group's std, the global batch's, or not at all (Dr. GRPO).
        epsilon: ε.
        batch_std: scalar, of all valid rewards of the global batch (`std_of_moments`); wanted by
            scaling="batch".
    """
    rewards = rewards.masked_fill(~valid, 0.0)
    number = valid.sum(1, keepdim=True)
    centred = (rewards - rewards.sum(1, keepdim=True) / number.clamp(min=1)) * valid
    centred = centred.masked_fill(zero_std(rewards, valid)[:, None], 0.0)
    match scaling:
        case "group":
            return centred / (group_std(rewards, valid)[:, None] + epsilon)
        case "batch":
            assert batch_std is not None, "the std of the global batch is missing"
            return centred / (batch_std + epsilon)
        case "none":
            return centred
        case _:
            assert_never(scaling)


def group_std(rewards: Tensor, valid: Tensor) -> Tensor:
    """Sample standard deviation of each group's valid rewards: [N]; 0 with fewer than two."""
    number = valid.sum(1)
    rewards = rewards.masked_fill(~valid, 0.0)
    centred = (rewards - (rewards.sum(1) / number.clamp(min=1))[:, None]) * valid
    return (centred.square().sum(1) / (number - 1).clamp(min=1)).sqrt()


def zero_std(rewards: Tensor, valid: Tensor) -> Tensor:
    """Whether all valid rewards of a group are equal: bool [N]."""
    largest = rewards.masked_fill(~valid, -torch.inf).amax(1)
    smallest = rewards.masked_fill(~valid, torch.inf).amin(1)
    return largest <= smallest


def reward_moments(rewards: Tensor, valid: Tensor) -> Tensor:
    """Count, sum and sum of squares of valid rewards: [3] float64, to be summed over ranks."""
    values = rewards.masked_fill(~valid, 0.0).double()
    return torch.stack([valid.sum().double(), values.sum(), values.square().sum()])


def std_of_moments(moments: Tensor) -> Tensor:
    """Sample standard deviation from `reward_moments`: scalar float32; 0 with fewer than two."""
    number, total, squares = moments.unbind()
    spread = squares - total.square() / number.clamp(min=1)
    return (spread.clamp(min=0) / (number - 1).clamp(min=1)).sqrt().float()


def at_level(log_probs: Tensor, mask: Tensor, ratio: Ratio) -> Tensor:
    """Log-probabilities that ratios are formed of: [N, G, L] → [N, G, P].

    `token`: each part's own. `sequence`: their mean, so the ratio is the geometric mean (GSPO).
    `item`: their sum, log π of the candidate. Masked parts count as 0.
    """
    parts = log_probs.masked_fill(~mask, 0.0)
    match ratio:
        case "token":
            return parts
        case "sequence":
            return parts.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        case "item":
            return parts.sum(-1, keepdim=True)
        case _:
            assert_never(ratio)


def grpo_terms(
    new: Tensor, old: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Terms:
    """min(ratio · A, clip(ratio, 1 - ε_low, 1 + ε_high) · A).

    Args:
        new: [N, G, P] log π, differentiable.
        old: [N, G, P] log π_old.
        advantages: [N, G].
        clip_low: ε_low.
        clip_high: ε_high.
    """
    gain = advantages[..., None]
    ratio = ratio_of(new - old.detach())
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    seen = ratio.detach()
    return Terms(
        objective=torch.minimum(ratio * gain, clipped * gain),
        ratio=seen,
        clipped_low=(seen < 1.0 - clip_low) & (gain < 0),
        clipped_high=(seen > 1.0 + clip_high) & (gain > 0),
        bounded=torch.zeros_like(seen, dtype=torch.bool),
    )


def ecpo_terms(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    delta: float,
) -> Terms:
    """GRPO with π'_old = max(sg(π) / (1 + ε_high + δ), π_old).

    So the ratio is at most 1 + ε_high + δ, and so is, over |A|, the gradient in log π. Without the
    early clip a candidate that is disliked and has become likely pushes without bound.
    """
    floor = new.detach() - math.log(1.0 + clip_high + delta)
    old = old.detach()
    terms = grpo_terms(new, torch.maximum(floor, old), advantages, clip_low, clip_high)
    return Terms(
        terms.objective, terms.ratio, terms.clipped_low, terms.clipped_high, bounded=floor > old
    )


def gbpo_terms(new: Tensor, old: Tensor | None, advantages: Tensor) -> Terms:
    """π / π'_old · A with π'_old = max(π_old, sg π) if A >= 0 else max(π_old, 1 - sg π).

    Nothing is clipped, so every candidate keeps a gradient. It is at most |A| in log π where
    A >= 0; where A < 0 it is at most |A| π (as that of a binary cross entropy) in the logit of the
    candidate. Without `old`, of impressions that another system made, π_old is sg π.
    """
    gain, seen = advantages[..., None], new.detach()
    old = seen if old is None else old.detach()
    # 1 - π loses nothing near π = 0. Near π = 1 it is known to some roundings only, while the
    # others' gradients are not: were it 0 there, nothing but a tiny π_old would bound them.
    against = torch.log1p(-seen.exp().clamp(max=1.0 - 64 * torch.finfo(seen.dtype).eps))
    bound = torch.maximum(old, torch.where(gain >= 0, seen, against))
    ratio = (new - bound).exp()
    nowhere = torch.zeros_like(seen, dtype=torch.bool)
    return Terms(ratio * gain, ratio.detach(), nowhere, nowhere, bounded=bound > old)


def divergences(new: Tensor, reference: Tensor, kind: Divergence) -> Tensor:
    """Estimates of KL(π || π_ref) from samples of π, elementwise; differentiable in `new`.

    k1 log π - log π_ref; k2 (k1)² / 2; k3 e^{-k1} + k1 - 1, which is never negative.
    """
    difference = new - reference.detach()
    match kind:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            return ratio_of(-difference) + difference - 1.0
        case _:
            assert_never(kind)


def sampled_entropies(new: Tensor, old: Tensor | None) -> Tensor:
    """-ρ log π with ρ = π / π_old (sg π without `old`), elementwise; differentiable in `new`.

    For candidates drawn from π_old its mean is the entropy of π, and its gradient the entropy's.
    Other draws give neither: configuration refuses them.
    """
    before = new if old is None else old
    return -ratio_of(new - before.detach()) * new


def reduced(values: Tensor, mask: Tensor, reduction: Reduction) -> Tensor:
    """Scalar sum of values [N, G, P], to be divided by the sum of `term_weights`.

    `grpo`: every candidate counts once, with the mean of its parts. `dapo`: every part counts once.
    `dr_grpo`: parts over the constant L, so that short candidates do not weigh more. Values of P =
    1 stand for each part of their candidate; masked ones may be anything.
    """
    kept = torch.where(mask, values.expand(mask.shape), 0.0)
    match reduction:
        case "grpo":
            return (kept.sum(-1) / mask.sum(-1).clamp(min=1)).sum()
        case "dapo":
            return kept.sum()
        case "dr_grpo":
            return kept.sum() / mask.shape[-1]
        case _:
            assert_never(reduction)


def term_weights(mask: Tensor, reduction: Reduction) -> Tensor:
    """What each prompt counts in a mean: [N] float32."""
    if reduction == "dapo":
        return mask.sum((1, 2)).float()
    return mask.any(-1).sum(1).float()
