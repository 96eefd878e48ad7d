"""Texts and vectors keyed by raw item id reach the items' parts, whatever their files and order."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import storage
from configs.tokenize import ItemTable, VectorEmbedding
from data_loaders.exchange import Progress
from data_loaders.item_tables import (
    TextTable,
    matrix_of,
    stage_by_part,
    staged_values,
    vector_table,
)
from data_loaders.items import ItemPart

WIDTH = 3


def parts_of(url: Path, sizes: list[int], names: list[str]) -> list[ItemPart]:
    """Items parts of these sizes over `names`; item i is names[i - 1]."""
    parts, first = [], 0
    for index, size in enumerate(sizes):
        path = url / f"part-{index}.parquet"
        pq.write_table(pa.table({"item": pa.array(names[first : first + size], pa.string())}), path)
        parts.append(ItemPart(str(path), first + 1, size, storage.sha256_file(str(path))))
        first += size
    return parts


def silent() -> Progress:
    return Progress(lambda line: None)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("sizes", [[20], [0, 7, 0, 9, 4, 0]])
def test_vectors_reach_their_items(tmp_path: Path, sizes: list[int]) -> None:
    random = np.random.default_rng(0)
    names = [str(n) for n in random.permutation(20)]
    parts = parts_of(tmp_path, sizes, names)
    vectors = random.standard_normal((25, WIDTH)).astype(np.float32)
    known = [n for n in range(25) if n not in (3, 11)]  # 20 … 24 are of no item
    (tmp_path / "vectors").mkdir()
    for number, rows in enumerate(np.array_split(random.permutation(known), 3)):
        table = {"item": rows, "vector": [vectors[row].tolist() for row in rows]}
        pq.write_table(pa.table(table), tmp_path / "vectors" / f"{number}.parquet")
    again = {"item": [5, None], "vector": [[0.0] * WIDTH, None]}  # of two rows the first counts
    pq.write_table(pa.table(again), tmp_path / "vectors" / "9.parquet")
    table = vector_table(VectorEmbedding(url=str(tmp_path / "vectors")), "e")
    reports = stage_by_part("v", table, parts, str(tmp_path / "s"), silent(), unmatched="rest")
    assert sum(report["rows"] for report in reports) == 18
    found = {}
    for index, part in enumerate(parts):
        values = staged_values(str(tmp_path / "s"), "v", index)
        assert (values is None) == (part.rows == 0)
        if values is not None:
            ids = values["item_id"].to_pylist()
            assert ids == sorted(ids) and part.first_id <= ids[0]
            assert ids[-1] < part.first_id + part.rows
            found |= dict(zip(ids, matrix_of(values["value"]), strict=True))
    expected = {i: vectors[int(name)] for i, name in enumerate(names, 1) if int(name) in known}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[i], expected[i]) for i in expected)
    rest = [pq.read_table(path) for path in (tmp_path / "s" / "rest").glob("*.parquet")]
    assert sorted(key for table in rest for key in table["key"].to_pylist()) == [
        "20", "21", "22", "23", "24",
    ]  # fmt: skip


@pytest.mark.usefixtures("local_ray")
def test_npy_rows_belong_to_consecutive_ids(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, [2, 2], ["12", "10", "99", "11"])
    matrix = np.arange(12, dtype=np.float16).reshape(4, WIDTH)
    np.save(tmp_path / "m.npy", matrix)
    embedding = VectorEmbedding(url=str(tmp_path / "m.npy"), format="npy", first_id=10)
    stage_by_part("v", vector_table(embedding, "e"), parts, str(tmp_path / "s"), silent())
    first, second = (staged_values(str(tmp_path / "s"), "v", part) for part in (0, 1))
    assert first is not None and second is not None
    assert np.array_equal(matrix_of(first["value"]), matrix[[2, 0]].astype(np.float32))
    assert second["item_id"].to_pylist() == [4]
    assert np.array_equal(matrix_of(second["value"]), matrix[[1]].astype(np.float32))


def test_texts_are_joined_columns_and_lists(tmp_path: Path) -> None:
    rows = [
        {"item": 1, "title": "A", "path": [["x", "y"], ["z"]], "year": 1999.0},
        {"item": 2, "title": None, "path": [["x", None]], "year": None},
        {"item": 3, "title": None, "path": None, "year": None},
        {"item": 4, "title": "D", "path": [], "year": 2.5},
        {"item": 5, "title": "", "path": [[""], ["e"]], "year": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    table = TextTable.open(
        ItemTable(url=str(tmp_path / "t.parquet")), ("title", "path", "year"), "e"
    )
    [read] = table.read(0)
    texts = dict(zip(read["key"].to_pylist(), read["value"].to_pylist(), strict=True))
    assert texts == {"1": "A, x > y, z, 1999", "2": "x", "4": "D, 2.5", "5": "e"}


def test_csv_texts(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id;name\ni1;One\ni2;\n")
    where = ItemTable(url=str(tmp_path / "t.csv"), format="csv", separator=";", item="id")
    [read] = TextTable.open(where, ("name",), "e").read(0)
    assert read["key"].to_pylist() == ["i1"] and read["value"].to_pylist() == ["One"]
    with pytest.raises(ValueError, match=r"e.columns.0='nmae' is not a column .*mean 'name'"):
        TextTable.open(where, ("nmae",), "e")


def test_bad_vectors_are_named(tmp_path: Path) -> None:
    def read(rows: dict[str, list[object]]) -> None:
        pq.write_table(pa.table(rows), tmp_path / "v.parquet")
        table = vector_table(VectorEmbedding(url=str(tmp_path / "v.parquet")), "e")
        list(table.read(0))

    with pytest.raises(ValueError, match=r"column 'vector' holds vectors of widths \[1, 2\]"):
        read({"item": [1, 2], "vector": [[1.0], [1.0, 2.0]]})
    with pytest.raises(ValueError, match="numbers are missing"):
        read({"item": [1], "vector": [[1.0, None]]})
    with pytest.raises(ValueError, match="has type string; give lists of numbers"):
        read({"item": [1], "vector": ["1 2"]})
    np.save(tmp_path / "flat.npy", np.zeros(4))
    (tmp_path / "no.npy").write_bytes(b"nothing")
    for name, message in [
        ("flat.npy", "holds float64 of shape"),
        ("no.npy", "is no .npy file"),
        ("gone.npy", "names no file"),
    ]:
        with pytest.raises(ValueError, match=message):
            vector_table(VectorEmbedding(url=str(tmp_path / name), format="npy"), "e")


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e300])
def test_numbers_that_are_not_finite_name_the_item(tmp_path: Path, broken: float) -> None:
    rows = [{"item": "a", "vector": [1.0, 2.0]}, {"item": "b", "vector": [broken, 0.0]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "v.parquet")
    np.save(tmp_path / "v.npy", np.array([row["vector"] for row in rows]))
    of_npy = VectorEmbedding(url=str(tmp_path / "v.npy"), format="npy", first_id=7)
    for embedding, item in (
        (VectorEmbedding(url=str(tmp_path / "v.parquet")), "b"),
        (of_npy, "8"),
    ):
        with pytest.raises(ValueError, match=rf"v\.(npy|parquet).*item '{item}'.*not finite"):
            list(vector_table(embedding, "e").read(0))


def test_a_zero_vector_is_none(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([[0.0, 0.0], [0.0, 1e30]]))
    table = vector_table(VectorEmbedding(url=str(tmp_path / "v.npy"), format="npy"), "e")
    [read] = table.read(0)
    assert read["key"].to_pylist() == ["1"]
