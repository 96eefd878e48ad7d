"""The report of a run: one self-contained HTML file and one picture, made from the run's files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from configs.layout import RunLayout
from configs.storage import exists, join, write_bytes
from data_loaders.manifest import MANIFEST, DatasetManifest, read_manifest
from data_loaders.semantic_ids import SemanticIdManifest, read_semantic_id_manifest
from trainer.monitor.alignment_report import reward_sentence, training_numbers
from trainer.monitor.figures import (
    ReportFigure,
    bar_figures,
    calibration_of,
    data_figures,
    metric_label,
    stage_figures,
    summary_png,
)
from trainer.monitor.notes import alarm_sentences, nothing_kept, sampling_note
from trainer.monitor.plots import curve
from trainer.monitor.progress import count
from trainer.monitor.results import (
    Part,
    Recommendations,
    Results,
    TableRow,
    read_recommendations,
    read_results,
    table_rows,
)
from trainer.monitor.terminal import change_cells, printable
from trainer.monitor.tokenizer_report import (
    tokenizer_figures,
    tokenizer_rows,
    tokenizer_sentence,
)
from trainer.monitor.tracker import MetricRow, read_rows

REPORT_FILE, PICTURE_FILE = "report.html", "report.png"
TEMPLATES = Path(__file__).parent / "templates"
STAGE_TITLES = {"train": "Pretraining", "align": "Alignment"}
KEY_METRICS = ("ndcg@10", "hr@10", "coverage@10", "preference_accuracy", "auc")
DEFAULT_METRIC = "ndcg@10"


def write_report(
    layout: RunLayout, metrics: Mapping[str, str], semantic_ids: str | None = None
) -> dict[str, str]:
    """Write `report.html` and `report.png` into the run's directory.

    Args:
        layout: where the run's results, recommendations and data lie; what is absent (other than
            results) is left out of the report.
        metrics: stage (`train`, `align`) → directory of its tracker.
        semantic_ids: directory of the items' semantic ids, if they have any.

    Returns:
        `report` and `picture`: the URLs written.

    Raises:
        ValueError: a file of the run is damaged; the sentence names it.
    """
    results = read_results(layout.results)
    stages = {stage: read_rows(url) for stage, url in metrics.items()}
    has_data = exists(join(layout.data, MANIFEST))
    html = render_report(
        results,
        stages,
        read_manifest(layout.data) if has_data else None,
        read_recommendations(layout.recommendations) if exists(layout.recommendations) else None,
        None if semantic_ids is None else read_semantic_id_manifest(semantic_ids),
    )
    picture = summary_png(results, stages, _selection_metric(results, "train"))
    report_url, picture_url = join(layout.root, REPORT_FILE), join(layout.root, PICTURE_FILE)
    write_bytes(picture_url, picture)
    write_bytes(report_url, html.encode())
    return {"report": report_url, "picture": picture_url}


def render_report(
    results: Results,
    stages: Mapping[str, Sequence[MetricRow]],
    manifest: DatasetManifest | None,
    recommendations: Recommendations | None,
    semantic_ids: SemanticIdManifest | None = None,
) -> str:
    """The HTML document. Everything that stems from data is escaped by the template engine."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else _text(value),
    )
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(
        css=Markup(css),  # noqa: S704 - our own file
        name=results.name,
        subtitle=_subtitle(results, manifest),
        keys=[key for metric in KEY_METRICS if (key := _key(results, metric))],
        protocol_sentence=_protocol_sentence(results),
        verdict=_verdict(results),
        test=_table(results, "test"),
        validation=_table(results, "validation"),
        note=sampling_note(results, "test"),
        bars=_embedded([*bar_figures(results), *calibration_of(results)]),
        stages=[_stage(results, stage, rows) for stage, rows in stages.items()],
        recommendations=_recommendations(recommendations),
        semantic_ids=None if semantic_ids is None else _semantic_ids(semantic_ids),
        data=None if manifest is None else _data(manifest),
        provenance=_provenance(results, manifest),
        recipe=yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True),
    )


def _text(value: object) -> object:
    """Strings of the data lose control characters; line breaks (the recipe's) stay."""
    if not isinstance(value, str):
        return value
    return "\n".join(printable(line) for line in value.split("\n"))


