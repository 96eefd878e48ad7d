"""JSON lines to columns: Arrow's parser for blocks that it understands, line by line for others."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json as arrow_json

MOST_BRACKETS = 500
"""Brackets opened in a line up to which Arrow's parser gets it."""


def keys(head: bytes, complete: bool) -> list[str]:
    """Keys of the objects at a file's beginning; the last line counts only if it is whole."""
    lines = head.splitlines() if complete else head.splitlines()[:-1]
    found: dict[str, None] = {}
    for line in lines[:1000]:
        found.update(dict.fromkeys(_object(line) or ()))
    return list(found)


def parse(data: bytes, names: Sequence[str]) -> tuple[pa.Table, dict[int, str]]:
    """Columns `names` of a block of whole lines, and place → line of those that are no JSON object.

    Places count from 0, without empty lines.

    A value that is absent is null. Where lines disagree about a column's type, all become strings.
    """
    if _may_nest_deeply(data):
        return _parse_lines(data, names)
    try:
        table = _parse_block(data, None)
        dated = [
            n for n in names if n in table.column_names and pa.types.is_temporal(table[n].type)
        ]
        if dated:  # the parser's guess at dates would rewrite ids that look like one
            table = _parse_block(data, pa.schema([(name, pa.string()) for name in dated]))
        exact = all(_is_exact(table[n]) for n in names if n in table.column_names)
        for name in set(names).intersection(table.column_names):
            table[name].validate(full=True)  # the parser takes any bytes for text
    except pa.ArrowInvalid:
        exact = False
    if not exact:
        return _parse_lines(data, names)
    absent = pa.nulls(table.num_rows, pa.string())
    columns = [table[n] if n in table.column_names else absent for n in names]
    return pa.table(dict(zip(names, columns, strict=True))), {}


def _is_exact(column: pa.ChunkedArray) -> bool:
    """Whether the parser kept all digits; it makes integers beyond int64 doubles."""
    if not pa.types.is_floating(column.type):
        return True
    largest = pc.max(pc.abs(column)).as_py()
    return largest is None or largest < 2.0**53


def _may_nest_deeply(data: bytes) -> bool:
    """Whether a line has so many brackets that Arrow's parser could run out of stack and die."""
    if data.count(b"[") + data.count(b"{") <= MOST_BRACKETS:
        return False
    characters = np.frombuffer(data, np.uint8)
    opened = (characters == ord("[")) | (characters == ord("{"))
    starts = np.flatnonzero(characters == ord("\n")) + 1
    starts = np.concatenate([[0], starts[starts < len(characters)]])
    return bool(np.add.reduceat(opened, starts, dtype=np.int64).max() > MOST_BRACKETS)


def _parse_block(data: bytes, schema: pa.Schema | None) -> pa.Table:
    return arrow_json.read_json(
        io.BytesIO(data),
        arrow_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
        arrow_json.ParseOptions(explicit_schema=schema),
    )


def _parse_lines(data: bytes, names: Sequence[str]) -> tuple[pa.Table, dict[int, str]]:
    columns: dict[str, list[str | None]] = {name: [] for name in names}
    malformed = {}
    for place, line in enumerate(line for line in data.splitlines() if line.strip()):
        parsed = _object(line)
        if parsed is None:
            malformed[place] = line.decode("utf-8", errors="replace")
            continue
        for name in names:
            columns[name].append(_text(parsed.get(name)))
    arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    return pa.table(arrays), malformed


def _object(line: bytes) -> dict[str, Any] | None:
    """The object in a line, None if there is none that all later steps can hold."""
    try:
        # A ValueError is no JSON, no UTF-8, or a number of thousands of digits.
        parsed = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:  # half a surrogate pair is JSON, but no text
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value)
