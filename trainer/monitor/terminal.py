"""Results and recommendations as plain text for a terminal."""

import unicodedata
from collections.abc import Sequence

from trainer.monitor.notes import alarm_sentences, sampling_note
from trainer.monitor.results import (
    Change,
    Part,
    Recommendations,
    Results,
    TableRow,
    UserRecommendations,
    table_rows,
)

TITLE_CELLS = 56
INDENT = "  "


def render_table(results: Results, part: Part = "test") -> str:
    """Metrics × models, with what alignment changed, rises and falls alike.

    Args:
        results: what an evaluation left.
        part: which targets the numbers are about.

    Returns:
        Lines without a final line break.
    """
    models = results.ordered_models()
    rows = table_rows(results, part)
    if not rows:
        return f"{results.name}: nothing was measured on {part}."
    changed = any(row.delta is not None for row in rows)
    header = ["", *models, *(["aligned - pretrained", ""] if changed else [])]
    cells = [header, *([row.label, *_numbers(row, models, changed)] for row in rows)]
    lines = _aligned(cells)
    body = [lines[0], "─" * max(map(len, lines))]
    for index, row in enumerate(rows):
        if index and rows[index - 1].group != row.group:
            body.append("")
        body.append(lines[index + 1])
    note = sampling_note(results, part)
    notes = [*([note] if note else []), *map(printable, alarm_sentences(results))]
    return "\n".join([_caption(results, part), "", *body, *(["", *notes] if notes else [])])


def _caption(results: Results, part: Part) -> str:
    protocol = results.protocol
    seen = "seen items filtered" if protocol.filter_seen else "seen items kept"
    if protocol.candidates_per_request is not None:
        seen = f"{protocol.candidates_per_request} a request"
    return (
        f"{results.name}: {part}, {protocol.candidates}, {seen}, seed {results.seed}, "
        f"protocol {protocol.fingerprint[:12]}"
    )


def _numbers(row: TableRow, models: Sequence[str], changed: bool) -> list[str]:
    values = [row.values[model] for model in models]
    shown = ["-" if value is None else f"{value:.4f}" for value in values]
    return [*shown, *(change_cells(row.delta, row.relative) if changed else [])]


def change_cells(delta: float | None, relative: float | None) -> list[str]:
    """A change as two cells: `+0.0123 ▲` and `+4.1%`; no sign where it rounds to nothing."""
    if delta is None:
        return ["-", ""]
    if round(delta, 4) == 0:
        return ["0.0000 =", ""]
    arrow = "▲" if delta > 0 else "▼"
    return [f"{delta:+.4f} {arrow}", "" if relative is None else f"{relative:+.1%}"]


def render_changes(changes: Sequence[Change]) -> str:
    """What `compare` found, a line a metric."""
    header = ["model", "metric", "before", "after", "change"]
    rows = [
        [c.model, c.metric, f"{c.before:.4f}", f"{c.after:.4f}", change_cells(c.delta, None)[0]]
        for c in changes
    ]
    return "\n".join(_aligned([header, *rows], left=2))


def render_recommendations(recommendations: Recommendations) -> str:
    """For each user: their last events, and what the model offers with its scores."""
    return "\n\n".join(map(_user, recommendations.users))


def _user(user: UserRecommendations) -> str:
    history = [f"{INDENT}· {clipped(title)}" for title in user.newest()]
    cells = [
        [f"{place:>2}.", clipped(title), f"{score:.4f}"]
        for place, (title, score) in enumerate(user.offers(), 1)
    ]
    return "\n".join(
        [
            f"user {clipped(user.user)}, last events:",
            *(history or [f"{INDENT}(none)"]),
            f"{INDENT}recommended:",
            *(INDENT + line for line in _aligned(cells, left=2)),
        ]
    )


def printable(text: str) -> str:
    """Text of the data without what could steer a terminal (escapes, line breaks, direction)."""
    return "".join(c if c.isprintable() else "�" for c in text)


def clipped(text: str, cells: int = TITLE_CELLS) -> str:
    """Printable text of at most so many terminal cells."""
    clean = printable(text)
    if _width(clean) <= cells:
        return clean
    kept = clean[:cells]
    while _width(kept) > cells - 1:
        kept = kept[:-1]
    return kept + "…"


def _width(text: str) -> int:
    """Terminal cells: wide East Asian characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows of cells as lines of equal columns, the first `left` columns flush left."""
    if not rows:
        return []
    widths = [max(_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            gap = " " * (width - _width(cell))
            cells.append(cell + gap if index < left else gap + cell)
        lines.append("  ".join(cells).rstrip())
    return lines
