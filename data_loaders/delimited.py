"""Delimited text to columns: one line is one row, so a stray quote spoils no line but its own."""

import csv
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import IO

import pyarrow as pa
from pyarrow import csv as arrow_csv

BOM = b"\xef\xbb\xbf"


def header_names(line: bytes, separator: str) -> list[str]:
    """Column names in a file's first line."""
    text = line.removeprefix(BOM).decode("utf-8", errors="replace").strip("\r\n")
    return next(csv.reader([text], delimiter=separator), [])


def parse(
    data: bytes, header: Sequence[str], names: Sequence[str], separator: str
) -> tuple[pa.Table, dict[int, str]]:
    """Columns `names` of a block of whole lines as strings, and place → line of those that are no
    row; places count from 0, without empty lines.

    Arrow lets a quoted value run over line ends; where its rows are fewer than the lines, the lines
    with a quote that they do not close are set aside and the others are read again.
    """
    table, malformed = _read(data, header, names, separator)
    if b'"' not in data or table.num_rows + len(malformed) == _count_lines(data):
        return table, malformed
    lines = [line for line in data.splitlines() if line]
    closed = _closed_line(separator)
    whole = [n for n, line in enumerate(lines) if b'"' not in line or closed.fullmatch(line)]
    table, found = _read(b"\n".join(lines[n] for n in whole), header, names, separator)
    assert table.num_rows + len(found) == len(whole)
    malformed = {whole[place]: line for place, line in found.items()}
    for place in sorted(set(range(len(lines))).difference(whole)):
        malformed[place] = lines[place].decode("utf-8", errors="replace")
    return table, dict(sorted(malformed.items()))


def stream(
    source: IO[bytes] | pa.BufferReader,
    header: Sequence[str] | None,
    names: Sequence[str],
    separator: str,
    block_bytes: int,
    malformed: dict[int, str],
) -> arrow_csv.CSVStreamingReader:
    """Batches of a file whose quoted values may hold line ends; bad rows go to `malformed`.

    Its keys are places in the file; rows may get there before the batch that they stand in.
    """
    first = 2 if header is None else 1

    def set_aside(row: arrow_csv.InvalidRow) -> str:
        malformed[row.number - first] = row.text if row.text is not None else ""
        return "skip"

    # All columns are strings here, so that the quarantine holds what the file holds.
    return arrow_csv.open_csv(
        source,
        arrow_csv.ReadOptions(
            use_threads=False,
            block_size=block_bytes,
            column_names=None if header is None else list(header),
        ),
        arrow_csv.ParseOptions(
            delimiter=separator, newlines_in_values=True, invalid_row_handler=set_aside
        ),
        arrow_csv.ConvertOptions(
            include_columns=list(names),
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


def _read(
    data: bytes, header: Sequence[str], names: Sequence[str], separator: str
) -> tuple[pa.Table, dict[int, str]]:
    malformed: dict[int, str] = {}
    if not data.strip(b"\r\n"):
        return pa.table({name: pa.array([], pa.string()) for name in names}), {}
    reader = stream(pa.BufferReader(data), header, names, separator, len(data) + 1, malformed)
    return reader.read_all(), malformed


def _count_lines(data: bytes) -> int:
    ends = data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
    return ends + (not data.endswith((b"\n", b"\r")))


@lru_cache
def _closed_line(separator: str) -> re.Pattern[bytes]:
    """A line that ends outside quotes; only a quote at a value's beginning opens."""
    mark = re.escape(separator.encode())
    value = rb'(?:"(?:[^"]|"")*+"[^%b]*+|[^"%b][^%b]*+|)' % (mark, mark, mark)
    return re.compile(rb"%b(?:%b%b)*+" % (value, mark, value))
