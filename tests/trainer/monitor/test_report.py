"""The report: complete, self-contained, escaped, and honest about what is missing."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from configs.layout import RunLayout
from configs.storage import write_json
from tests.trainer.monitor import invented
from trainer.monitor.plots import (
    Curve,
    curve,
    draw_bars,
    draw_curve,
    smoothed,
    svg_figure,
    thinned,
)
from trainer.monitor.report import render_report, write_report
from trainer.monitor.results import ModelResult, SelectedPolicy
from trainer.monitor.tracker import MetricRow, read_rows

HOSTILE = '</svg></style><script>alert("$x^2$")</script>&<img src=x onerror=1>'


class Document(HTMLParser):
    """Tags, ids and references of a document."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr", "path", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"unclosed {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"event handler {name}"
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "xlink:href", "src", "aria-labelledby"):
                self.targets.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunLayout]:
    run = RunLayout(str(tmp_path_factory.mktemp("run")))
    invented.manifest(run.data)
    write_json(run.results, invented.results().model_dump(mode="json"))
    write_json(run.recommendations, invented.recommendations().model_dump(mode="json"))
    invented.log_training(run.metrics("train", "f" * 64))
    invented.log_alignment(run.metrics("align", "f" * 64))
    yield run


@pytest.fixture(scope="module")
def written(layout: RunLayout) -> dict[str, str]:
    return write_report(layout, {s: layout.metrics(s, "f" * 64) for s in ("train", "align")})


def test_an_alignment_that_kept_nothing_claims_no_effect(layout: RunLayout) -> None:
    rows = {"align": read_rows(layout.metrics("align", "f" * 64))}

    def told(step: int) -> str:
        selected = SelectedPolicy(step=step, selected_on="guardrails")
        results = invented.results().model_copy(update={"selected": selected})
        return render_report(results, rows, None, None)

    nothing, some = told(0), told(60)
    assert "alignment raises" in some and "No aligned policy kept" not in some
    assert "alignment raises" not in nothing
    assert (
        nothing.count("No aligned policy is known to keep the limits") == 2
    )  # on top, and of the stage
    assert "selected step 60 (guardrails)" in some


def test_the_reward_is_held_against_the_metric_that_is_watched() -> None:
    """Which is not the one that selects."""
    rows = [
        MetricRow(
            step,
            0.0,
            {"train/reward": step, "validation/mrr": step / 9, "validation/hr@50": 1 / step},
        )
        for step in (1, 2, 3)
    ]
    results = invented.results()
    chosen = {"kind": "grpo", "validation": {"metric": "mrr"}}
    for watched, told in ((None, "MRR on validation"), ("hr@50", "HR@50 on validation")):
        guardrails = {"divergence": watched and {"metric": watched}}
        recipe = results.recipe | {"alignment": chosen | {"guardrails": guardrails}}
        changed = results.model_copy(update={"recipe": recipe})
        text = render_report(changed, {"align": rows}, None, None)
        assert f"{told} from" in text and ("may be hacked" in text) == (watched is not None)


def test_the_report_tells_everything(written: dict[str, str]) -> None:
    document = Document(Path(written["report"]).read_text())
    for part in (
        "invented numbers",
        "HSTU on 943 users, 1,682 items and 99,000 events, seed 7",
        "alignment raises 12 of 21 numbers, lowers 5 and leaves 4",
        "−0.0049 ▼",
        "NDCG@10 on validation",
        "Preference margin in training",
        "4,210 preference pairs of 601 users, 455 of the pairs held out, from 9,876 candidates "
        "among 5,000 liked, 1,200 disliked and 800 other events, 3,456 liked, 78 disliked and 9 "
        "other impressions of the log",
        "100,000 events were read, 99,000 kept, 1,000 quarantined",
        "null timestamp 212",
        "Invented film 10",
        "a1" * 32,
        "torch 2.13.0",
        "global_batch: 128",
    ):
        assert part in document.text, part
    assert document.tags.count("svg") == 3 + 3 + 5 + 2
    assert document.tags.count("figcaption") == document.tags.count("svg")


def test_the_report_needs_nothing_from_outside(written: dict[str, str]) -> None:
    text = Path(written["report"]).read_text()
    document = Document(text)
    assert not {"script", "link", "iframe", "object", "img"} & set(document.tags)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    ids = set(document.ids)
    assert len(ids) == len(document.ids), "ids are unique"
    assert {t.removeprefix("#") for t in document.targets} <= ids, "references stay inside"
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert not re.search(r"(fill|stroke): #", text), "every colour follows the scheme"


