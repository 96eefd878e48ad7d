"""Figures of a run. One drawing serves both as a picture file and as SVG inside the report.

In SVG each colour becomes a CSS variable (`var(--ink)`, `var(--aligned)`, …) and text stays text,
so that the report's light and dark schemes, fonts and print style reach into the figures.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, MaxNLocator

from trainer.monitor.progress import count
from trainer.monitor.tracker import MetricRow

# Every colour is used for one role only: its hex is what `to_svg` looks for.
PAPER, INK, MUTED, RULE = "#fdfdfc", "#1d2126", "#656d76", "#dfe2e6"
MODEL_COLOURS = {"popularity": "#9aa1ab", "pretrained": "#2f6fde", "aligned": "#d9620d"}
OTHER_MODEL = "#17877d"
VARIABLES = {
    PAPER: "paper",
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    OTHER_MODEL: "other",
    **{colour: name for name, colour in MODEL_COLOURS.items()},
}
POINTS = 400
"""Most points a curve is drawn with; longer ones are averaged in equal bins."""
LONG = 12
"""Points from which on a noisy curve is shown with its moving average."""
STYLE: dict[str, object] = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "tandem",
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name of the data is a dollar sign
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Curve:
    """Numbers over optimizer steps."""

    steps: np.ndarray
    """int64 [n], ascending."""
    values: np.ndarray
    """float64 [n]; not finite values are left out."""

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])

    @property
    def highest(self) -> tuple[int, float]:
        """Step and value of the largest."""
        at = int(np.argmax(self.values))
        return int(self.steps[at]), float(self.values[at])


def curve(rows: Sequence[MetricRow], tag: str) -> Curve | None:
    """What a stage logged under a tag; None if nothing finite."""
    found = [(row.step, row.values[tag]) for row in rows if tag in row.values]
    table = np.array(found, dtype=np.float64).reshape(-1, 2)
    table = table[np.isfinite(table[:, 1])]
    return Curve(table[:, 0].astype(np.int64), table[:, 1]) if len(table) else None


def thinned(long: Curve, points: int = POINTS) -> Curve:
    """At most `points` of a curve, each the mean of an equal share of its steps."""
    if len(long.steps) <= points:
        return long
    edges = np.linspace(0, len(long.steps), points + 1).astype(np.int64)
    sizes = np.diff(edges)
    means = np.add.reduceat(long.values, edges[:-1]) / sizes
    return Curve(long.steps[edges[1:] - 1], means)


def smoothed(noisy: Curve, reach: int = 6) -> Curve:
    """Mean over up to `reach` points to each side: equally many at the steep start, so that
    nothing lags, and as many as there are at the end, so that the last point's noise is not told
    as a trend.
    """
    place = np.arange(len(noisy.values))
    before = np.minimum(reach, place)
    after = np.minimum(before, place[::-1])
    total = np.concatenate([[0.0], np.cumsum(noisy.values)])
    first, end = place - before, place + after + 1
    return Curve(noisy.steps, (total[end] - total[first]) / (end - first))


def model_colour(name: str) -> str:
    """The colour that stands for a model in every figure."""
    return MODEL_COLOURS.get(name, OTHER_MODEL)


class StepFormatter(Formatter):
    """Steps in three digits, or in all of them where three do not tell the ticks apart."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return count(x)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """One label a tick."""
        short = [count(value) for value in values]
        distinct = len(set(short)) == len(short)
        return short if distinct else [f"{value:,.0f}" for value in values]


def draw_curve(axes: Axes, data: Curve, colour: str, smooth: bool = True) -> None:
    """A curve over steps; a long noisy one is pale, with its moving average on top."""
    short = thinned(data)
    averaged = smooth and len(short.steps) >= LONG
    if averaged:
        axes.plot(short.steps, short.values, color=colour, alpha=0.3, linewidth=1)
        short = smoothed(short)
    markers = "o" if len(short.steps) < 25 and not averaged else None
    axes.plot(short.steps, short.values, color=colour, linewidth=2, marker=markers, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_formatter(StepFormatter())
    # By default a run of one or two steps would get ticks between them to fill the axis.
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="y", useOffset=False)  # a number of its own at every tick


def draw_highest(axes: Axes, data: Curve, colour: str) -> None:
    """Mark the largest value with its number."""
    step, value = data.highest
    axes.plot([step], [value], "o", markersize=8, markerfacecolor=PAPER, color=colour, mew=2)
    axes.margins(y=0.18)
    early = step < (data.steps[0] + data.steps[-1]) / 2
    axes.annotate(
        f"highest {value:.4f}",
        (step, value),
        xytext=(6 if early else -6, 8),
        textcoords="offset points",
        ha="left" if early else "right",
        color=INK,
    )


def draw_model_bars(
    axes: Axes, labels: Sequence[str], models: Mapping[str, Sequence[float]], numbers: bool
) -> None:
    """Groups of bars: one group a label, in it one bar a model, with its number on top if asked."""
    width = 0.8 / max(len(models), 1)
    for index, (name, values) in enumerate(models.items()):
        places = np.arange(len(labels)) + (index - (len(models) - 1) / 2) * width
        bars = axes.bar(places, values, width * 0.92, color=model_colour(name), label=name)
        if numbers:
            shown = [f"{value:.3f}".lstrip("0") if value < 1 else "1" for value in values]
            axes.bar_label(bars, shown, padding=2, fontsize=8, color=INK)
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def draw_bars(axes: Axes, values: Mapping[str, float], horizontal: bool = False) -> None:
    """Counts by label, with their numbers."""
    labels, sizes = list(values), list(values.values())
    colour = MODEL_COLOURS["pretrained"]
    bars = (axes.barh if horizontal else axes.bar)(labels, sizes, 0.72, color=colour)
    axes.bar_label(bars, [count(size) for size in sizes], padding=3, fontsize=8.5, color=INK)
    value_axis, name_axis = (axes.xaxis, axes.yaxis) if horizontal else (axes.yaxis, axes.xaxis)
    value_axis.set_visible(False)
    axes.grid(visible=False)
    name_axis.set_tick_params(length=0, labelcolor=INK)
    if horizontal:
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.spines["bottom"].set_visible(False)
    else:
        axes.margins(y=0.12)


Draw = Callable[[Axes], None]


def svg_figure(draw: Draw, name: str, label: str, height: float = 2.9) -> str:
    """Draw one figure as an `<svg>` for the report; it takes the width of what holds it.

    Args:
        draw: receives the axes.
        name: distinguishes the ids of this figure from others in the same document.
        label: what a screen reader says.
        height: inches, at a width of 4.6.
    """
    with matplotlib.rc_context({**STYLE, "font.size": 11}):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        draw(figure.subplots())
        stream = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)
    return _themed(stream.getvalue(), name, label)


def _themed(document: str, name: str, label: str) -> str:
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("font-family: 'DejaVu Sans'; ", "")
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(label)}">{body}'


def png_figure(draws: Sequence[Draw], title: str, height: float = 3.6) -> bytes:
    """Draw panels side by side as a PNG in the light scheme, 200 dots an inch."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(draws), height), layout="constrained", dpi=200)
        figure.suptitle(title, x=0.006, ha="left", fontsize=10, color=MUTED)
        for draw, axes in zip(draws, np.atleast_1d(figure.subplots(1, len(draws))), strict=True):
            draw(axes)
        stream = io.BytesIO()
        FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
