"""The semantic-id table as an artifact: whole or refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_loaders.manifest import read_manifest, seal, write_manifest
from data_loaders.semantic_ids import (
    SemanticIdManifest,
    read_semantic_id_manifest,
    read_semantic_ids,
    write_semantic_ids,
)
from data_loaders.shards import write_table
from data_loaders.synthetic import write_synthetic

ITEMS, SIZES = 30, (4, 4, 3)


@pytest.fixture
def data(tmp_path: Path) -> str:
    write_synthetic(str(tmp_path / "data"), 20, ITEMS, 6.0, 3)
    return str(tmp_path / "data")


def table() -> torch.Tensor:
    codes = torch.stack([torch.arange(ITEMS + 1) % size for size in SIZES], 1)
    codes[0] = 0
    return codes


def write(data: str, url: Path, codes: torch.Tensor) -> SemanticIdManifest:
    return write_semantic_ids(str(url), data, codes, SIZES, tokenizer="made by hand")


def test_a_table_is_read_as_it_was_written(data: str, tmp_path: Path) -> None:
    manifest = write(data, tmp_path / "ids", table())
    read = read_semantic_ids(
        str(tmp_path / "ids"), data_fingerprint=read_manifest(data).fingerprint
    )
    assert read.codes.dtype == torch.int32
    assert torch.equal(read.codes.long(), table())
    assert read.codebook_sizes == SIZES
    assert read.fingerprint == manifest.fingerprint
    part = pq.read_table(tmp_path / "ids" / "codes" / "part-00000.parquet")
    assert part["item_id"].to_pylist() == list(range(1, ITEMS + 1))
    assert part["item"].to_pylist()[6] == "item-7"


def test_the_fingerprint_is_the_tables(data: str, tmp_path: Path) -> None:
    first = write(data, tmp_path / "a", table())
    assert write(data, tmp_path / "b", table()).fingerprint == first.fingerprint
    changed = table()
    changed[5, 1] = (changed[5, 1] + 1) % SIZES[1]
    assert write(data, tmp_path / "c", changed).fingerprint != first.fingerprint


def test_ids_of_another_data_set_are_refused(data: str, tmp_path: Path) -> None:
    write(data, tmp_path / "ids", table())
    with pytest.raises(ValueError, match="made for the data set .* not for other"):
        read_semantic_ids(str(tmp_path / "ids"), data_fingerprint="other")


def test_damage_is_named(data: str, tmp_path: Path) -> None:
    manifest = write(data, tmp_path / "ids", table())
    part = tmp_path / "ids" / manifest.parts[0].path
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=r"part-00000.parquet is damaged.*tandem tokenize"):
        read_semantic_ids(str(tmp_path / "ids"), data_fingerprint=manifest.data)
    (tmp_path / "ids" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no semantic ids were written there"):
        read_semantic_id_manifest(str(tmp_path / "ids"))


def crafted(codes: Any = None, ids: Any = None, kind: pa.DataType | None = None) -> pa.Table:
    """A part whose hash will be right; of the rows as they were where nothing is given."""
    lists = table()[1:].tolist() if codes is None else codes
    ids = range(1, ITEMS + 1) if ids is None else ids
    columns = {"item_id": pa.array(ids, pa.int64()), "item": [f"item-{i}" for i in ids]}
    return pa.table(columns | {"codes": pa.array(lists, kind or pa.list_(pa.int32()))})


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (crafted(codes=[[0, 0, -5]] * ITEMS), "codes outside codebooks of"),
        (crafted(codes=[[0, 4, 0]] * ITEMS), "codes outside codebooks of"),
        (crafted(codes=[[0]] * ITEMS), "its codes are no 3 int32 an item"),
        (crafted(codes=[[0, 0, 0]] * (ITEMS - 1) + [[0, 0]]), "its codes are no 3 int32"),
        (crafted(codes=[[0, 0, 0]] * (ITEMS - 1) + [None]), "its codes are no 3 int32"),
        (crafted(kind=pa.list_(pa.float64())), "its codes are no 3 int32"),
        (crafted(ids=range(2, ITEMS + 2)), "it holds other items than 1 and on"),
        (crafted(codes=[[0, 0, 0]] * 3, ids=[1, 2, 3]), "it holds other items than 1 and on"),
    ],
)
def test_a_table_is_what_its_manifest_describes(
    part: pa.Table, told: str, data: str, tmp_path: Path
) -> None:
    """Also one that somebody made, with hashes that are right."""
    manifest = write(data, tmp_path / "ids", table())
    [entry] = manifest.parts
    written = write_table(str(tmp_path / "ids"), entry.path, part)
    content = dict(manifest) | {"parts": (written.model_copy(update={"rows": ITEMS}),)}
    content.pop("fingerprint")
    write_manifest(str(tmp_path / "ids"), seal(SemanticIdManifest, **content))
    with pytest.raises(ValueError, match=rf"part-00000.parquet is damaged .*{told}.*tandem tokeni"):
        read_semantic_ids(str(tmp_path / "ids"), data_fingerprint=manifest.data)


def test_codes_must_fit(data: str, tmp_path: Path) -> None:
    codes = table()
    codes[9, 2] = SIZES[2]
    with pytest.raises(ValueError, match="item 9 has code 3 at level 2, whose codebook has 3"):
        write(data, tmp_path / "ids", codes)
    with pytest.raises(ValueError, match=r"shape \(30, 3\), but 30 items"):
        write(data, tmp_path / "ids", table()[1:])
