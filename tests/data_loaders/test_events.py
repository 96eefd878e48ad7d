"""Typing of events and the reasons of the quarantine."""

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.data import CleaningConfig, ColumnMap, GlobalTime
from data_loaders.events import (
    REASONS,
    EventRules,
    as_text,
    date_us,
    first_of_duplicates,
    malformed_rows,
    parse_labels,
    parse_number,
    parse_time,
    quarantined,
    render_time,
    type_events,
)

YEAR_2020 = 1_577_836_800
RULES = EventRules.of(ColumnMap(rating="rating", action="kind"), "s", CleaningConfig())


def _column(values: list[object], kind: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, kind)])


def test_each_row_has_the_first_reason_that_applies() -> None:
    good = {"user": "u", "item": "i", "timestamp": str(YEAR_2020), "rating": "4.5", "kind": "like"}
    rows = {
        "": good,
        "null_user": good | {"user": None, "item": None},
        "null_item": good | {"item": ""},
        "null_timestamp": good | {"timestamp": "NaN", "rating": "?"},
        "unparsable_timestamp": good | {"timestamp": "yesterday"},
        "impossible_timestamp": good | {"timestamp": "-5"},
        "unparsable_rating": good | {"rating": "five"},
    }
    raw = pa.table(
        {name: pa.array([row[name] for row in rows.values()], pa.string()) for name in good}
    )
    events, code = type_events(raw, RULES)
    assert [REASONS[c] for c in code] == list(rows)
    assert events.slice(0, 1).to_pylist() == [
        {"user": "u", "item": "i", "time": YEAR_2020 * 10**6, "rating": 4.5, "action": "like"}
    ]


def test_an_event_without_its_order_is_bad() -> None:
    rules = EventRules.of(ColumnMap(order="pos"), "s", CleaningConfig())
    assert rules.wanted()["data.source.columns.order"] == "pos"
    names = {"user": ["u"] * 3, "item": ["i"] * 3, "timestamp": ["9e8"] * 3}
    events, code = type_events(pa.table(names | {"pos": ["2", "second", None]}), rules)
    assert [REASONS[c] for c in code] == ["", "unparsable_order", "unparsable_order"]
    assert events["order"][0].as_py() == 2.0


def test_a_dwell_time_is_a_number_that_may_be_absent_but_not_negative() -> None:
    columns = ColumnMap(dwell="ms", rating="ms")  # one column may be both
    rules = EventRules.of(columns, "s", CleaningConfig(), "ms")
    assert rules.wanted()["data.source.columns.dwell"] == "ms" and rules.dwell_per_second == 1000
    values = ["1500", None, "long", "-1", "1e39", "0"]
    names = {"user": ["u"] * 6, "item": ["i"] * 6, "timestamp": ["9e8"] * 6}
    events, code = type_events(pa.table(names | {"ms": values}), rules)
    found = [REASONS[c] for c in code]
    assert found == ["", "", "unparsable_rating", "impossible_dwell", "unparsable_rating", ""]
    dwell = events["dwell"].to_numpy()
    assert dwell.dtype == np.float32 and np.isnan(dwell[1]) and dwell[[0, 5]].tolist() == [1500, 0]
    alone = EventRules.of(ColumnMap(duration="ms"), "s", CleaningConfig())
    found = [REASONS[c] for c in type_events(pa.table(names | {"ms": values}), alone)[1]]
    bad = "unparsable_duration"
    assert found == ["", "", bad, "impossible_duration", bad, ""]
    alone = EventRules.of(ColumnMap(dwell="ms"), "s", CleaningConfig())
    found = [REASONS[c] for c in type_events(pa.table(names | {"ms": values}), alone)[1]]
    assert found == ["", "", "unparsable_dwell", "impossible_dwell", "unparsable_dwell", ""]


def _named(text: str) -> pa.Table:
    return pa.table(
        {
            "user": [text, "u", "u"],
            "item": ["i", text, "i"],
            "timestamp": ["9e8"] * 3,
            "kind": [text] * 3,
            "tab": [text] * 3,
        }
    )


NAMED = EventRules.of(ColumnMap(action="kind", side_features=("tab",)), "s", CleaningConfig())


@pytest.mark.parametrize("text", ["", " ", "\t "])
def test_empty_text_is_no_user_and_no_item(text: str) -> None:
    found = [REASONS[c] for c in type_events(_named(text), NAMED)[1]]
    assert found == ["null_user", "null_item", ""]


@pytest.mark.parametrize("text", ["NaN", "nan", "null", "NULL", "None", "NA", "N/A", "\\N"])
def test_what_means_nothing_as_a_number_may_be_a_name(text: str) -> None:
    events, code = type_events(_named(text), NAMED)
    assert not code.any()
    assert events["user"][0].as_py() == events["item"][1].as_py() == text
    assert set(events["action"].to_pylist()) == set(events["side_tab"].to_pylist()) == {text}
    time = _named("u").set_column(2, "timestamp", pa.array([text] * 3))
    assert {REASONS[c] for c in type_events(time, NAMED)[1]} == {"null_timestamp"}