def _subtitle(results: Results, manifest: DatasetManifest | None) -> str:
    model = str(results.recipe["model"]["kind"]).upper()
    if manifest is None:
        return f"{model}, seed {results.seed}"
    return (
        f"{model} on {manifest.num_users:,} users, {manifest.num_items:,} items and "
        f"{manifest.num_events:,} events, seed {results.seed}"
    )


def _key(results: Results, metric: str) -> dict[str, Any] | None:
    """A number worth a large font: the newest model's, with its change and its neighbours."""
    numbers = {m: results.metrics(m, "test").get(metric) for m in results.ordered_models()}
    known = {model: value for model, value in numbers.items() if value is not None}
    if not known:
        return None
    shown = "aligned" if "aligned" in known else list(known)[-1]
    others = [f"{model} {value:.4f}" for model, value in known.items() if model != shown]
    delta = known[shown] - known["pretrained"] if {shown, "pretrained"} <= known.keys() else None
    return {
        "label": f"{metric_label(metric)}, {shown}".replace("preference", "Preference"),
        "value": f"{known[shown]:.4f}",
        "change": None if shown == "pretrained" else _change(delta),
        "beside": ", ".join(reversed(others)),
    }


def _change(delta: float | None) -> dict[str, str] | None:
    if delta is None:
        return None
    level = round(delta, 4) == 0
    direction = "level" if level else "rise" if delta > 0 else "fall"
    return {"text": change_cells(delta, None)[0].replace("-", "−"), "direction": direction}


def _protocol_sentence(results: Results) -> str:
    protocol = results.protocol
    if protocol.candidates == "logged events":
        return (
            f"Judged on what users did with held-out events, {protocol.candidates_per_request} of "
            "them after one history; the log's own system chose these events, so that the numbers "
            "hold for what such a system shows."
        )
    split = {
        "leave_last_out": "each user's last item is the target",
        "global_time": "targets are the first items after one point in time",
    }[str(protocol.split["kind"])]
    seen = "are not" if protocol.filter_seen else "are"
    return (
        f"Ranked against the {protocol.candidates}, without sampling; {split}, and items that the "
        f"user has seen {seen} candidates."
    )


def _verdict(results: Results) -> str | None:
    """What alignment did to all metrics, counted, if there is an aligned policy."""
    nothing = nothing_kept(results)
    if nothing is not None:
        return nothing
    deltas = [row.delta for row in table_rows(results, "test") if row.delta is not None]
    if not deltas:
        return None
    rises = sum(round(delta, 4) > 0 for delta in deltas)
    falls = sum(round(delta, 4) < 0 for delta in deltas)
    return (
        f"Against the pretrained model, alignment raises {rises} of {len(deltas)} numbers, lowers "
        f"{falls} and leaves {len(deltas) - rises - falls} as they were."
    )


def _table(results: Results, part: Part) -> dict[str, Any] | None:
    rows = table_rows(results, part)
    if not rows:
        return None
    models = results.ordered_models()
    changed = any(row.delta is not None for row in rows)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(_table_row(row, models))
    return {
        "caption": f"Metrics of every model on {part}",
        "models": models,
        "changed": changed,
        "columns": 1 + len(models) + (2 if changed else 0),
        "groups": [{"name": name, "rows": members} for name, members in groups.items()],
    }


def _table_row(row: TableRow, models: Sequence[str]) -> dict[str, Any]:
    values = [row.values[model] for model in models]
    return {
        "label": row.label,
        "cells": ["–" if value is None else f"{value:.4f}" for value in values],
        "change": _change(row.delta),
        "relative": change_cells(row.delta, row.relative)[1].replace("-", "−"),
    }


def _embedded(figures: Sequence[ReportFigure]) -> list[dict[str, Any]]:
    # The SVG is our renderer's own output, in which texts of the data are already escaped.
    return [{**vars(figure), "svg": Markup(figure.svg)} for figure in figures]  # noqa: S704


def _selection_metric(results: Results, stage: str) -> str:
    block = results.recipe.get("training" if stage == "train" else "alignment") or {}
    validation = block.get("validation") or {}
    return str(validation.get("metric", DEFAULT_METRIC))


