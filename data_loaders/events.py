"""Typed events: what is valid, and what goes to the quarantine for which reason.

Columns of an event: `user`, `item` string; `time` int64 microseconds; `place` int64, where it
stands in the log, which orders events of equal time; where mapped, `order` float64, which does so
before `place`, `rating`, `dwell` and `duration` (in the log's unit) float32 (NaN: none), `labels`
int64 (bit b: the recipe's label b), `action` and `side_<name>` string.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import time as now

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from configs.data import CleaningConfig, ColumnMap, DwellUnit, TimestampUnit, epoch_seconds
from data_loaders.shards import dense_codes

SECOND = 1_000_000
DAY = 86_400
"""Seconds."""
_PER_UNIT = {"s": SECOND, "ms": 1000, "us": 1}
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_TRUE_TEXT, _FALSE_TEXT = pa.array(["true", "1", "1.0"]), pa.array(["false", "0", "0.0"])
_NULL_TEXT = pa.array(["", "nan", "null", "none", "na", "n/a", "\\n"])
REASONS = (
    "",
    "null_user",
    "null_item",
    "null_timestamp",
    "unparsable_timestamp",
    "impossible_timestamp",
    "unparsable_rating",
    "unparsable_order",
    "unparsable_dwell",
    "impossible_dwell",
    "unparsable_duration",
    "impossible_duration",
    "unparsable_label",
)
"""Reasons found in a single row; an event has the first that applies. 0 is a good event."""
MALFORMED = "malformed_row"
DUPLICATE = "duplicate"


@dataclass(frozen=True)
class EventRules:
    """How columns are typed and which times are possible."""

    columns: ColumnMap
    unit: TimestampUnit
    earliest: int
    """Microseconds; earlier is impossible."""
    latest: int
    """Microseconds; this and later is impossible."""
    dwell_unit: DwellUnit = "s"

    @classmethod
    def of(
        cls,
        columns: ColumnMap,
        unit: TimestampUnit,
        cleaning: CleaningConfig,
        dwell_unit: DwellUnit = "s",
    ) -> "EventRules":
        """Rules of a recipe. Where it names no latest time they depend on the clock: make them
        once a preparation and take them to all tasks."""
        latest = now() + DAY if cleaning.latest is None else cleaning.latest
        return cls(columns, unit, date_us(cleaning.earliest), date_us(latest), dwell_unit)

    @property
    def dwell_per_second(self) -> int:
        """Units of `dwell` and `duration` in a second."""
        return SECOND // _PER_UNIT[self.dwell_unit]

    def wanted(self) -> dict[str, str]:
        """Recipe key → column of the log."""
        prefix, columns = "data.source.columns", self.columns
        keys = {f"{prefix}.{key}": getattr(columns, key) for key in ("user", "item", "timestamp")}
        for key in ("rating", "dwell", "duration", "order", "action"):
            if getattr(columns, key) is not None:
                keys[f"{prefix}.{key}"] = getattr(columns, key)
        for name, column in columns.labels.items():
            keys[f"{prefix}.labels.{name}"] = column
        for index, name in enumerate(columns.side_features):
            keys[f"{prefix}.side_features.{index}"] = name
        return keys

    def spans(self) -> dict[str, str]:
        """Event column of a length of time (`dwell`, `duration`) → column of the log."""
        mapped = {"dwell": self.columns.dwell, "duration": self.columns.duration}
        return {name: column for name, column in mapped.items() if column is not None}

    def categories(self) -> dict[str, str]:
        """Categorical event column → column of the log."""
        action = {} if self.columns.action is None else {"action": self.columns.action}
        return action | {f"side_{name}": name for name in self.columns.side_features}


def date_us(value: str | float) -> int:
    """Microseconds of an ISO date (UTC unless it says otherwise) or of epoch seconds."""
    return round(epoch_seconds(value) * SECOND)


def type_events(raw: pa.Table, rules: EventRules) -> tuple[pa.Table, np.ndarray]:
    """Type the rows of a log.

    Args:
        raw: the mapped columns as read, n rows.

    Returns:
        Event columns without `place`, n rows (bad ones hold anything), and int64 [n]
        index into REASONS.
    """
    columns = rules.columns
    user, item = as_text(raw[columns.user]), as_text(raw[columns.item])
    time, no_time, bad_time = parse_time(raw[columns.timestamp], rules.unit)
    typed: dict[str, pa.ChunkedArray | np.ndarray] = {"user": user, "item": item, "time": time}
    nowhere = np.zeros(raw.num_rows, bool)
    bad = dict.fromkeys(REASONS[1:], nowhere) | {
        "null_user": _empty(user),
        "null_item": _empty(item),
        "null_timestamp": no_time,
        "unparsable_timestamp": bad_time,
        "impossible_timestamp": (time < rules.earliest) | (time >= rules.latest),
    }
    if columns.rating is not None:
        typed["rating"], bad["unparsable_rating"] = _graded(raw[columns.rating])
    for name, column in rules.spans().items():
        typed[name], bad[f"unparsable_{name}"] = _graded(raw[column])
        bad[f"impossible_{name}"] = typed[name] < 0
    if columns.order is not None:
        typed["order"], no_order, bad_order = parse_number(raw[columns.order])
        bad["unparsable_order"] = bad_order | no_order
    if columns.labels:
        masks, bad["unparsable_label"] = parse_labels([raw[c] for c in columns.labels.values()])
        typed["labels"] = masks
    for name, column in rules.categories().items():
        typed[name] = as_category(raw[column])
    return pa.table(typed), np.select([bad[r] for r in REASONS[1:]], range(1, len(REASONS)), 0)


def _graded(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n] (NaN: none), and bool [n] unparsable; too large for float32 is that, too."""
    values, _, bad = parse_number(column)
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    return narrow, bad | np.isinf(narrow)


