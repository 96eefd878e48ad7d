"""Every format gives the same columns; what is wrong with a file is said before any work."""

import gzip
import json
import socket
from datetime import time, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import storage_faults
from configs.data import CsvSource, PublicSource, UserTable
from configs.storage_faults import StorageError
from data_loaders import delimited, jsonl, sources
from data_loaders.sources import FILE_SHIFT, TableFiles, places, plan, read_chunk, source_signature

COLUMNS = {"data.source.columns.user": "user", "data.source.columns.item": "item"}


def _files(url: Path | str, kind: str, **options: object) -> TableFiles:
    return TableFiles(
        url=str(url), format=kind, columns=COLUMNS, place="data.source.url", **options
    )  # type: ignore[arg-type]


def _read(files: TableFiles) -> tuple[list[tuple[object, ...]], list[str]]:
    """(user, item, file, row) of all rows, and malformed lines."""
    rows, malformed = [], []
    for chunk in plan(files):
        for raw in read_chunk(files, chunk):
            users, items = raw.table["user"].to_pylist(), raw.table["item"].to_pylist()
            place = (places(chunk, raw) - (chunk.file << FILE_SHIFT)).tolist()
            rows += list(zip(users, items, [chunk.file] * len(users), place, strict=True))
            malformed += list(raw.malformed.values())
    return rows, malformed


def test_csv_keeps_text_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('item,extra,user\n007,x,"a, b"\n1.50,y,\n"two\nlines",z,c\n')
    rows, malformed = _read(_files(path, "csv", quoted_newlines=True))
    assert rows == [("a, b", "007", 0, 0), (None, "1.50", 0, 1), ("c", "two\nlines", 0, 2)]
    assert not malformed


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block", [1 << 20, 50])
@pytest.mark.parametrize("closed_later", [False, True])
def test_a_stray_quote_spoils_its_line_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, block: int, closed_later: bool
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    lines = [f"u{n},i{n}" for n in range(100)]
    lines[20] = '"u20,i20'
    lines[30], lines[31] = 'u30,5" disk', '"u""31","x,""y"""'
    lines[40] = ""
    if closed_later:
        lines[60] = 'u60,"i60""'
    (tmp_path / "a.csv").write_bytes(end.join(["\ufeffuser,item", *lines, ""]).encode())
    rows, malformed = _read(_files(tmp_path / "a.csv", "csv"))
    broken = ['"u20,i20'] + (['u60,"i60""'] if closed_later else [])
    assert malformed == broken
    assert len(rows) == 99 - len(broken)
    assert ("u30", '5" disk') in [row[:2] for row in rows]
    assert ('u"31', 'x,"y"') in [row[:2] for row in rows]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text('",ab', max_size=8), max_size=6))
def test_every_csv_line_is_a_row_or_malformed(lines: list[str]) -> None:
    data = "\n".join(["a,b", *lines, "last,row"]).encode()
    table, malformed = delimited.parse(data, ("user", "item"), ["user", "item"], ",")
    assert table.num_rows + len(malformed) == 2 + sum(1 for line in lines if line)
    assert table.to_pylist()[-1] == {"user": "last", "item": "row"}


def test_csv_sets_malformed_lines_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("user\titem\n1\t2\n1\t2\t3\n4\t5\nalone\n")
    rows, malformed = _read(_files(path, "csv", separator="\t"))
    assert [row[:2] for row in rows] == [("1", "2"), ("4", "5")]
    assert malformed == ["1\t2\t3", "alone"]


