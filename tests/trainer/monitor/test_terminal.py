"""Tables and recommendations as text."""

import re

from tests.trainer.monitor.invented import recommendations, results
from trainer.monitor.results import ModelResult, compare
from trainer.monitor.terminal import (
    change_cells,
    printable,
    render_changes,
    render_recommendations,
    render_table,
)


def line(text: str, label: str) -> str:
    return next(row for row in text.splitlines() if row.startswith(label))


def test_rises_and_falls_are_shown_alike() -> None:
    table = render_table(results())
    assert "0.1810   0.1860" in line(table, "HR@10 ") and "+0.0050 ▲" in line(table, "HR@10 ")
    assert line(table, "HR@10 tail").endswith("-0.0049 ▼   -5.5%")
    assert "0.0000 =" in line(table, "Coverage@200")
    assert "test, full catalogue, seen items filtered, seed 7" in table


def test_columns_line_up() -> None:
    table = render_table(results())
    ends = {row.index(".", 20) for row in table.splitlines() if re.match(r"(HR|NDCG|MRR|Cov)", row)}
    assert len(ends) == 1


def test_models_that_were_not_measured_have_a_dash() -> None:
    models = {"popularity": ModelResult(), "pretrained": ModelResult(test={"mrr": 0.25})}
    table = render_table(results(models=models))
    assert line(table, "MRR").split() == ["MRR", "-", "0.2500"]
    assert "aligned" not in table
    assert "nothing was measured on validation" in render_table(
        results(models=models), "validation"
    )


def test_what_rounds_to_nothing_has_no_sign() -> None:
    assert change_cells(-0.00001, -0.5)[0] == "0.0000 ="
    assert change_cells(None, None) == ["-", ""]


def test_recommendations_number_their_titles() -> None:
    text = render_recommendations(recommendations())
    assert text.count("recommended:") == 3 and text.startswith("user 1, last events:")
    assert re.search(r"^   1\.  Invented film 1 +0\.8990$", text, re.MULTILINE)
    assert re.search(r"^  10\.  Invented film 10 +0\.6200$", text, re.MULTILINE)


def test_titles_cannot_steer_the_terminal_and_long_ones_are_cut() -> None:
    hostile = "\x1b[2Jevil\r\n\u202e" + "長" * 60
    text = render_recommendations(recommendations(hostile))
    assert not set("\x1b\r\u202e") & set(text)
    assert "…" in text
    widths = {len(row) + row.count("長") for row in text.splitlines() if "0.8" in row}
    assert len(widths) == 1  # wide characters are two cells, so scores still line up
    assert printable("Amélie (2001)") == "Amélie (2001)"


def test_comparisons_are_listed() -> None:
    text = render_changes(compare(results(), results()))
    assert line(text, "aligned").endswith("0.0000 =")