@pytest.mark.parametrize("value", ["1e39", "-1e39", 1e300, "1e999"])
def test_a_rating_beyond_float32_is_unparsable(value: str | float) -> None:
    raw = pa.table(
        {n: [v] for n, v in zip("uitrk", ["u", "i", YEAR_2020, value, "x"], strict=True)}
    )
    raw = raw.rename_columns(["user", "item", "timestamp", "rating", "kind"])
    assert [REASONS[c] for c in type_events(raw, RULES)[1]] == ["unparsable_rating"]


def test_labels_become_bits_and_what_is_no_label_is_bad() -> None:
    like = ["1", " TRUE", "0", "", None, "yes", "2", "false"]
    hate = [1, 0, None, 1, 0, 1, 0, 1]
    view = [True, False, None, True, True, False, True, False]
    raw = pa.table({"l": like, "h": pa.array(hate, pa.float64()), "v": view})
    raw = raw.append_column("user", pa.array(["u"] * 8)).append_column("item", pa.array(["i"] * 8))
    raw = raw.append_column("timestamp", pa.array([YEAR_2020] * 8))
    labels = {"like": "l", "hate": "h", "long_view": "v", "again": "l"}
    rules = EventRules.of(ColumnMap(labels=labels), "s", CleaningConfig())
    assert rules.wanted()["data.source.columns.labels.hate"] == "h"
    events, code = type_events(raw, rules)
    bad = [REASONS[c] == "unparsable_label" for c in code]
    assert bad == [False] * 5 + [True, True, False]
    masks = [m for m, b in zip(events["labels"].to_pylist(), bad, strict=True) if not b]
    assert masks == [0b1111, 0b1001, 0, 0b0110, 0b0100, 0b0010]


def test_sixty_two_labels_fit_and_more_are_refused() -> None:
    names = {f"l{bit}": f"c{bit}" for bit in range(62)}
    mask, bad = parse_labels([_column([bit % 2, 1]) for bit in range(62)])
    assert mask.tolist() == [sum(1 << b for b in range(1, 62, 2)), 2**62 - 1] and not bad.any()
    assert len(ColumnMap(labels=names).labels) == 62
    with pytest.raises(ValidationError, match="at most 62"):
        ColumnMap(labels=names | {"more": "c"})
    with pytest.raises(ValidationError, match="pattern"):
        ColumnMap(labels={"long view": "c"})


def test_a_rating_may_be_absent() -> None:
    raw = pa.table(
        {"user": ["u"], "item": ["i"], "timestamp": [YEAR_2020], "rating": [None], "kind": ["x"]}
    )
    events, code = type_events(raw, RULES)
    assert code.tolist() == [0] and np.isnan(events["rating"].to_numpy()[0])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64) | st.none()))
def test_numbers_survive_as_text(values: list[float | None]) -> None:
    texts = [None if value is None else repr(value) for value in values]
    parsed, null, bad = parse_number(_column(texts, pa.string()))
    assert not bad.any() and null.tolist() == [value is None for value in values]
    assert [None if n else v for v, n in zip(parsed.tolist(), null, strict=True)] == values


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=6)))
def test_text_is_a_number_only_if_python_agrees(texts: list[str]) -> None:
    _, null, bad = parse_number(_column(texts, pa.string()))
    for text, is_null, is_bad in zip(texts, null, bad, strict=True):
        if not is_null and not is_bad:
            float(text)  # must not raise


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([YEAR_2020, None], "s", [YEAR_2020 * 10**6, None]),
        (["1577836800.25", "x"], "s", [YEAR_2020 * 10**6 + 250_000, None]),
        ([YEAR_2020 * 1000 + 7], "ms", [(YEAR_2020 * 1000 + 7) * 1000]),
        ([YEAR_2020 * 10**6 + 7], "us", [YEAR_2020 * 10**6 + 7]),
        (["2020-01-01T00:00:00Z", "2020-01-01 01:00:00+01:00", "2020-13-01"], "iso8601",
         [YEAR_2020 * 10**6, YEAR_2020 * 10**6, None]),
        (["2020-01-01", None, ""], "iso8601", [YEAR_2020 * 10**6, None, None]),
        ([datetime(2020, 1, 1, tzinfo=UTC), None], "s", [YEAR_2020 * 10**6, None]),
    ],
)  # fmt: skip
def test_times_in_every_unit(values: list[object], unit: str, expected: list[int | None]) -> None:
    time, null, bad = parse_time(_column(values), unit)  # type: ignore[arg-type]
    absent = null | bad
    assert [None if a else int(t) for t, a in zip(time, absent, strict=True)] == expected