@pytest.mark.parametrize("kind", ["csv", "quoted", "jsonl"])
@pytest.mark.parametrize("block", [1 << 20, 60])
def test_every_row_has_its_place_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, block: int
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    lines = [f'{{"user": "{n}", "item": 1}}' if kind == "jsonl" else f"{n},1" for n in range(60)]
    bad = [0, 1, 7, 20, 21, 22, 40, 59]
    for n in bad:
        lines[n] = f'"{n},1' if kind == "csv" and n % 2 else f"bad{n}"
    lines.insert(30, "")
    (tmp_path / "a").write_text("\n".join(["user,item"] * (kind != "jsonl") + lines))
    extra = {"quoted_newlines": True} if kind == "quoted" else {}
    files = _files(tmp_path / "a", "csv" if kind == "quoted" else kind, **extra)
    [chunk] = plan(files)
    found, set_aside = [], {}
    for raw in read_chunk(files, chunk):
        found += list(zip(raw.table["user"].to_pylist(), places(chunk, raw).tolist(), strict=True))
        set_aside |= {raw.first_row + at: line for at, line in raw.malformed.items()}
    assert found == [(str(n), n) for n in range(60) if n not in bad]
    assert list(set_aside) == bad and all(str(n) in line for n, line in set_aside.items())


def test_header_names_columns_of_a_file_without_one(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("1,10,5\n2,20,4\n")
    rows, _ = _read(_files(path, "csv", header=("user", "item", "rating")))
    assert [row[:2] for row in rows] == [("1", "10"), ("2", "20")]
    with pytest.raises(ValueError, match="no header line, name its columns in data.source.header"):
        plan(_files(path, "csv"))
    with pytest.raises(ValueError, match=r"header names 2 columns, but .*a.csv has 3"):
        plan(_files(path, "csv", header=("user", "item")))


def test_missing_column_is_named_with_what_there_is_and_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("users,item_id\n1,2\n")
    with pytest.raises(ValueError) as error:
        plan(_files(path, "csv"))
    message = str(error.value)
    assert "data.source.columns.user='user' is not a column of" in message
    assert "a.csv" in message and "['users', 'item_id']" in message
    assert message.endswith("did you mean 'users'?")
    with pytest.raises(ValueError, match="is ';' the right separator"):
        path.write_text("user,item,timestamp,rating\n1,2,3,4\n")
        plan(_files(path, "csv", separator=";"))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("csv", "\nuser,item\n1,2\n", "a.log begins with a line that names no column; remove"),
        ("csv", ",,\n1,2,3\n", "a.log begins with a line that names no column"),
        ("jsonl", "user,item\n1,2\n", "a.log shows no columns .no JSON object.*is it jsonl"),
        ("jsonl", "[1]\n{}\n", "a.log shows no columns"),
    ],
)
def test_file_that_shows_no_columns(tmp_path: Path, kind: str, text: str, message: str) -> None:
    (tmp_path / "a.log").write_text(text)
    with pytest.raises(ValueError, match=message):
        plan(_files(tmp_path / "a.log", kind))


def test_directory_and_glob_name_files_in_name_order(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "sub/c.csv", "_SUCCESS", ".hidden.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"user,item\n{name},1\n")
    assert [(r[0], r[2]) for r in _read(_files(tmp_path, "csv"))[0]] == [
        ("a.csv", 0),
        ("b.csv", 1),
        ("sub/c.csv", 2),
    ]
    found = plan(_files(tmp_path / "*.csv", "csv"))
    assert [chunk.name for chunk in found] == ["a.csv", "b.csv"]
    with pytest.raises(ValueError, match="names no file"):
        plan(_files(tmp_path / "*.tsv", "csv"))


@pytest.mark.parametrize("name", ["_log.csv", ".log.csv"])
def test_a_file_named_outright_is_not_hidden_but_what_a_glob_finds_is(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / name).write_text("user,item\nu,1\n")
    [chunk] = plan(_files(tmp_path / "logs" / name, "csv"))
    assert chunk.name == name
    for url in (tmp_path / "logs", tmp_path / "logs" / f"{name[0]}*.csv"):
        with pytest.raises(ValueError, match=rf"only hidden files such as '{name}'.*rename"):
            plan(_files(url, "csv"))


def test_a_signed_link_names_its_file(tmp_path: Path) -> None:
    """What follows ? is a query of the web, and no pattern."""
    (tmp_path / "log.csv").write_text("user,item\nu,1\n")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/log.csv?signature=a%2Fb&expires=9"
        rows = _read(_files(url, "csv"))[0]
        server.shutdown()
    assert [row[:2] for row in rows] == [("u", "1")]


def test_a_server_that_is_down_has_not_lost_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_faults, "WAITS_S", ())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/log.csv"
        with pytest.raises(StorageError, match="storage did not answer, however often"):
            plan(_files(url, "csv"))


