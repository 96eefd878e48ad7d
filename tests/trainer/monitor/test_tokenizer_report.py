"""The section about semantic ids shows what was measured and nothing else."""

import numpy as np
import pytest

from data_loaders.manifest import seal
from data_loaders.semantic_ids import SemanticIdManifest
from tests.trainer.monitor import invented
from trainer.codes_report import POINTS, summarize_codes, usage_report
from trainer.monitor.report import render_report
from trainer.monitor.tokenizer_report import (
    tokenizer_figures,
    tokenizer_rows,
    tokenizer_sentence,
)

USAGE = [np.array([4, 0, 1, 5]), np.array([10])]


def manifest(levels: int = 1, **more: object) -> SemanticIdManifest:
    report = usage_report(USAGE * levels) | {
        "collisions": {
            "groups": {"1": 6, "2": 2}, "unique_before": 0.6, "unique_after": 1.0,
            "distinct_before": 0.8, "largest": 3, "moved": 0, "remaining": 0,
        },
    }  # fmt: skip
    return seal(
        SemanticIdManifest, data="d", tokenizer="t" * 64, num_items=10,
        codebook_sizes=(4, 1) * levels, parts=(), report=report | more,
    )  # fmt: skip


SAMPLE = {
    "items": 10,
    "reconstruction": [0.5, 0.25],
    "neighbours": {"first_code": 0.75, "prefix_length": 1.5, "random_first_code": 0.125},
}


def test_every_measure_has_a_figure_with_its_number() -> None:
    figures = tokenizer_figures(manifest(sample=SAMPLE))
    captions = {figure.title: figure.caption for figure in figures}
    assert captions["Codes in use"] == "Least on level 1: 75.0%."
    assert "10 items" in captions["Items a code"]
    assert "at most 3" in captions["Items that share an id"]
    assert captions["Items with an id of their own"].startswith("60.0% as quantized, 100.0%")
    assert "0.2500 with all levels" in captions["Reconstruction error"]
    assert "75.0%" in captions["Neighbours with the same first code"]
    assert len({figure.svg for figure in figures}) == len(figures) == 6
    assert all(figure.svg.startswith("<svg") for figure in figures)


@pytest.mark.parametrize("levels", [1, 2, 16])
def test_any_number_of_levels_is_drawn(levels: int) -> None:
    figures = tokenizer_figures(manifest(levels))
    assert [figure.title for figure in figures][:2] == ["Codes in use", "Items a code"]
    assert len(figures) == 4  # nothing was sampled
    assert len(tokenizer_rows(manifest(levels))) == 2 * levels


def test_words_and_rows() -> None:
    assert tokenizer_sentence(manifest()) == "10 items, codes 4 × 1, made elsewhere."
    first = tokenizer_rows(manifest())[0]
    assert first["Used"] == "75.0%" and first["Most items"] == "5"
    text = summarize_codes(manifest(sample=SAMPLE))
    assert "level 1:   75.0% of 4 codes used" in text and "60.0% as quantized" in text


def test_sizes_of_large_codebooks_are_thinned() -> None:
    counts = np.random.default_rng(0).integers(0, 50, 8192)
    [level] = usage_report([counts])["levels"]
    assert len(level["sizes"]) == len(level["ranks"]) == POINTS
    assert level["sizes"][0] == counts.max() == level["largest"]
    assert level["sizes"][-1] == counts.min() == level["smallest"]
    assert level["sizes"] == sorted(level["sizes"], reverse=True)


def test_the_report_of_a_run_shows_its_semantic_ids() -> None:
    results = invented.results()
    html = render_report(results, {}, None, None, manifest(sample=SAMPLE))
    assert "Semantic ids</h2>" in html and "10 items, codes 4 × 1, made elsewhere." in html
    assert html.count("<figure>") == render_report(results, {}, None, None).count("<figure>") + len(
        tokenizer_figures(manifest(sample=SAMPLE))
    )
    assert "Semantic ids</h2>" not in render_report(results, {}, None, None)