def quarantined(
    raw: pa.Table, source_files: np.ndarray, source_rows: np.ndarray, reasons: np.ndarray
) -> pa.Table:
    """Rows of a log as strings, with where they were (object [n], int64 [n]) and why they are here
    (object [n])."""
    columns = {name: as_text(raw[name]) for name in raw.column_names}
    columns["source_file"] = pa.array(source_files, pa.string())
    columns["source_row"] = pa.array(source_rows, pa.int64())
    columns["reason"] = pa.array(reasons, pa.string())
    return pa.table(columns)


def malformed_rows(names: list[str], source_file: str, lines: Mapping[int, str]) -> pa.Table:
    """Unreadable lines, by row of the file, for the quarantine; the line is in the first column."""
    count = len(lines)
    columns = {name: pa.nulls(count, pa.string()) for name in names}
    columns[names[0]] = pa.array(list(lines.values()), pa.string())
    rows = np.fromiter(lines, np.int64)
    return quarantined(
        pa.table(columns), _repeat(source_file, count), rows, _repeat(MALFORMED, count)
    )


def _repeat(text: str, count: int) -> np.ndarray:
    return np.full(count, text, dtype=object)


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as strings; whole floats lose their `.0`, as integers with gaps often are floats."""
    column = _plain(column)
    kind = column.type
    if pa.types.is_nested(kind):
        raise ValueError(f"a mapped column holds {kind}; map a column of plain values instead")
    if pa.types.is_floating(kind):
        return _float_text(pc.cast(column, pa.float64()))
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        column = pc.cast(column, pa.large_string())
    return pc.cast(column, pa.string())


def as_category(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as strings, null where it is unknown. Empty text is unknown, as CSV has no other way
    to write that, and the same log must mean the same in every format."""
    text = as_text(column)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column without encodings that compute functions do not know."""
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if pa.types.is_string_view(column.type):
        column = pc.cast(column, pa.string())
    return column


def _float_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    column = pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
    whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**53))
    integers = pc.cast(pc.if_else(whole, column, 0.0), pa.int64())
    return pc.if_else(whole, pc.cast(integers, pa.string()), pc.cast(column, pa.string()))


def parse_number(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 [n] values (NaN where there is none), bool [n] null, bool [n] unparsable."""
    column = _plain(column)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        null = _absent(text)
        number = _true(pc.match_substring_regex(text, _NUMBER))
        column = pc.if_else(pa.array(number), text, pa.scalar(None, text.type))
        bad = ~number & ~null
    else:
        null = _true(pc.is_null(column, nan_is_null=True))
        bad = np.zeros(len(column), bool)
    values = pc.cast(column, pa.float64(), safe=False).to_numpy().astype(np.float64)
    return values, null, bad | np.isinf(values)


