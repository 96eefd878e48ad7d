"""What a run shows of a reward model: its table rows, and how far its probabilities are right."""

from collections.abc import Iterable, Mapping

from matplotlib.axes import Axes

from trainer.monitor.plots import INK, MODEL_COLOURS, svg_figure

Curve = tuple[tuple[float, float, float], ...]
"""(mean probability, share with the label, events) of each bin."""
BASELINE = "item rates"
"""The model that knows how often each item was liked, and no user."""
REWARD_MODEL = "reward model"
_SCORED = "auc/p_score:"


def reward_layout(measured: Iterable[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of (label, metric) for the results table; empty groups where nothing was measured."""
    kept = set(measured)
    names = sorted(m.removeprefix("rate/") for m in kept if m.startswith("rate/"))
    scored = sorted(m.removeprefix(_SCORED) for m in kept if m.startswith(_SCORED))

    def rows(*kinds: tuple[str, str]) -> list[tuple[str, str]]:
        return [(f"{label} {name}", f"{kind}/{name}") for name in names for kind, label in kinds]

    return [
        (
            "Order of what users did (AUC, 95% interval over users)",
            [
                ("Mean AUC", "auc"),
                *rows(("auc", "AUC"), ("auc_low", "  from,"), ("auc_high", "  to,")),
            ],
        ),
        (
            "Order by the P-score (AUC)",
            [(f"P-score for {name.replace('_', ' ')}", f"{_SCORED}{name}") for name in scored],
        ),
        (
            "Probabilities",
            rows(("rate", "Share with"), ("ece", "Calibration error,"), ("ne", "Entropy ratio,")),
        ),
        ("Dwell time (log seconds)", [("R²", "r2/dwell"), ("RMSE", "rmse/dwell")]),
    ]


def calibration_figures(calibration: Mapping[str, Curve]) -> list[tuple[str, str, str]]:
    """Title, SVG and caption of a reliability plot for each label."""
    return [_calibration(name, points) for name, points in calibration.items() if points]


def _calibration(name: str, points: Curve) -> tuple[str, str, str]:
    events = sum(count for _, _, count in points)
    error = sum(abs(told - share) * count for told, share, count in points) / events
    limit = 1.05 * max(max(told, share) for told, share, _ in points)

    def draw(axes: Axes) -> None:
        axes.plot([0, limit], [0, limit], color=INK, linewidth=0.8, linestyle=":")
        told, shares = zip(*((told, share) for told, share, _ in points), strict=True)
        axes.plot(told, shares, marker="o", markersize=4, color=MODEL_COLOURS["pretrained"])
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("share of events")

    caption = (
        f"{events:,.0f} test events in {len(points)} bins by score; on average the share is "
        f"{error:.4f} off the predicted probability."
    )
    title = f"Calibration of {name}"
    return title, svg_figure(draw, f"calibration-{name}", f"{title}. {caption}"), caption
