"""GRPO, ECPO and GBPO against numbers by hand and plain loops; gradients bounded as promised."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.objectives import policy_gradient as pg

N, G, L = 3, 4, 2
LOW, HIGH, DELTA = 0.2, 0.28, 0.1


def log_probs(seed: int, shape: tuple[int, ...] = (N, G, L)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -3.0 * torch.rand(shape, generator=generator, dtype=torch.float64)


def some_mask() -> Tensor:
    mask = torch.ones(N, G, L, dtype=torch.bool)
    mask[1, 3] = False
    mask[2, 0, 1] = False
    return mask


def some_advantages() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(N, G, generator=generator, dtype=torch.float64)


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0], [0.1, 0.1, 0.1, 7.0], [2.0, 9.0, 9.0, 9.0]])
    valid = torch.tensor([[True] * 4, [True] * 3 + [False], [True] + [False] * 3])
    std = math.sqrt(2.0)  # (0 + 1 + 1 + 4) / 3
    expected = torch.zeros(3, 4)
    expected[0] = torch.tensor([0.0, -1.0, -1.0, 2.0]) / (std + 0.5)
    torch.testing.assert_close(pg.group_advantages(rewards, valid, "group", 0.5), expected)
    expected[0] = torch.tensor([0.0, -1.0, -1.0, 2.0])
    torch.testing.assert_close(pg.group_advantages(rewards, valid, "none", 0.5), expected)
    kept = torch.tensor([1.0, 0.0, 0.0, 3.0, 0.1, 0.1, 0.1, 2.0])
    whole = pg.std_of_moments(pg.reward_moments(rewards, valid))
    torch.testing.assert_close(whole, kept.std())
    found = pg.group_advantages(rewards, valid, "batch", 0.5, whole)
    torch.testing.assert_close(found[0], expected[0] / (kept.std() + 0.5))
    assert pg.zero_std(rewards, valid).tolist() == [False, True, True]


def test_moments_of_halves_add_up() -> None:
    rewards, valid = log_probs(3, (6, 5)), log_probs(4, (6, 5)) > -2.5
    parts = pg.reward_moments(rewards[:2], valid[:2]) + pg.reward_moments(rewards[2:], valid[2:])
    torch.testing.assert_close(
        pg.std_of_moments(parts).double(), rewards[valid].std(), rtol=1e-6, atol=0
    )


def test_grpo_by_hand() -> None:
    """Ratios 1.5, 0.5, 1.1 with either sign: which of the two arguments is the smaller."""
    ratio = torch.tensor([1.5, 0.5, 1.1, 1.5, 0.5, 1.1], dtype=torch.float64)
    gain = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0], dtype=torch.float64)
    old = torch.full((1, 6, 1), -4.0, dtype=torch.float64)
    terms = pg.grpo_terms(old + ratio.log()[None, :, None], old, gain[None], LOW, HIGH)
    expected = [2.56, 1.0, 2.2, -3.0, -1.6, -2.2]
    assert terms.objective.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    assert terms.clipped_high.flatten().tolist() == [True, False, False, False, False, False]
    assert terms.clipped_low.flatten().tolist() == [False, False, False, False, True, False]


def test_ecpo_by_hand() -> None:
    """A ratio of 5 with A = -2 counts as 1.38; ratios below are left alone."""
    ratio = torch.tensor([5.0, 1.3, 5.0], dtype=torch.float64)
    gain = torch.tensor([-2.0, -2.0, 2.0], dtype=torch.float64)
    old = torch.full((1, 3, 1), -6.0, dtype=torch.float64)
    new = (old + ratio.log()[None, :, None]).requires_grad_()
    terms = pg.ecpo_terms(new, old, gain[None], LOW, HIGH, DELTA)
    assert terms.objective.flatten().tolist() == pytest.approx([-2.76, -2.6, 2.56], abs=1e-12)
    assert terms.bounded.flatten().tolist() == [True, False, True]
    terms.objective.sum().backward()
    assert new.grad is not None
    assert new.grad.flatten().tolist() == pytest.approx([-2.76, -2.6, 0.0], abs=1e-12)


def test_gbpo_by_hand() -> None:
    """π .6, .6, .2, .2 with π_old .3, .5, .1, .1 and either sign, and without π_old."""
    new = torch.tensor([0.6, 0.6, 0.2, 0.2], dtype=torch.float64).log()[None, :, None]
    old = torch.tensor([0.3, 0.5, 0.1, 0.4], dtype=torch.float64).log()[None, :, None]
    gain = torch.tensor([[1.0, -1.0, -1.0, 1.0]], dtype=torch.float64)
    found = pg.gbpo_terms(new, old, gain).objective.flatten().tolist()
    assert found == pytest.approx([1.0, -0.6 / 0.5, -0.2 / 0.8, 0.5], abs=1e-12)
    logged = pg.gbpo_terms(new, None, gain).objective.flatten().tolist()
    assert logged == pytest.approx([1.0, -1.0, -0.2 / 0.8, 1.0], abs=1e-12)


def plain_term(kind: str, new: float, old: float, gain: float) -> float:
    """One term of the three objectives, straight from the formulas."""
    p, before = math.exp(new), math.exp(old)
    if kind == "gbpo":
        return p / max(before, p if gain >= 0 else 1.0 - p) * gain
    if kind == "ecpo":
        before = max(p / (1 + HIGH + DELTA), before)
    ratio = p / before
    return min(ratio * gain, min(max(ratio, 1 - LOW), 1 + HIGH) * gain)


def terms_of(kind: str, new: Tensor, old: Tensor, gain: Tensor) -> pg.Terms:
    if kind == "grpo":
        return pg.grpo_terms(new, old, gain, LOW, HIGH)
    if kind == "ecpo":
        return pg.ecpo_terms(new, old, gain, LOW, HIGH, DELTA)
    return pg.gbpo_terms(new, old, gain)


def plain_mean(kind: str, ratio: str, reduction: str) -> float:
    new, old, gain, mask = log_probs(1), log_probs(2), some_advantages(), some_mask()
    total = weight = 0.0
    for n in range(N):
        for g in range(G):
            parts = [at for at in range(L) if mask[n, g, at]]
            if not parts:
                continue
            lengths = {"token": 1, "sequence": len(parts), "item": 1}
            values = []
            for at in parts:
                here = [at] if ratio == "token" else parts
                a = sum(float(new[n, g, i]) for i in here) / lengths[ratio]
                b = sum(float(old[n, g, i]) for i in here) / lengths[ratio]
                values.append(plain_term(kind, a, b, float(gain[n, g])))
            scale = {"grpo": len(parts), "dapo": 1, "dr_grpo": L}[reduction]
            total += sum(values) / scale
            weight += len(values) if reduction == "dapo" else 1
    return total / weight


@pytest.mark.parametrize("kind", ["grpo", "ecpo", "gbpo"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "item"])
@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
def test_against_a_plain_loop(kind: str, ratio: Any, reduction: Any) -> None:
    mask = some_mask()
    new, old = (pg.at_level(log_probs(seed), mask, ratio) for seed in (1, 2))
    terms = terms_of(kind, new, old, some_advantages())
    weight = pg.term_weights(mask, reduction).sum()
    found = pg.reduced(terms.objective, mask, reduction) / weight
    assert float(found) == pytest.approx(plain_mean(kind, ratio, reduction), abs=1e-6)


def test_divergences_by_hand() -> None:
    new = torch.tensor([0.5, 0.2], dtype=torch.float64).log()
    reference = torch.tensor([0.25, 0.4], dtype=torch.float64).log()
    two = math.log(2.0)
    by_hand: dict[pg.Divergence, list[float]] = {
        "k1": [two, -two],
        "k2": [two**2 / 2, two**2 / 2],
        "k3": [0.5 + two - 1.0, 2.0 - two - 1.0],
    }
    for kind, expected in by_hand.items():
        found = pg.divergences(new, reference, kind)
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_mean_divergence_and_entropy_over_all_outcomes_are_exact() -> None:
    """Weighted by what draws them, the estimates and the entropy's gradient are the true ones."""
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([0.1, 0.6, 0.2], dtype=torch.float64).log_softmax(0)
    new = logits.log_softmax(0)
    reference = behaviour.flip(0)
    exact = (new.exp() * (new - reference)).sum()
    for kind in ("k1", "k3"):
        estimate = (new.exp() * pg.divergences(new, reference, kind)).sum()
        torch.testing.assert_close(estimate, exact)
    entropy = -(new.exp() * new).sum()
    [wanted] = torch.autograd.grad(entropy, logits, retain_graph=True)
    sampled = (behaviour.exp() * pg.sampled_entropies(new, behaviour)).sum()
    torch.testing.assert_close(sampled, entropy)
    torch.testing.assert_close(torch.autograd.grad(sampled, logits)[0], wanted)


