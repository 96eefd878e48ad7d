"""Damage to every kind of file that a stage leaves and a later one reads: always a sentence.

Each file is damaged in every way; then whatever reads it must refuse it by name, and never give
another value than the undamaged one.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from configs import storage
from configs.layout import RunLayout, read_record
from configs.tokenizers import ResidualKMeansConfig
from data_loaders.dataset import SequenceDataset
from data_loaders.items import action_names, find_users, item_parts, raw_items, titles
from data_loaders.manifest import read_manifest, seal, write_manifest
from data_loaders.poison import PoisonedSampleError, quarantine, read_quarantined
from data_loaders.preferences import PairDataset, commit_reference, write_reference
from data_loaders.semantic_ids import read_semantic_ids, write_semantic_ids
from data_loaders.shards import write_table
from data_loaders.synthetic import write_synthetic
from data_loaders.verification import verify_directory
from models.tokenizers.build import load_quantizer, save_quantizer
from models.tokenizers.fit import fit_quantizer
from models.tokenizers.shards import LocalShards
from tests.faults.damages import DAMAGES, Damage, link_out, name_of
from tests.models.tokenizers.clouds import clouds
from tests.trainer.conftest import write_pairs
from tests.trainer.monitor import invented
from trainer.monitor.results import read_recommendations, read_results
from trainer.monitor.tracker import Tracker, read_rows

USERS, ITEMS = 24, 12


def write_all(root: Path, seed: int) -> None:
    """Everything that stages leave, but checkpoints."""
    data = str(root / "data")
    manifest = write_synthetic(data, USERS, ITEMS, 9, seed, rows_per_group=6, actions=True)
    bad = pa.table({"user": ["u"], "reason": [f"bad {seed}"]})
    entry = write_table(data, "quarantine/part-00000.parquet", bad)
    content = manifest.model_dump(exclude={"fingerprint"}) | {"quarantine": (entry,)}
    manifest = seal(type(manifest), **content)
    write_manifest(data, manifest)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(4, (ITEMS + 1, 2), generator=generator)
    write_semantic_ids(str(root / "codes"), data, codes, (4, 4), tokenizer="t")
    config = ResidualKMeansConfig(codebook_size=4, iterations=2)
    vectors = clouds(50, 8, 9, seed=seed)
    save_quantizer(fit_quantizer(LocalShards.of(vectors), 8, config), str(root / "quantizer"))
    write_pairs(data, str(root / "pairs"))
    pairs = PairDataset(str(root / "pairs"), 2).manifest.num_pairs
    numbers = np.random.default_rng(seed).random(pairs)
    write_reference(str(root / "reference"), 0, np.arange(pairs), -numbers, -numbers[:, None] - 1)
    commit_reference(str(root / "reference"), 1, "policy")
    storage.write_sealed(str(root / "results.json"), invented.results(seed=seed).model_dump())
    shown = invented.recommendations().model_dump(mode="json")
    shown["users"][0]["user"] = f"user {seed}"
    storage.write_sealed(str(root / "recommendations.json"), shown)
    record = RunLayout(str(root)).stage_record("train")
    outputs = {"checkpoint": {"hash": f"{seed:064x}", "url": "somewhere"}}
    storage.write_sealed(record, {"format": 1, "stage": "train", "outputs": outputs})
    quarantine(str(root / "failures/samples.json"), PoisonedSampleError([seed], "reading", "odd"))
    with Tracker(str(root / "metrics")) as tracker:
        for step in range(1, 4):
            tracker.log(step, {"train/loss": seed + 1 / step})


def read_sequences(root: Path) -> Any:
    dataset = SequenceDataset(str(root / "data"), 4)
    ids = np.arange(dataset.num_samples)
    lengths = dataset.lengths(ids)
    slices = dataset.reader.slices(ids, np.zeros_like(ids), lengths.total)
    found = find_users(str(root / "data"), dataset.raw_users(ids))
    return [*slices.rows.values(), *slices.events.values(), lengths.train_end, found]


def read_items(root: Path) -> Any:
    data, ids = str(root / "data"), np.arange(1, ITEMS + 1)
    counts = [part.column("train_count").to_pylist() for part in item_parts(data)]
    return [counts, titles(data, ids), raw_items(data, ids)]


def read_pair_batch(root: Path) -> Any:
    pairs = PairDataset(str(root / "pairs"), 4, str(root / "reference"))
    batch = pairs.batch(np.arange(pairs.manifest.num_pairs))
    return [batch.chosen_ids, batch.rejected_ids, batch.reference_chosen, batch.batch.item_ids]


def read_codes(root: Path) -> Any:
    data = read_manifest(str(root / "data")).fingerprint
    return [read_semantic_ids(str(root / "codes"), data_fingerprint=data).codes]


def verify_data(root: Path) -> Any:
    lines: list[str] = []
    try:
        verify_directory(str(root / "data"), lines.append)
    except ValueError as error:
        raise ValueError(" ".join([*lines, str(error)])) from error
    return lines[-1].rsplit(", ", 1)[1]


@dataclass(frozen=True)
class Kind:
    """A kind of file, where one lies, and what reads it."""

    pattern: str
    read: Callable[[Path], Any]
    named: str
    """In the sentence; the file's own name, or its directory's."""


KINDS = {
    "manifest": Kind("data/manifest.json", read_items, "/data/"),
    "sequences": Kind("data/sequences/*-00001.parquet", read_sequences, "-00001.parquet"),
    "items": Kind("data/items/*.parquet", read_items, "items/"),
    "actions": Kind(
        "data/vocabularies/actions.parquet", lambda r: action_names(str(r / "data")), "actions"
    ),
    "vocabulary": Kind("data/vocabularies/*genre*.parquet", verify_data, "genre"),
    "quarantine": Kind("data/quarantine/*.parquet", verify_data, "quarantine/"),
    "semantic ids": Kind("codes/codes/*.parquet", read_codes, "codes/part-00000"),
    "manifest of semantic ids": Kind("codes/manifest.json", read_codes, "codes"),
    "tokenizer": Kind(
        "quantizer/*.safetensors", lambda r: [*load(r).state_dict().values()], "quantizer"
    ),
    "tokenizer's description": Kind("quantizer/*.json", lambda r: load(r).config, "quantizer"),
    "pairs": Kind("pairs/train/*-00000.parquet", read_pair_batch, "train/part-00000"),
    "manifest of pairs": Kind("pairs/manifest.json", read_pair_batch, "pairs"),
    "reference": Kind("reference/part-*.parquet", read_pair_batch, "reference/part-00000"),
    "manifest of the reference": Kind("reference/manifest.json", read_pair_batch, "reference"),
    "results": Kind("results.json", lambda r: read_results(str(r / "results.json")), "results"),
    "recommendations": Kind(
        "recommendations.json",
        lambda r: read_recommendations(str(r / "recommendations.json")),
        "recommendations",
    ),
    "record of a stage": Kind(
        "stages/train.json", lambda r: read_record(str(r / "stages/train.json")), "train.json"
    ),
    "samples left out": Kind(
        "failures/samples.json",
        lambda r: [read_quarantined(str(r / "failures/samples.json"))],
        "samples.json",
    ),
    "metrics": Kind("metrics/metrics.jsonl", lambda r: read_rows(str(r / "metrics")), "metrics"),
}


def load(root: Path) -> Any:
    return load_quantizer(str(root / "quantizer"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs alike but for their seed."""
    roots = tmp_path_factory.mktemp("one") / "run", tmp_path_factory.mktemp("other") / "run"
    for seed, root in enumerate(roots, 3):
        write_all(root, seed)
    return roots


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and one and isinstance(one[0], np.ndarray | torch.Tensor):
        return all(
            np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
            for a, b in zip(one, other, strict=True)
        )
    return bool(one == other)


