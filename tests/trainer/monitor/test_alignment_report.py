"""What the report says of online alignment: its numbers, and a reward that rises in vain."""

import pytest

from tests.trainer.monitor import invented
from trainer.monitor.alignment_report import reward_sentence, training_numbers
from trainer.monitor.figures import shown, stage_figures
from trainer.monitor.report import render_report
from trainer.monitor.tracker import MetricRow

STEPS = range(1, 7)


def course(gain: float, fall: float) -> list[MetricRow]:
    """Six steps whose reward moves by `gain` each, and a metric that falls by `fall` in all."""
    rows = [MetricRow(0, 0.0, {"validation/ndcg@10": 0.2})]
    for step in STEPS:
        values = {
            "train/loss": -0.0,
            "train/policy_loss": -0.0,
            "train/reward": 0.1 + gain * step,
            "train/reward/hit": 0.1 + gain * step,
            "train/kl": 6e-5 * step,
            "train/entropy": 3.0,
            "train/clip_low": 0.25,
            "train/zero_std": 0.5,
            "train/unique": 0.75,
            "train/lr": 1e-3,
        }
        rows.append(MetricRow(step, 0.0, values))
    return [*rows, MetricRow(6, 0.0, {"validation/ndcg@10": 0.2 - fall})]


@pytest.mark.parametrize(
    ("gain", "fall", "hacked"), [(0.1, 0.05, True), (0.1, -0.05, False), (-0.01, 0.05, False)]
)
def test_a_reward_that_rises_while_the_metric_falls(gain: float, fall: float, hacked: bool) -> None:
    told = reward_sentence(course(gain, fall), "ndcg@10")
    assert told is not None and told.endswith("may be hacked.") == hacked
    first, last = 0.1 + 1.5 * gain, 0.1 + 5.5 * gain
    assert f"from {first:.4f} in the first third of the steps to {last:.4f} in the last" in told
    assert f"NDCG@10 on validation from 0.2000 to {0.2 - fall:.4f}" in told


def test_nothing_is_said_of_a_reward_that_is_not_there() -> None:
    assert reward_sentence(course(0.1, 0.05)[1:-1], "ndcg@10") is None
    assert reward_sentence([MetricRow(1, 0.0, {"train/loss": 1.0})], "ndcg@10") is None


def test_the_numbers_of_every_step() -> None:
    rows = {row.pop("Measured"): row for row in training_numbers(course(0.1, 0.05))}
    reward = {"first third": "0.2500", "last third": "0.6500", "lowest": "0.2000"}
    assert rows["Reward, mean"] == reward | {"highest": "0.7000"}
    assert rows["KL divergence from the reference"]["lowest"] == "6.0e-05"
    assert rows["Reward, part hit"]["highest"] == "0.7000"
    for name in ("Entropy (-log π of candidates)", "Ratios clipped from below, share"):
        assert name in rows
    assert "Groups whose rewards are all equal, share" in rows and "Lr" not in rows


def test_the_report_shows_them() -> None:
    html = render_report(invented.results(), {"align": course(0.1, 0.05)}, None, None)
    assert "may be hacked" in html and "Distinct items in a group, share" in html
    titles = [figure.title for figure in stage_figures("align", course(0.1, 0.05), "ndcg@10")]
    assert titles == [
        "NDCG@10 on validation",
        "Mean reward",
        "KL divergence from the reference",
        "Entropy (-log π of candidates)",
    ]


def test_small_numbers_are_told() -> None:
    told = [shown(x) for x in (0.12345, -0.0, 6e-5, -2e-7, 12_345.0)]
    assert told == ["0.1235", "0.0000", "6.0e-05", "-2.0e-07", "12.3k"]