def test_masked_candidates_have_no_gradient_and_spoil_nothing() -> None:
    mask, gain = some_mask(), some_advantages()
    new = log_probs(1).masked_fill(~mask, -torch.inf).requires_grad_()
    old = log_probs(2).masked_fill(~mask, -torch.inf)
    terms = pg.grpo_terms(
        pg.at_level(new, mask, "token"), pg.at_level(old, mask, "token"), gain, LOW, HIGH
    )
    pg.reduced(terms.objective, mask, "grpo").backward()
    assert new.grad is not None and new.grad.isfinite().all()
    assert (new.grad[~mask] == 0).all() and (new.grad[mask] != 0).any()


numbers = st.floats(-12.0, 0.0)
gains = st.floats(-5.0, 5.0, allow_subnormal=False)


@settings(max_examples=200, deadline=None)
@given(new=numbers, old=numbers, gain=gains, low=st.floats(0.01, 0.9), high=st.floats(0.01, 2.0))
def test_ecpo_bounds_the_gradient(
    new: float, old: float, gain: float, low: float, high: float
) -> None:
    """|∂/∂ log π| <= |A| (1 + ε_high + δ), whatever π and π_old; where A < 0 GRPO has no bound."""
    value = torch.tensor([[[new]]], dtype=torch.float64, requires_grad=True)
    before = torch.tensor([[[old]]], dtype=torch.float64)
    terms = pg.ecpo_terms(
        value, before, torch.tensor([[gain]], dtype=torch.float64), low, high, DELTA
    )
    terms.objective.sum().backward()
    assert value.grad is not None
    assert abs(float(value.grad)) <= abs(gain) * (1 + high + DELTA) + 1e-9