def test_the_picture_is_a_png_of_its_size(written: dict[str, str]) -> None:
    data = Path(written["picture"]).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
    assert (width, height) == (2760, 720)


def test_text_of_the_data_is_never_markup(layout: RunLayout) -> None:
    results = invented.results(
        name=HOSTILE, versions={HOSTILE: HOSTILE}, recipe={"model": {"kind": HOSTILE}}
    )
    models = {HOSTILE: results.models["pretrained"], "pretrained": results.models["pretrained"]}
    manifest = invented.manifest("memory://hostile")
    counts = manifest.counts.model_copy(update={"quarantined": {HOSTILE: 3}})
    rows = read_rows(layout.metrics("train", "f" * 64))
    html = render_report(
        results.model_copy(update={"models": models}),
        {"train": rows},
        manifest.model_copy(update={"counts": counts, "name": HOSTILE}),
        invented.recommendations(HOSTILE + "\x00\u202e"),
    )
    document = Document(html)
    assert not {"script", "img"} & set(document.tags)
    assert document.tags.count("style") == 1
    assert document.text.count('<script>alert("$x^2$")') > 20
    assert "\x00" not in html and "\u202e" not in html


def test_a_bare_run_has_a_report_too() -> None:
    run = RunLayout("memory://bare-run")
    models = {"pretrained": ModelResult(validation={"ndcg@10": 0.1, "users": 9.0})}
    content = invented.results(models=models, preferences=None)
    write_json(run.results, content.model_dump(mode="json"))
    written = write_report(run, {"train": run.metrics("train", "0" * 64)})
    html = render_report(content, {"train": []}, None, None)
    assert written["report"].startswith("memory://")
    assert "Nothing was measured on test." in html
    assert "This stage left no record of its steps." in html
    assert "Sample recommendations" not in html and "Alignment" not in Document(html).text


def test_svg_is_well_formed_and_themed() -> None:
    svg = svg_figure(lambda axes: draw_bars(axes, {HOSTILE: 3.0, "b": 1.0}), "x", HOSTILE)
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label") == HOSTILE
    assert root.get("width") is None and root.get("viewBox")
    assert "var(--pretrained)" in svg and "DejaVu" not in svg


def test_curves_leave_out_what_is_not_finite() -> None:
    rows = [MetricRow(s, 0.0, {"loss": v}) for s, v in ((1, 2.0), (2, float("nan")), (3, 1.0))]
    found = curve([*rows, MetricRow(4, 0.0, {"other": 1.0})], "loss")
    assert found is not None and found.steps.tolist() == [1, 3] and found.last == 1.0
    assert curve(rows, "absent") is None


def test_thinning_keeps_the_mean_and_the_end() -> None:
    long = Curve(np.arange(1, 10_001), np.linspace(5.0, 1.0, 10_000))
    short = thinned(long, 100)
    assert len(short.steps) == 100 and short.steps[-1] == 10_000
    assert short.values.mean() == pytest.approx(long.values.mean())


def test_smoothing_neither_lags_nor_moves_a_line() -> None:
    line = Curve(np.arange(50), np.linspace(9.0, 2.0, 50))
    even = smoothed(line)
    np.testing.assert_allclose(even.values[:-6], line.values[:-6])
    assert even.values[0] == 9.0


@pytest.mark.parametrize(
    "steps", [[1], [0], [7], [1, 2], [0, 1, 2], [3, 4], [12_000, 12_040], [1, 1_000_000]]
)
def test_ticks_are_whole_steps_each_once(steps: list[int]) -> None:
    axes = Figure(figsize=(4.6, 2.9), layout="constrained").subplots()
    draw_curve(axes, Curve(np.array(steps), np.linspace(0.1, 0.2, len(steps))), "#2f6fde")
    low, high = axes.get_xlim()
    places = [place for place in axes.get_xticks() if low <= place <= high]
    labels = axes.xaxis.get_major_formatter().format_ticks(places)
    assert places and all(place == round(place) for place in places)
    assert len(set(labels)) == len(labels) <= 6


def test_values_that_hardly_differ_are_not_told_as_offsets() -> None:
    axes = Figure(figsize=(4.6, 2.9)).subplots()
    draw_curve(axes, Curve(np.array([1, 2]), np.array([0.1234, 0.12345])), "#2f6fde")
    axes.figure.canvas.draw()
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert all(label.get_text().startswith("0.123") for label in axes.get_yticklabels())