def test_a_time_beyond_int64_is_impossible_and_does_not_wrap() -> None:
    raw = pa.table({"user": ["u"] * 2, "item": ["i"] * 2, "timestamp": [1e30, -1e30]})
    rules = EventRules.of(ColumnMap(), "s", CleaningConfig())
    assert [REASONS[c] for c in type_events(raw, rules)[1]] == ["impossible_timestamp"] * 2


@pytest.mark.parametrize("unit", ["s", "ms", "us", "iso8601"])
def test_rendered_times_parse_back(unit: str) -> None:
    time = np.array([YEAR_2020 * 10**6, YEAR_2020 * 10**6 + 5_000_000])
    back, null, bad = parse_time(pa.chunked_array([render_time(time, unit)]), unit)  # type: ignore[arg-type]
    assert back.tolist() == time.tolist() and not null.any() and not bad.any()


def test_ids_read_alike_whatever_stores_them() -> None:
    assert as_text(_column([1, 20], pa.int32())).to_pylist() == ["1", "20"]
    assert as_text(_column([1.0, None, 2.5, float("nan")])).to_pylist() == ["1", None, "2.5", None]
    assert as_text(_column([1.0, 3.0], pa.float32())).to_pylist() == ["1", "3"]
    encoded = pa.chunked_array([pa.array(["b", "a", "b"]).dictionary_encode()])
    assert as_text(encoded).to_pylist() == ["b", "a", "b"]
    assert as_text(_column([True], pa.bool_())).to_pylist() == ["true"]
    assert as_text(_column([b"x"], pa.binary())).to_pylist() == ["x"]
    with pytest.raises(ValueError, match="plain values"):
        as_text(_column([[1]]))


def test_quarantine_holds_raw_text_and_reason() -> None:
    raw = pa.table({"user": pa.array([None], pa.int64()), "item": [7]})
    file, reason = np.array(["log.csv"], object), np.array(["null_user"], object)
    table = quarantined(raw, file, np.array([41]), reason)
    where = {"source_file": "log.csv", "source_row": 41}
    assert table.to_pylist() == [{"user": None, "item": "7", **where, "reason": "null_user"}]
    lines = malformed_rows(["user", "item"], "log.csv", {5: "a,b,c"})
    assert lines.schema == table.schema
    assert lines.to_pylist()[0]["user"] == "a,b,c" and lines["source_row"].to_pylist() == [5]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(*(st.integers(0, 2) for _ in range(4)), st.integers(0, 99)),
        max_size=40,
        unique_by=lambda row: row[4],
    ),
    st.booleans(),
)
def test_first_of_duplicates_equals_a_loop(rows: list[tuple[int, ...]], actions: bool) -> None:
    frame = pd.DataFrame(rows, columns=["user", "item", "time", "action", "place"])
    columns = {name: pa.array(frame[name].to_list(), pa.int64()) for name in frame}
    columns["user"] = columns["user"].cast(pa.string())
    columns["item"] = columns["item"].cast(pa.string())
    if actions:  # one of the three is unknown
        names = [None, "view", "buy"]
        columns["action"] = pa.array([names[kind] for kind in frame["action"]], pa.string())
    else:
        del columns["action"]
    known = 4 if actions else 3
    expected = []
    for row in rows:
        rivals = [other[4] for other in rows if other[:known] == row[:known]]
        expected.append(row[4] == min(rivals))
    assert first_of_duplicates(pa.table(columns)).tolist() == expected


def test_a_time_beyond_tomorrow_is_impossible_unless_the_recipe_says_otherwise() -> None:
    now = int(datetime.now(UTC).timestamp())
    times = [now, now + 82_000, now + 90_000, date_us("2099-12-31") // 10**6]
    raw = pa.table({"user": ["u"] * 4, "item": ["i"] * 4, "timestamp": times})
    for latest, good in ((None, 2), ("2100-01-01", 4), ("2001-01-01", 0)):
        rules = EventRules.of(ColumnMap(), "s", CleaningConfig(latest=latest))
        found = [REASONS[c] for c in type_events(raw, rules)[1]]
        assert found == [""] * good + ["impossible_timestamp"] * (4 - good)


def test_dates_of_the_recipe() -> None:
    assert date_us("2020-01-01") == YEAR_2020 * 10**6
    assert date_us(YEAR_2020) == YEAR_2020 * 10**6
    with pytest.raises(ValueError, match="'soon' is not an ISO date"):
        CleaningConfig(latest="soon")
    with pytest.raises(ValueError, match="must lie after earliest"):
        CleaningConfig(latest="1980-01-01")
    with pytest.raises(ValueError, match="must lie after validation_from"):
        GlobalTime(validation_from="2020-01-02", test_from="2020-01-01")