@pytest.mark.parametrize("kind", ["grpo", "ecpo", "gbpo"])
@pytest.mark.parametrize("gain", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("new, old", [(-1.0, -95.0), (-95.0, -1.0), (-150.0, -1.0), (0.0, -300.0)])
def test_no_ratio_overflows(kind: str, gain: float, new: float, old: float) -> None:
    """In float32: gradients are finite, and 0 where the clip holds."""
    value = torch.tensor([[[new]]], requires_grad=True)
    terms = terms_of(kind, value, torch.tensor([[[old]]]), torch.tensor([[gain]]))
    terms.objective.sum().backward()
    assert value.grad is not None and value.grad.square().isfinite().all()
    assert terms.objective.isfinite().all() and terms.ratio.isfinite().all()
    if gain == 0.0 or terms.clipped_low.any() or terms.clipped_high.any():
        assert float(value.grad) == 0.0
    elif kind == "grpo" and new > old:
        assert float(value.grad) < -1e8  # a push away, as strong as can be


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_no_divergence_overflows(kind: pg.Divergence) -> None:
    new = torch.tensor([-150.0, -1.0], requires_grad=True)
    found = pg.divergences(new, torch.tensor([-1.0, -150.0]), kind)
    found.sum().backward()
    assert found.isfinite().all() and new.grad is not None and new.grad.square().isfinite().all()
    assert kind == "k1" or (float(new.grad[0]) < 0 < float(new.grad[1]))
    entropies = pg.sampled_entropies(new, torch.tensor([-300.0, -200.0]))
    assert torch.autograd.grad(entropies.sum(), new)[0].square().isfinite().all()


def test_grpo_does_not_bound_what_ecpo_bounds() -> None:
    value = torch.tensor([[[-0.5]]], requires_grad=True)
    pg.grpo_terms(
        value, torch.tensor([[[-9.0]]]), torch.tensor([[-1.0]]), LOW, HIGH
    ).objective.sum().backward()
    assert value.grad is not None and abs(float(value.grad)) > 1000


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-10.0, 10.0), min_size=2, max_size=6),
    old=st.none() | numbers,
    gain=gains,
)
def test_gbpo_bounds_the_gradient(logits: list[float], old: float | None, gain: float) -> None:
    """At most |A| in every logit, and |A| π in the candidate's where A < 0."""
    values = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    new = values.log_softmax(0)[:1].view(1, 1, 1)
    before = None if old is None else torch.tensor([[[old]]], dtype=torch.float64)
    terms = pg.gbpo_terms(new, before, torch.tensor([[gain]], dtype=torch.float64))
    [in_log] = torch.autograd.grad(terms.objective.sum(), new, retain_graph=True)
    [in_logits] = torch.autograd.grad(terms.objective.sum(), values)
    probability = float(new.detach().exp())
    assert float(in_logits.abs().max()) <= abs(gain) + 1e-9
    if gain >= 0:
        assert float(in_log.abs()) <= gain + 1e-9
    else:
        assert float(in_logits[0].abs()) <= abs(gain) * probability + 1e-9
    if (
        abs(gain) > 1e-9
        and old is not None
        and old > -9
        and probability < 0.999
        and probability > 1e-6
    ):
        assert float(in_log.abs()) > 0  # nothing is cut off


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.floats(-40.0, 40.0, width=32), min_size=2, max_size=6),
    old=st.none() | st.floats(-90.0, 0.0, width=32),
    gain=st.sampled_from([-1.0, 1.0]),
)
def test_gbpo_bounds_the_gradient_where_probabilities_round(
    logits: list[float], old: float | None, gain: float
) -> None:
    """As above in training's precision, up to its rounding: also where π rounds to 1."""
    values = torch.tensor(logits, requires_grad=True)
    new = values.log_softmax(0)[:1].view(1, 1, 1)
    before = None if old is None else torch.tensor([[[old]]])
    terms = pg.gbpo_terms(new, before, torch.tensor([[gain]]))
    [in_logits] = torch.autograd.grad(terms.objective.sum(), values)
    assert float(in_logits.abs().max()) <= 1.05


def test_before_the_first_update_all_have_the_gradient_of_the_policy() -> None:
    """With π = π_old: A ∇ log π, and GBPO's where A < 0 is that times π / max(π, 1 - π)."""
    gain, old = some_advantages(), log_probs(5)
    for kind in ("grpo", "ecpo", "gbpo"):
        new = old.clone().requires_grad_()
        terms_of(kind, new, old, gain).objective.sum().backward()
        expected = gain[..., None].expand_as(old)
        if kind == "gbpo":
            p = old.exp()
            expected = torch.where(expected < 0, expected * p / torch.maximum(p, 1 - p), expected)
        torch.testing.assert_close(new.grad, expected)