def parse_labels(columns: Sequence[pa.ChunkedArray]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n] bit mask whose bit b is set where column b is true, and bool [n] unparsable.

    0/1, true/false and their texts are labels; what is absent counts as 0; all else is unparsable.
    """
    mask, bad = np.zeros(len(columns[0]), np.int64), np.zeros(len(columns[0]), bool)
    for bit, column in enumerate(columns):
        text = pc.utf8_lower(pc.utf8_trim_whitespace(as_text(column)))
        is_true = _true(pc.is_in(text, _TRUE_TEXT))
        bad |= ~(is_true | _true(pc.is_in(text, _FALSE_TEXT)) | _absent(text))
        mask |= is_true.astype(np.int64) << bit
    return mask, bad


def parse_time(
    column: pa.ChunkedArray, unit: TimestampUnit
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [n] microseconds (least int64 where there is none), bool [n] null, bool [n] unparsable.

    A column that is stored as dates or timestamps says its own unit.
    """
    column = _plain(column)
    kind = column.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        stamps = pc.cast(pc.cast(column, pa.timestamp("us"), safe=False), pa.int64())
        null = _true(pc.is_null(column))
        return stamps.fill_null(_NEVER).to_numpy(), null, np.zeros(len(column), bool)
    if unit == "iso8601":
        text = pc.utf8_trim_whitespace(as_text(column))
        null = _absent(text)
        moments = pd.to_datetime(
            pd.Series(text.to_numpy(), dtype=object), utc=True, errors="coerce", format="ISO8601"
        )
        missing = moments.isna().to_numpy()
        stamps = moments.dt.tz_localize(None).to_numpy().astype("datetime64[us]").astype(np.int64)
        return np.where(missing, _NEVER, stamps), null, missing & ~null
    values, null, bad = parse_number(column)
    scaled = np.rint(np.nan_to_num(values, nan=-np.inf) * _PER_UNIT[unit])
    # Clipped, so that a number beyond int64 is impossible instead of wrapping into the possible.
    return np.clip(scaled, -(2.0**62), 2.0**62).astype(np.int64), null, bad


_NEVER = np.iinfo(np.int64).min


def render_time(time: np.ndarray, unit: TimestampUnit) -> pa.Array:
    """Microseconds as the log's unit writes them, string [n]."""
    if unit == "iso8601":
        return pc.strftime(pa.array(time, pa.timestamp("us")), "%Y-%m-%dT%H:%M:%S")
    per_unit = _PER_UNIT[unit]
    whole = pc.cast(pa.array(time // per_unit), pa.string())
    if not (time % per_unit).any():
        return whole
    return pc.cast(pa.array(time / per_unit), pa.string())


def first_of_duplicates(events: pa.Table) -> np.ndarray:
    """bool [n]: of events with equal user, item and time (and action, where there is such a
    column), the one that stands first in the log."""
    users, _ = dense_codes(events["user"])
    items, catalogue = dense_codes(events["item"])
    pair, time = users * max(len(catalogue), 1) + items, events["time"].to_numpy()
    if "action" in events.column_names:  # no action is "", which no action is called
        actions, kinds = dense_codes(pc.fill_null(events["action"], ""))
        # Pairs by rank first, so that many users, items and kinds do not overflow together.
        pair = np.unique(pair, return_inverse=True)[1] * max(len(kinds), 1) + actions
    order = np.lexsort([time, pair])
    tied = order[:-1][_as_before(pair[order], time[order])]
    first = np.ones(len(order), bool)
    if len(tied):  # rare, so only the groups that have ties are put into the log's order
        group = np.flatnonzero(np.isin(pair, pair[tied]))
        group = group[np.lexsort([events["place"].to_numpy()[group], time[group], pair[group]])]
        first[group[1:][_as_before(pair[group], time[group])]] = False
    return first


def _as_before(*keys: np.ndarray) -> np.ndarray:
    """bool [n-1]: each row but the first has the keys of the row before it."""
    same = np.ones(max(len(keys[0]) - 1, 0), bool)
    for key in keys:
        same &= key[1:] == key[:-1]
    return same


def count_reasons(reasons: pa.Table) -> Mapping[str, int]:
    """reason → rows of a quarantine table."""
    counts = reasons["reason"].value_counts()
    return {entry["values"]: entry["counts"] for entry in counts.to_pylist()}


def _empty(text: pa.ChunkedArray) -> np.ndarray:
    """bool [n]: nothing is there. A name may be anything else: `NA` is Namibia, `None` a brand."""
    bare = pc.utf8_trim_whitespace(text)
    return _true(pc.or_kleene(pc.is_null(text), pc.equal(bare, "")))


def _absent(text: pa.ChunkedArray) -> np.ndarray:
    """bool [n]: no number or time is there, or what programs write where none is."""
    bare = pc.utf8_lower(pc.utf8_trim_whitespace(text))
    return _true(pc.or_kleene(pc.is_null(text), pc.is_in(bare, _NULL_TEXT)))


def _true(mask: pa.ChunkedArray) -> np.ndarray:
    return pa.chunked_array(mask).fill_null(False).to_numpy().astype(bool)