def test_empty_files_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.csv").write_text("user,item\n")
    (tmp_path / "c.csv").write_text("user,item\n1,2\n")
    assert [row[:3] for row in _read(_files(tmp_path, "csv"))[0]] == [("1", "2", 2)]


def test_compressed_text_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"user,item\n1,2\n"))
    assert _read(_files(path, "csv"))[0] == [("1", "2", 0, 0)]
    path.write_bytes(gzip.compress(b"user,item\n1,2\n" * 1000)[:-20])
    with pytest.raises(ValueError, match=r"a.csv.gz cannot be read as csv"):
        _read(_files(path, "csv"))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("user,item\nJosé,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.csv cannot be read as csv .*UTF8"):
        _read(_files(path, "csv"))


def test_json_lines_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 64)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"user": n, "item": f"2024-01-{n % 28 + 1:02d}"}) for n in range(50)]
    path.write_text("\n".join([*lines[:20], "", "{broken", *lines[20:]]))  # no newline at the end
    rows, malformed = _read(_files(path, "jsonl"))
    assert [str(row[0]) for row in rows] == [str(n) for n in range(50)]
    assert [row[1] for row in rows] == [f"2024-01-{n % 28 + 1:02d}" for n in range(50)]
    places = [row[3] for row in rows]
    assert places == sorted(set(places))
    assert malformed == ["{broken"]


def test_json_lines_of_mixed_types_become_text() -> None:
    table, malformed = jsonl.parse(
        b'{"a": 1}\n{"a": "x", "b": 2.5}\n[1]\n{"b": null}\n', ["a", "b"]
    )
    assert table.to_pydict() == {"a": ["1", "x", None], "b": [None, "2.5", None]}
    assert malformed == {2: "[1]"}


def test_json_ids_beyond_int64_keep_their_digits() -> None:
    data = b'{"a": 18446744073709551615, "b": 1.0}\n{"a": 18446744073709551614, "b": 2.5}\n'
    table, _ = jsonl.parse(data, ["a", "b"])
    assert table["a"].to_pylist() == ["18446744073709551615", "18446744073709551614"]
    assert table["b"].to_pylist() == ["1", "2.5"]


_HOSTILE = (
    b'{"user": ' + b"[" * 100_000 + b"]" * 100_000 + b', "item": 1}',
    b'{"user": ' + b"9" * 5000 + b', "item": 1}',
    b'{"user": "\\ud800", "item": 1}',
    b'{"\\udfff": 1, "user": 1, "item": 1}',
    b'{"user": "\xff\xfe", "item": 1}',
    b'{"user": 1, "item": 1',
)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("line", _HOSTILE, ids=range(len(_HOSTILE)))
def test_hostile_json_lines_are_malformed_and_others_stay(
    tmp_path: Path, line: bytes, first: bool
) -> None:
    good = [b'{"user": "\\u00e9\\ud83d\\ude00", "item": 1}', b'{"user": "b", "item": 2}']
    lines = [line, *good] if first else [good[0], line, good[1]]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows, malformed = _read(_files(tmp_path / "a.jsonl", "jsonl"))
    assert [row[0] for row in rows] == ["\u00e9\U0001f600", "b"]
    assert malformed == [line.decode(errors="replace")]


@pytest.mark.parametrize("opened", [b"[", b'{"a":'])
def test_many_json_brackets_are_fine(opened: bytes) -> None:
    closed = b"]" if opened == b"[" else b"}"
    deep = b'{"user": 1, "x": ' + opened * 400 + b"0" + closed * 400 + b"}\n"
    wide = b'{"user": 2, "x": [' + b"[0]," * 5000 + b"[1]]}\n"
    for data in (deep, wide):
        table, malformed = jsonl.parse(data, ["user"])
        assert table.num_rows == 1 and not malformed


