"""The report's section about semantic ids: figures, a table and a sentence from their manifest."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from data_loaders.semantic_ids import SemanticIdManifest
from models.tokenizers.quality import QUERIES
from trainer.monitor.figures import LegendKey, ReportFigure
from trainer.monitor.plots import INK, MODEL_COLOURS, OTHER_MODEL, VARIABLES, draw_bars, svg_figure

LEVEL_COLOURS = (*MODEL_COLOURS.values(), OTHER_MODEL)
LEVELS_DRAWN = len(LEVEL_COLOURS)
"""Levels that get a curve of their own; of more (product quantizers), evenly chosen ones do."""


def tokenizer_sentence(manifest: SemanticIdManifest) -> str:
    """What the ids are made of, in words."""
    settings = manifest.settings
    if settings is None:
        how = "made elsewhere"
    else:
        sources = " and ".join(embedding.kind for embedding in settings.embeddings)
        how = f"{settings.quantizer.kind.replace('_', ' ')} of {sources} embeddings"
    sizes = " × ".join(f"{size:,}" for size in manifest.codebook_sizes)
    told = f"{manifest.num_items:,} items, codes {sizes}, {how}."
    if (new := manifest.report.get("new_items")) is None or new["reconstruction"] is None:
        return told
    return (
        f"{told} {new['items']:,} are new to this quantizer, which reconstructs them with an error "
        f"of {new['reconstruction']:.4f} of their variance (below: the items it was fitted to)."
    )


def tokenizer_rows(manifest: SemanticIdManifest) -> list[dict[str, str]]:
    """A row a level, for a table with the columns of its keys."""
    return [
        {
            "Level": str(number),
            "Codes": f"{level['codes']:,}",
            "Used": f"{level['utilisation']:.1%}",
            "Entropy": f"{level['normalized_entropy']:.3f}",
            "Gini": f"{level['gini']:.3f}",
            "Fewest items": f"{level['smallest']:,}",
            "Most items": f"{level['largest']:,}",
        }
        for number, level in enumerate(manifest.report.get("levels", ()), 1)
    ]


def tokenizer_figures(manifest: SemanticIdManifest) -> list[ReportFigure]:
    """Use of codes, collisions, reconstruction and neighbours; those that were measured."""
    report = manifest.report
    figures = []
    if report.get("levels"):
        figures += [_utilisation(report["levels"]), _sizes(report["levels"])]
    if "collisions" in report:
        figures += _collisions(report["collisions"])
    if "sample" in report:
        figures += [_reconstruction(report["sample"]), _neighbours(report["sample"])]
    return figures


def _utilisation(levels: Sequence[Mapping[str, Any]]) -> ReportFigure:
    used = {str(number): float(level["utilisation"]) for number, level in enumerate(levels, 1)}
    least = min(used, key=lambda number: used[number])
    caption = f"Least on level {least}: {used[least]:.1%}."
    svg = svg_figure(
        lambda axes: _share_bars(axes, used, "level"), "codes-used", f"Codes in use. {caption}"
    )
    return ReportFigure("Codes in use", svg, caption)


def _sizes(levels: Sequence[Mapping[str, Any]]) -> ReportFigure:
    chosen = np.unique(np.linspace(0, len(levels) - 1, LEVELS_DRAWN).round().astype(int))
    colours = dict(zip(chosen.tolist(), LEVEL_COLOURS, strict=False))

    def draw(axes: Axes) -> None:
        for index, colour in colours.items():
            level = levels[index]
            last = max(level["codes"] - 1, 1)
            places = [rank / last for rank in level["ranks"]]
            axes.plot(places, level["sizes"], color=colour, linewidth=2)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("share of the level's codes, most used first")
        axes.xaxis.set_major_locator(MaxNLocator(5))

    most = max(levels, key=lambda level: int(level["largest"]))
    caption = f"The most used code has {most['largest']:,} items."
    svg = svg_figure(draw, "code-sizes", f"Items a code by rank. {caption}")
    legend = tuple(LegendKey(f"level {i + 1}", VARIABLES[c]) for i, c in colours.items())
    return ReportFigure("Items a code", svg, caption, legend)


def _collisions(collisions: Mapping[str, Any]) -> list[ReportFigure]:
    groups = {
        size if size == "1" else f"{size}+": float(ids)
        for size, ids in sorted(collisions["groups"].items(), key=lambda entry: int(entry[0]))
    }
    caption = f"Ids as quantized, by how many items share them; at most {collisions['largest']:,}."

    def draw(axes: Axes) -> None:
        draw_bars(axes, groups)
        axes.set_xlabel("items of an id, up to the next bar's number")

    shared = svg_figure(draw, "collisions", caption)
    shares = {
        "as quantized": collisions["unique_before"],
        "in the table": collisions["unique_after"],
    }
    told = ", ".join(f"{share:.1%} {name}" for name, share in shares.items())
    own = svg_figure(
        lambda axes: _share_bars(axes, shares, ""), "own-ids", f"Items with an own id: {told}"
    )
    return [
        ReportFigure("Items that share an id", shared, caption),
        ReportFigure("Items with an id of their own", own, f"{told.capitalize()}."),
    ]


def _reconstruction(sample: Mapping[str, Any]) -> ReportFigure:
    errors = [float(error) for error in sample["reconstruction"]]
    labels = [str(n) for n in range(1, len(errors) + 1)] if len(errors) > 1 else ["all digits"]

    def draw(axes: Axes) -> None:
        bars = axes.bar(labels, errors, 0.72, color=MODEL_COLOURS["pretrained"])
        axes.bar_label(bars, [f"{error:.3f}" for error in errors], padding=3, color=INK)
        axes.set_xlabel("levels used" if len(errors) > 1 else "")
        axes.margins(y=0.15)

    caption = (
        f"Squared error over the variance of the embeddings, of codes as quantized: "
        f"{errors[-1]:.4f} with all levels, on "
        f"{sample['items']:,} items."
    )
    svg = svg_figure(draw, "reconstruction", f"Reconstruction error. {caption}")
    return ReportFigure("Reconstruction error", svg, caption)


def _neighbours(sample: Mapping[str, Any]) -> ReportFigure:
    near = sample["neighbours"]
    shares = {"nearest": near["first_code"], "by chance": near["random_first_code"]}
    caption = (
        f"{near['first_code']:.1%} of the nearest neighbours of "
        f"{min(sample['items'], QUERIES):,} items have their first code, "
        f"{near['random_first_code']:.1%} of items taken at random; neighbours share "
        f"{near['prefix_length']:.2f} leading codes."
    )
    svg = svg_figure(lambda axes: _share_bars(axes, shares, ""), "neighbours", caption)
    return ReportFigure("Neighbours with the same first code", svg, caption)


def _share_bars(axes: Axes, shares: Mapping[str, float], label: str) -> None:
    bars = axes.bar(list(shares), list(shares.values()), 0.72, color=MODEL_COLOURS["pretrained"])
    if len(shares) <= LEVELS_DRAWN + 1:
        axes.bar_label(bars, [f"{s:.1%}" for s in shares.values()], padding=3, color=INK)
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    axes.set_xlabel(label)