ELSEWHERE = {"results", "recommendations", "record of a stage", "samples left out", "metrics"}
"""Files that tell nothing of which run they are of: another run's would be whole there, too."""
LINKED = ("sequences", "items", "actions", "quarantine", "semantic ids", "pairs", "reference")


@pytest.mark.parametrize("damage", [*DAMAGES, link_out], ids=name_of)
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_a_sentence_and_never_content(
    name: str, damage: Damage, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    if damage is link_out and name not in LINKED:
        pytest.skip("named by no manifest, so there is nothing to lead out of")
    if damage.__name__ == "swap" and (name in ELSEWHERE or name == "tokenizer's description"):
        pytest.skip("whole in itself")
    if damage.__name__ == "remove" and name == "samples left out":
        pytest.skip("where nothing was left out there is no file either")
    kind = KINDS[name]
    root = Path(shutil.copytree(whole[0], tmp_path / "a" / "run"))
    file, other = (next(iter(sorted(place.glob(kind.pattern)))) for place in (root, whole[1]))
    expected = kind.read(whole[0])
    damage(file, other)
    try:
        found = kind.read(root)
    except (ValueError, FileNotFoundError) as error:
        told = str(error)
        assert kind.named in told and "\n" not in told, told
        return
    # A lost end of line in JSON, or a copy of the same vocabulary, changes nothing; and rows that a
    # killed stage had not ended are none.
    lost_rows = name == "metrics" and found == expected[: len(found)]
    assert lost_rows or same(found, expected), "damage was not noticed"


def test_undamaged_files_are_read(whole: tuple[Path, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole[0], tmp_path / "run"))
    for name, kind in KINDS.items():
        assert same(kind.read(root), kind.read(whole[0])), name