def test_json_column_that_no_line_has(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"user": 1}\n{"user": 2, "itemid": 3}\n')
    with pytest.raises(ValueError, match=r"columns.item='item' is not .*did you mean 'itemid'"):
        plan(_files(path, "jsonl"))


def test_parquet_is_cut_at_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_ROWS", 20)
    table = pa.table({"user": list(range(45)), "item": ["x"] * 45})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    files = _files(tmp_path / "a.parquet", "parquet")
    assert [(c.row_groups, c.first_row) for c in plan(files)] == [
        ((0, 1), 0),
        ((2, 3), 20),
        ((4,), 40),
    ]
    assert [(row[0], row[3]) for row in _read(files)[0]] == [(n, n) for n in range(45)]


def test_parquet_that_is_none_or_nested_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"a.parquet cannot be read as parquet"):
        plan(_files(path, "parquet"))
    pq.write_table(pa.table({"user": [[1]], "item": [1]}), path)
    with pytest.raises(ValueError, match=r"columns.user='user' has type list"):
        plan(_files(path, "parquet"))


@pytest.mark.parametrize(
    "values",
    [
        pa.array([b"x"]),
        pa.array([b"ab"], pa.binary(2)),
        pa.array([time(1)]),
        pa.array([timedelta(1)]),
        pa.array([b"x"]).dictionary_encode(),
        pa.array([{"a": 1}]),
    ],
    ids=lambda values: str(values.type),
)
def test_parquet_columns_of_no_plain_values_are_refused(tmp_path: Path, values: pa.Array) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"user": ["u"], "item": values}), path)
    with pytest.raises(ValueError, match=r"columns.item='item' has type .* in .*a.parquet; map"):
        plan(_files(path, "parquet"))


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    latin = pa.array([b"ok", "José".encode("latin-1")]).view(pa.string())
    pq.write_table(pa.table({"user": latin, "item": [1, 2]}), path)
    with pytest.raises(ValueError, match=r"columns.user='user' of .*a.parquet .*UTF-?8") as error:
        _read(_files(path, "parquet"))
    assert type(error.value) is ValueError and "\n" not in str(error.value)


def test_damaged_parquet_pages_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"user": list(range(1000)), "item": list(range(1000))}), path)
    content = path.read_bytes()
    path.write_bytes(content[:10] + bytes(500) + content[510:])
    with pytest.raises(ValueError, match=r"a.parquet cannot be read as parquet") as error:
        _read(_files(path, "parquet"))
    assert type(error.value) is ValueError


def test_memory_files_travel_with_their_chunk() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/logs/a.csv", b"user,item\n1,2\n")
    files = _files("memory://logs/*.csv", "csv")
    [chunk] = plan(files)
    fs.rm("/logs", recursive=True)
    assert [raw.table.to_pylist() for raw in read_chunk(files, chunk)] == [
        [{"user": "1", "item": "2"}]
    ]


def test_file_that_another_node_does_not_see(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user,item\n1,2\n")
    files = _files(path, "csv")
    [chunk] = plan(files)
    path.unlink()
    with pytest.raises(ValueError, match="storage that all nodes see"):
        list(read_chunk(files, chunk))


def test_signature_changes_with_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user,item\n1,2\n")
    source = CsvSource(url=str(tmp_path))
    before = source_signature(source, source.url)
    assert before == source_signature(source, source.url)
    path.write_text("user,item\n1,2\n3,4\n")
    assert source_signature(source, source.url) != before
    users = UserTable(url=str(tmp_path / "users.csv"), format="csv", features=("age",))
    source = CsvSource(url=str(path))
    beside = source.model_copy(update={"user_table": users})
    (tmp_path / "users.csv").write_text("user,age\n1,20\n")
    known = source_signature(beside, source.url)
    (tmp_path / "users.csv").write_text("user,age\n1,20\n2,30\n")
    assert source_signature(beside, source.url) != known
    assert source_signature(PublicSource(name="ml-100k"), "anywhere") == ["ml-100k"]
