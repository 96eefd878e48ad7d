"""AUC, calibration and entropy against loops over events; intervals against what they promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.label_metrics import LabelMetrics


def measured(logits: Tensor, truth: Tensor, users: Tensor, parts: int = 1) -> dict[str, float]:
    """Metrics of label `a`, its sums added up over `parts` as over ranks."""
    counts, sums = 0, 0
    for part in range(parts):
        own = slice(part, None, parts)
        metrics = LabelMetrics(("a",), "cpu")
        metrics.update(logits[own, None], truth[own, None], users[own])
        more = metrics.sums()
        counts, sums = counts + more[0], sums + more[1]
    return LabelMetrics(("a",), "cpu").result(counts, sums)[0]


def auc_by_pairs(logits: list[float], truth: list[int]) -> float:
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, x in zip(logits, truth, strict=True)
        for b, y in zip(logits, truth, strict=True)
        if x and not y
    ]
    return sum(wins) / len(wins)


@given(
    st.lists(st.tuples(st.integers(-40, 40), st.integers(0, 1)), min_size=2, max_size=40),
    st.integers(1, 3),
)
@settings(deadline=None, max_examples=30)
def test_auc_is_the_share_of_pairs_in_the_right_order(
    events: list[tuple[int, int]], parts: int
) -> None:
    scores, truth = [e[0] / 10 for e in events], [e[1] for e in events]
    found = measured(
        torch.tensor(scores), torch.tensor(truth), torch.arange(len(events)) % 5 + 1, parts
    )
    assert found["events"] == len(events)
    rate = found["rate/a"]
    assert rate == pytest.approx(sum(truth) / len(truth))
    if 0 < rate < 1:
        auc = auc_by_pairs(scores, truth)
        assert found["auc/a"] == found["auc"] == pytest.approx(auc, abs=1e-9)
        assert found["auc_low/a"] <= auc <= found["auc_high/a"]
        loss = [math.log1p(math.exp(-s if y else s)) for s, y in zip(scores, truth, strict=True)]
        entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
        assert found["ne/a"] == pytest.approx(sum(loss) / len(loss) / entropy, rel=1e-4)
    else:
        assert "auc/a" not in found


@pytest.mark.parametrize("scale, shift", [(0.02, 0.0), (1.0, -9.0), (4.0, -12.0), (30.0, 0.0)])
def test_the_bins_tell_scores_apart_whatever_their_scale(scale: float, shift: float) -> None:
    rng = torch.Generator().manual_seed(3)
    scores = torch.randn(3000, generator=rng)
    truth = (torch.rand(3000, generator=rng) < torch.sigmoid(scores - 1)).long()
    logits = scores.double() * scale + shift
    found = measured(logits.float(), truth, torch.arange(3000))
    there, absent = logits[truth == 1], logits[truth == 0]
    share = (there[:, None] > absent[None, :]).double().mean().item()
    assert found["auc/a"] == pytest.approx(share, abs=5e-4)


def test_a_calibrated_score_has_no_error_and_a_shifted_one_has_its_shift() -> None:
    torch.manual_seed(0)
    probability = torch.rand(200_000) * 0.8 + 0.1
    truth = (torch.rand(200_000) < probability).long()
    users = torch.arange(200_000)
    metrics = LabelMetrics(("a", "b"), "cpu")
    logits = torch.stack([torch.logit(probability), torch.logit(probability * 0.9)], dim=1)
    metrics.update(logits, torch.stack([truth, truth], dim=1), users)
    found, curves = metrics.result(*metrics.sums())
    assert found["ece/a"] < 0.01
    assert found["ece/b"] == pytest.approx(0.05, abs=0.01)
    assert found["auc/a"] == pytest.approx(found["auc/b"], abs=1e-3)
    assert sum(n for _, _, n in curves["a"]) == 200_000 and len(curves["a"]) == 15
    for told, share, n in curves["a"]:
        assert abs(told - share) < 0.02 and abs(n - 200_000 / 15) < 2000


def test_the_interval_is_as_wide_as_the_auc_varies_and_knows_whose_events_are_whose() -> None:
    torch.manual_seed(1)
    aucs, widths = [], []
    for _ in range(40):
        truth = (torch.rand(400) < 0.4).long()
        logits = torch.randn(400) + truth
        found = measured(logits, truth, torch.randint(1, 10**6, (400,)))
        aucs.append(found["auc/a"])
        widths.append((found["auc_high/a"] - found["auc_low/a"]) / 3.92)
    spread = torch.tensor(aucs).std().item()
    assert torch.tensor(widths).mean().item() == pytest.approx(spread, rel=0.35)
    # The same events of few users tell less.
    truth, logits = truth.repeat(20), logits.repeat(20)
    many = measured(logits, truth, torch.arange(8000))
    few = measured(logits, truth, torch.arange(400).repeat(20))
    widths = [m["auc_high/a"] - m["auc_low/a"] for m in (many, few)]
    assert widths[1] > 3 * widths[0] and many["auc/a"] == pytest.approx(few["auc/a"])


def test_nothing_measured_is_no_division() -> None:
    metrics = LabelMetrics(("a",), "cpu")
    metrics.update(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0).long())
    found, curves = metrics.result(*metrics.sums())
    assert found == {"events": 0.0, "rate/a": 0.0, "ece/a": 0.0} and curves == {"a": []}


def test_what_is_not_a_number_is_no_score() -> None:
    logits, truth = torch.tensor([0.5, math.nan, -1.0]), torch.tensor([1, 0, 0])
    with pytest.raises(ValueError, match="scores of 'a' are not numbers for some events"):
        measured(logits, truth, torch.arange(3), parts=2)
