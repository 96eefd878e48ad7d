"""Which figures a run gets, with their captions in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from data_loaders.manifest import DatasetManifest
from trainer.monitor.plots import (
    INK,
    LONG,
    MODEL_COLOURS,
    VARIABLES,
    Curve,
    curve,
    draw_bars,
    draw_curve,
    draw_highest,
    draw_model_bars,
    model_colour,
    png_figure,
    smoothed,
    svg_figure,
    thinned,
)
from trainer.monitor.progress import count
from trainer.monitor.results import Results
from trainer.monitor.reward_report import REWARD_MODEL, calibration_figures
from trainer.monitor.terminal import clipped
from trainer.monitor.tracker import MetricRow

STAGE_MODEL = {"train": "pretrained", "align": "aligned"}
SUMMARY_METRICS = ("hr@10", "ndcg@10", "mrr", "coverage@10", "auc")


@dataclass(frozen=True)
class LegendKey:
    """A colour and what it stands for."""

    name: str
    variable: str


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the report."""

    title: str
    svg: str
    caption: str
    legend: tuple[LegendKey, ...] = ()


def metric_label(metric: str) -> str:
    """`ndcg@10` → `NDCG@10`."""
    if metric.startswith("auc"):
        return " ".join(["AUC", *metric.split("/")[1:]])
    name, _, k = metric.partition("@")
    words = {"hr": "HR", "ndcg": "NDCG", "mrr": "MRR", "preference_accuracy": "preference accuracy"}
    return words.get(name, name.capitalize()) + (f"@{k}" if k else "")


def stage_figures(stage: str, rows: Sequence[MetricRow], metric: str) -> list[ReportFigure]:
    """Curves of a training stage: loss, validation, preferences, reward, speed; those it logged."""
    colour = MODEL_COLOURS[STAGE_MODEL[stage]]
    on_validation = [(f"{metric_label(metric)} on validation", f"validation/{metric}", True)]
    speed = [("Tokens per second", "speed/tokens_per_s", False)]
    wanted = [("Loss", "train/loss", False), *on_validation, *speed]
    if stage == "align":
        wanted = [*_alignment_losses(rows), *on_validation, *ALIGNMENT_CURVES, *speed]
    figures = []
    for title, tag, is_validation in wanted:
        data = curve(rows, tag)
        if data is not None:
            name = f"{stage}-{tag.replace('/', '-').replace('@', '-')}"
            figures.append(_curve_figure(title, name, data, colour, is_validation))
    return figures


ALIGNMENT_CURVES = (
    ("Mean reward", "train/reward", False),
    ("Preference accuracy in training", "train/accuracy", False),
    ("Preference accuracy, held-out users", "validation/preference_accuracy", True),
    ("Preference margin in training", "train/margin", False),
    ("KL divergence from the reference", "train/kl", False),
    ("Entropy (-log π of candidates)", "train/entropy", False),
)
"""Title, tag, and whether it is of validation."""


def _alignment_losses(rows: Sequence[MetricRow]) -> list[tuple[str, str, bool]]:
    """A policy gradient's own loss has a mean of nothing: its advantages add up to 0."""
    if any("train/policy_loss" in row.values for row in rows):
        return [("Supervised loss", "train/supervised_loss", False)]
    return [("Loss", "train/loss", False)]


def _curve_figure(
    title: str, name: str, data: Curve, colour: str, is_validation: bool
) -> ReportFigure:
    def draw(axes: Axes) -> None:
        draw_curve(axes, data, colour, smooth=not is_validation)
        if is_validation:
            draw_highest(axes, data, colour)
        if data.values.max() >= 10_000:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: count(y)))

    caption = _told(data, is_validation)
    return ReportFigure(title, svg_figure(draw, name, f"{title}. {caption}"), caption)


def _told(data: Curve, is_validation: bool) -> str:
    if is_validation:
        step, highest = data.highest
        return f"Highest {highest:.4f} at step {step:,}; last {data.last:.4f}."
    even = smoothed(thinned(data)) if len(data.steps) >= LONG else data
    first, last = shown(float(even.values[0])), shown(even.last)
    caption = f"From {first} to {last} over {int(data.steps[-1]):,} steps."
    return caption + (" Pale: as logged; strong: moving average." if even is not data else "")


def shown(value: float) -> str:
    """A number of the report: four decimals, two digits where those would say nothing."""
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return count(value) if value >= 10_000 else f"{value + 0.0:.4f}"  # no -0.0000


def bar_figures(results: Results) -> list[ReportFigure]:
    """Hit rate, NDCG and coverage over the cut-offs, model beside model, on test."""
    figures = []
    ks = results.protocol.ks
    for title, key in (("Hit rate", "hr"), ("NDCG", "ndcg"), ("Catalogue coverage", "coverage")):
        models = _test_numbers(results, [f"{key}@{k}" for k in ks])
        if not models:
            continue

        def draw(axes: Axes, models: Mapping[str, list[float]] = models) -> None:
            draw_model_bars(axes, [f"@{k}" for k in ks], models, numbers=False)

        near = min(range(len(ks)), key=lambda i: abs(ks[i] - 10))
        told = ", ".join(f"{name} {values[near]:.4f}" for name, values in models.items())
        caption = f"At {ks[near]}: {told}."
        svg = svg_figure(draw, f"bars-{key}", f"{title} on test. {caption}")
        figures.append(ReportFigure(f"{title} on test", svg, caption, _legend(models)))
    return figures


