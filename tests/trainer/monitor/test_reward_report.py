"""What the report shows of a reward model."""

import pytest

from trainer.monitor.reward_report import calibration_figures, reward_layout


def test_rows_follow_what_was_measured() -> None:
    measured = ["auc", "auc/like", "rate/like", "ece/like", "auc/p_score:no_hate", "r2/dwell"]
    groups = dict(reward_layout(measured))
    [order, score, probabilities, dwell] = groups.values()
    assert order == [
        ("Mean AUC", "auc"),
        ("AUC like", "auc/like"),
        ("  from, like", "auc_low/like"),
        ("  to, like", "auc_high/like"),
    ]
    assert score == [("P-score for no hate", "auc/p_score:no_hate")]
    assert ("Calibration error, like", "ece/like") in probabilities
    assert ("R²", "r2/dwell") in dwell
    ranking = dict(reward_layout(["hr@10", "ndcg@10"]))
    assert [metric for rows in ranking.values() for _, metric in rows if "/" in metric] == [
        "r2/dwell",
        "rmse/dwell",
    ]


def test_a_calibration_figure_says_how_far_off_it_is() -> None:
    points = ((0.1, 0.2, 300.0), (0.5, 0.4, 100.0))
    [(title, svg, caption)] = calibration_figures({"like": points, "never": ()})
    assert title == "Calibration of like" and svg.startswith("<svg")
    assert "400 test events in 2 bins" in caption
    assert float(caption.split(" is ")[1].split()[0]) == pytest.approx(0.1)
