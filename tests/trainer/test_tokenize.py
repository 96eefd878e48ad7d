"""The stage `tokenize` end to end on an embedded Ray: the same table however the work is cut."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from configs.tokenize import TokenizerConfig
from data_loaders.manifest import FileEntry, build_manifest, read_manifest, write_manifest
from data_loaders.semantic_ids import SemanticIdManifest, read_semantic_ids
from data_loaders.shards import write_table
from data_loaders.synthetic import write_synthetic
from trainer import item_embeddings, text_encoder
from trainer.codes_report import summarize_codes
from trainer.shard_workers import consecutive
from trainer.tokenize import tokenize, tokenizer_inputs

ITEMS, WIDTH, CODES = 90, 8, 4
Blocks = dict[str, Any]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
    )
    yield
    ray.shutdown()


def write_data(url: Path, raw_ids: list[str], part_sizes: list[int]) -> str:
    """A data set whose catalogue is `raw_ids`, its items table cut into parts of these sizes."""
    write_synthetic(str(url), 10, len(raw_ids), 5.0, 3)
    shutil.rmtree(url / "items")
    parts, first = [], 0
    for index, size in enumerate(part_sizes):
        ids = list(range(first + 1, first + size + 1))
        table = {
            "item_id": pa.array(ids, pa.int64()),
            "item": pa.array(raw_ids[first : first + size], pa.string()),
            "title": pa.array([f"Title {i}" for i in ids], pa.string()),
            "train_count": pa.array([1] * size, pa.int64()),
        }
        entry = write_table(str(url), f"items/part-{index:05d}.parquet", pa.table(table))
        parts.append(FileEntry(**entry.model_dump()))
        first += size
    content = read_manifest(str(url)).model_dump(exclude={"fingerprint", "items", "num_items"})
    manifest = build_manifest(**content, items=tuple(parts), num_items=len(raw_ids))
    write_manifest(str(url), manifest)
    return str(url)


def names(count: int) -> list[str]:
    return [f"item-{number:03d}" for number in np.random.default_rng(5).permutation(count)]


def write_vectors(path: Path, raw_ids: list[str], without: int = 0) -> str:
    """Vectors in few, tight clusters, so that items collide; a function of the raw id."""
    centres = np.random.default_rng(0).standard_normal((6, WIDTH))
    rows = []
    for raw in sorted(raw_ids)[without:]:
        number = int(raw[5:])
        noise = np.random.default_rng(number).standard_normal(WIDTH) * 0.05
        rows.append({"item": raw, "vector": (centres[number % 6] + noise).tolist()})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def config(url: str, collisions: str = "extra_digit", **more: Any) -> TokenizerConfig:
    quantizer = {"kind": "residual_kmeans", "num_levels": 2, "codebook_size": CODES}
    blocks: Blocks = {
        "embeddings": [{"kind": "vectors", "url": url}],
        "quantizer": quantizer,
        "collisions": collisions,
    }
    return TokenizerConfig.model_validate(blocks | more, strict=False)


def run(settings: TokenizerConfig, data: str, out: Path) -> SemanticIdManifest:
    return tokenize(settings, data, str(out), seed=3, say=lambda line: None)


def codes_by_name(url: Path, data: str) -> dict[str, tuple[int, ...]]:
    table = read_semantic_ids(str(url), data_fingerprint=read_manifest(data).fingerprint)
    raw = [r for p in read_manifest(data).items for r in _column(Path(data) / p.path, "item")]
    return dict(zip(raw, map(tuple, table.codes[1:].tolist()), strict=True))


def _column(path: Path, name: str) -> list[Any]:
    return list(pq.read_table(path, columns=[name])[name].to_pylist())


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("collisions", ["extra_digit", "next_best"])
def test_parts_and_workers_do_not_matter(tmp_path: Path, collisions: str) -> None:
    raw = names(ITEMS)
    one = write_data(tmp_path / "one", raw, [ITEMS])
    several = write_data(tmp_path / "several", raw, [30, 0, 25, 35])
    settings = config(write_vectors(tmp_path / "v.parquet", raw), collisions)
    first = run(settings, one, tmp_path / "a")
    second = run(settings, several, tmp_path / "b")
    codes = codes_by_name(tmp_path / "a", one)
    assert codes == codes_by_name(tmp_path / "b", several)
    assert first.report == second.report and first.codebook_sizes == second.codebook_sizes
    report = first.report["collisions"]
    assert report["unique_before"] < 1
    if collisions == "extra_digit":
        assert len(set(codes.values())) == ITEMS and report["remaining"] == 0
        assert first.codebook_sizes == (CODES, CODES, report["largest"])
    else:  # 90 items on 16 ids
        assert len(set(codes.values())) == CODES**2 == ITEMS - report["remaining"]
        assert first.codebook_sizes == (CODES, CODES)
    assert not list((tmp_path / "a").glob("staging-*"))
    assert "items with an id of their own" in summarize_codes(first)
    # A finished table is returned as it is; another seed is another request.
    before = (tmp_path / "a" / "manifest.json").stat().st_mtime_ns
    assert run(settings, one, tmp_path / "a") == first
    assert (tmp_path / "a" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.usefixtures("local_ray")
def test_cold_start_keeps_ids_and_trains_nothing(tmp_path: Path) -> None:
    raw = names(ITEMS)
    old, gone = raw[:60], raw[:5]
    now = [name for name in raw if name not in gone]
    vectors = write_vectors(tmp_path / "v.parquet", raw)
    then_data = write_data(tmp_path / "then", old, [20, 40])
    now_data = write_data(tmp_path / "now", now, [40, 45])
    earlier = run(config(vectors, reserve=40), then_data, tmp_path / "a")
    frozen = config(vectors, frozen=str(tmp_path / "a"))
    later = run(frozen, now_data, tmp_path / "b")
    before, after = (
        codes_by_name(tmp_path / "a", then_data),
        codes_by_name(tmp_path / "b", now_data),
    )
    assert all(after[name] == before[name] for name in old if name not in gone)
    assert len(set(after.values()) | set(before.values())) == ITEMS  # no id was given twice
    assert later.cold_start is not None
    assert later.cold_start.model_dump(exclude={"semantic_ids"}) == {
        "known_items": 55, "new_items": 30, "retired_items": 5,
    }  # fmt: skip
    assert later.codebook_sizes == earlier.codebook_sizes
    assert [f.sha256 for f in later.quantizer] == [f.sha256 for f in earlier.quantizer]
    # Retired ids stay taken in what comes after, too; and old items need no vectors.
    again = write_data(tmp_path / "again", raw, [ITEMS])
    settings = config(vectors, frozen=str(tmp_path / "b"))
    run(settings, again, tmp_path / "c")
    assert codes_by_name(tmp_path / "c", again) == before | after
    with pytest.raises(ValueError, match="tokenizer.quantizer differs from that of"):
        other = {"kind": "residual_kmeans", "num_levels": 3, "codebook_size": CODES}
        run(config(vectors, frozen=str(tmp_path / "a"), quantizer=other), now_data, tmp_path / "d")


@pytest.mark.usefixtures("local_ray")
def test_missing_vectors_are_refused_or_spread(tmp_path: Path) -> None:
    raw = names(ITEMS)
    data = write_data(tmp_path / "data", raw, [40, 50])
    vectors = write_vectors(tmp_path / "v.parquet", raw, without=9)
    with pytest.raises(ValueError, match=r"no vectors for 9 of 90 items \(10.0%\).*max_missing"):
        run(config(vectors), data, tmp_path / "a")
    allowed = {"kind": "vectors", "url": vectors, "max_missing": 0.2}
    manifest = run(config(vectors, embeddings=[allowed]), data, tmp_path / "a")
    assert manifest.report["embeddings"] == [{"kind": "vectors", "width": WIDTH, "missing": 9}]


def test_embeddings_are_scaled_and_side_by_side(tmp_path: Path) -> None:
    raw = names(4)
    data = write_data(tmp_path / "data", raw, [4])
    values = np.arange(1.0, 13.0, dtype=np.float32).reshape(4, 3)
    values[2] = 0  # says nothing
    table = pa.table(
        {"item_id": pa.array([1, 2, 3]), "value": item_embeddings.bytes_of(values[:3])}
    )
    for name in ("x", "y"):
        write_table(str(tmp_path), f"{name}/part-00000.parquet", table)
    blocks = tuple(
        item_embeddings.Block(embedding, 3, 1, name, None)
        for name, embedding in zip(
            "xy",
            config("v", embeddings=[
                {"kind": "vectors", "url": "v", "weight": 2.0},
                {"kind": "vectors", "url": "v", "normalize": False, "weight": 0.5},
            ]).embeddings,
            strict=True,
        )
    )  # fmt: skip
    parts = tuple(item_embeddings.item_parts(data))
    matrix = item_embeddings.ItemEmbeddings(parts, blocks, str(tmp_path)).matrix(0)
    first = values[0] / np.linalg.norm(values[0]) * 2
    assert torch.allclose(matrix[0], torch.from_numpy(np.r_[first, values[0] / 2]))
    lengths = torch.linalg.vector_norm(matrix[2:], dim=1)
    assert torch.allclose(lengths, torch.full((2,), (2**2 + 0.5**2) ** 0.5))
    assert not torch.equal(matrix[2], matrix[3])


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"not installed on .*pip install '.\[text\]'"):
        text_encoder.TextEncoder()
    run_of = {"kind": "collaborative", "run": str(tmp_path)}
    with pytest.raises(ValueError, match=r"embeddings.0.run=.* has no finished stage 'train'"):
        tokenizer_inputs(config("v", embeddings=[run_of]))
    with pytest.raises(ValueError, match="frozen cannot go with collaborative"):
        config("v", embeddings=[run_of], frozen="ids")
    with pytest.raises(ValueError, match="reserve=3 keeps codes of the extra digit free"):
        config("v", "keep", reserve=3)


def test_inputs_change_with_the_files(tmp_path: Path) -> None:
    vectors = write_vectors(tmp_path / "v.parquet", names(5))
    before = tokenizer_inputs(config(vectors))
    assert tokenizer_inputs(config(vectors)) == before
    write_vectors(tmp_path / "v.parquet", names(9))
    assert tokenizer_inputs(config(vectors)) != before


def test_runs_of_alike_sums() -> None:
    for sizes in ([5], [1, 1, 1, 1], [100, 1, 1], [1, 1, 100], [3, 9, 2, 8, 4]):
        for groups in (1, 2, 3, 7):
            runs = consecutive(np.array(sizes), groups)
            assert np.concatenate(runs).tolist() == list(range(len(sizes)))
            assert 1 <= len(runs) <= groups and all(len(run) for run in runs)