def _wanted_metric(results: Results) -> str:
    """What a reward must not rise against: the divergence guardrail's metric, if there is one."""
    guardrails = (results.recipe.get("alignment") or {}).get("guardrails") or {}
    divergence = guardrails.get("divergence") or {}
    return str(divergence.get("metric", _selection_metric(results, "align")))


def _stage(results: Results, stage: str, rows: Sequence[MetricRow]) -> dict[str, Any]:
    metric = _selection_metric(results, stage)
    return {
        "id": f"stage-{stage}",
        "title": STAGE_TITLES[stage],
        "sentence": _stage_sentence(results, stage, rows),
        "alarms": alarm_sentences(results) if stage == "align" else (),
        "reward": reward_sentence(rows, _wanted_metric(results)) if stage == "align" else None,
        "numbers": training_numbers(rows) if stage == "align" else [],
        "figures": _embedded(stage_figures(stage, rows, metric)),
    }


def _stage_sentence(results: Results, stage: str, rows: Sequence[MetricRow]) -> str:
    if not rows:
        return "This stage left no record of its steps."
    parts = [f"{max(row.step for row in rows):,} optimizer steps"]
    if stage == "align" and results.selected is not None:
        parts.append(f"selected step {results.selected.step:,} ({results.selected.selected_on})")
    if stage == "align" and results.preferences is not None:
        pairs = results.preferences
        parts.append(
            f"{pairs.pairs:,} preference pairs of {pairs.users:,} users, "
            f"{pairs.validation_pairs:,} of the pairs held out, "
            f"from {pairs.candidates:,} candidates among {pairs.liked:,} "
            f"liked, {pairs.disliked:,} disliked and {pairs.neither:,} other events"
        )
    if stage == "align" and results.impressions is not None:
        seen = results.impressions
        parts.append(
            f"{seen.liked:,} liked, {seen.disliked:,} disliked and {seen.neither:,} other "
            "impressions of the log"
        )
    speed, mfu = curve(rows, "speed/tokens_per_s"), curve(rows, "speed/mfu")
    if speed is not None:
        parts.append(f"{count(float(speed.values.mean()))} tokens/s on average")
    if mfu is not None:
        parts.append(
            f"MFU {mfu.values.mean():.1%} (peak: a matrix product measured on the same device)"
        )
    return ", ".join(parts) + "."


def _recommendations(recommendations: Recommendations | None) -> dict[str, Any] | None:
    if recommendations is None or not recommendations.users:
        return None
    return {
        "users": [
            {
                "user": user.user,
                "history": user.newest(),
                "offers": [{"title": t, "score": f"{score:.4f}"} for t, score in user.offers()],
            }
            for user in recommendations.users
        ]
    }


def _semantic_ids(manifest: SemanticIdManifest) -> dict[str, Any]:
    return {
        "sentence": tokenizer_sentence(manifest),
        "rows": tokenizer_rows(manifest),
        "figures": _embedded(tokenizer_figures(manifest)),
    }


def _data(manifest: DatasetManifest) -> dict[str, Any]:
    counts = manifest.counts
    bad = sum(counts.quarantined.values())
    sentence = f"{counts.read:,} events were read, {counts.kept:,} kept, {bad:,} quarantined"
    for number, reason in (
        (counts.below_min_rating, "rated too low"),
        (counts.core_removed, "of users or items with too few events"),
    ):
        sentence += f", {number:,} {reason}" if number else ""
    return {"sentence": f"{sentence}.", "figures": _embedded(data_figures(manifest))}


def _provenance(results: Results, manifest: DatasetManifest | None) -> list[dict[str, str]]:
    entries = {
        "Recipe": results.name,
        "Seed": str(results.seed),
        "Protocol fingerprint": results.protocol.fingerprint,
        "Data fingerprint": results.protocol.data,
        "Semantic ids fingerprint": results.semantic_ids,
        "Data set": None if manifest is None else manifest.name,
        **{
            f"Checkpoint, {model}": results.models[model].checkpoint
            for model in results.ordered_models()
        },
        "Versions": ", ".join(f"{name} {text}" for name, text in results.versions.items()),
    }
    return [{"label": label, "value": value} for label, value in entries.items() if value]