def calibration_of(results: Results) -> list[ReportFigure]:
    """Reliability of the probabilities of the run's reward model, if it has one."""
    curves = results.models[REWARD_MODEL].calibration if REWARD_MODEL in results.models else None
    return [ReportFigure(*parts) for parts in calibration_figures(curves or {})]


def _test_numbers(results: Results, wanted: Sequence[str]) -> dict[str, list[float]]:
    numbers = {name: results.metrics(name, "test") for name in results.ordered_models()}
    return {
        clipped(name, 24): [values[metric] for metric in wanted]
        for name, values in numbers.items()
        if all(metric in values for metric in wanted)
    }


def _legend(models: Mapping[str, object]) -> tuple[LegendKey, ...]:
    return tuple(LegendKey(name, VARIABLES[model_colour(name)]) for name in models)


def data_figures(manifest: DatasetManifest) -> list[ReportFigure]:
    """Lengths of the user sequences, and why events went to quarantine."""
    buckets = {
        f"{low}+" if low > 1 else "1": float(users)
        for low, users in sorted(manifest.length_histogram.items())
    }
    lengths = ReportFigure(
        "Events a user",
        svg_figure(
            lambda axes: _length_bars(axes, buckets), "lengths", "Users by number of events"
        ),
        f"Users by the number of their events; {manifest.num_events / manifest.num_users:.0f} on "
        "average.",
    )
    reasons = manifest.counts.quarantined
    if not reasons:
        return [lengths]
    ordered = sorted(reasons.items(), key=lambda entry: -entry[1])
    shown = {clipped(reason.replace("_", " "), 24): float(events) for reason, events in ordered}
    told = ", ".join(f"{name} {events:,.0f}" for name, events in shown.items())
    quarantine = ReportFigure(
        "Quarantined events",
        svg_figure(
            lambda axes: draw_bars(axes, shown, horizontal=True),
            "quarantine",
            f"Quarantined events by reason: {told}",
            height=max(1.2, 0.5 + 0.42 * len(shown)),
        ),
        f"Left out, with their reason, in the run's quarantine files: {told}.",
    )
    return [lengths, quarantine]


def _length_bars(axes: Axes, buckets: Mapping[str, float]) -> None:
    draw_bars(axes, buckets)
    axes.set_xlabel("events, up to the next bar's number")
    if len(buckets) > 8:
        axes.tick_params(axis="x", labelrotation=40)


def summary_png(results: Results, stages: Mapping[str, Sequence[MetricRow]], metric: str) -> bytes:
    """The picture of a run: loss, validation, and the models' test metrics side by side."""
    panels = [
        lambda axes: _loss_panel(axes, stages),
        lambda axes: _validation_panel(axes, stages, metric),
        lambda axes: _metrics_panel(axes, results),
    ]
    protocol = results.protocol
    seen = "seen items filtered" if protocol.filter_seen else "seen items kept"
    title = f"{results.name}, seed {results.seed}; {protocol.candidates}, {seen}"
    return png_figure(panels, clipped(title, 160))


def _loss_panel(axes: Axes, stages: Mapping[str, Sequence[MetricRow]]) -> None:
    axes.set_title("Pretraining loss")
    data = curve(stages.get("train", ()), "train/loss")
    if data is None:
        _absent(axes, "no loss was logged")
    else:
        draw_curve(axes, data, MODEL_COLOURS["pretrained"])


def _validation_panel(axes: Axes, stages: Mapping[str, Sequence[MetricRow]], metric: str) -> None:
    axes.set_title(f"{metric_label(metric)} on validation")
    begin = 0
    for stage, model in STAGE_MODEL.items():
        rows = stages.get(stage, ())
        data = curve(rows, f"validation/{metric}")
        if data is not None:
            shifted = Curve(data.steps + begin, data.values)
            draw_curve(axes, shifted, MODEL_COLOURS[model], smooth=False)
            axes.lines[-1].set_label({"train": "pretraining", "align": "alignment"}[stage])
        begin += max((row.step for row in rows), default=0)
    if not axes.lines:
        _absent(axes, "no validation was run")
    elif len(axes.lines) > 1:
        axes.legend(loc="lower right")
        axes.set_xlabel("optimizer step, alignment after pretraining")


def _metrics_panel(axes: Axes, results: Results) -> None:
    axes.set_title("Test metrics")
    available = [
        metric
        for metric in SUMMARY_METRICS
        if any(metric in results.metrics(name, "test") for name in results.models)
    ]
    models = _test_numbers(results, available) if available else {}
    if not models:
        _absent(axes, "nothing was measured on test")
        return
    draw_model_bars(axes, [metric_label(metric) for metric in available], models, numbers=True)
    axes.margins(y=0.24)
    axes.legend(loc="upper left", ncols=len(models), fontsize=8.5, columnspacing=1.2)


def _absent(axes: Axes, sentence: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, sentence, ha="center", va="center", color=INK, transform=axes.transAxes)
