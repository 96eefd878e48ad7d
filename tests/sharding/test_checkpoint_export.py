"""Exported weights are those of the model, whatever their placement and however files are cut."""

import json
import mmap
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.storage_faults import StorageError
from sharding import checkpoint_export
from sharding.checkpoint_export import export_safetensors, exported_name
from sharding.checkpoint_tensors import CheckpointTensors
from tests.faults.trainings import small_disk
from tests.harness import run_ranks
from tests.sharding.test_table_rows import save


def nothing(done: int, total: int) -> None:
    assert 0 < done <= total


def test_weights_are_those_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_export, "BLOCK_BYTES", 50)  # of two or three rows
    saved = run_ranks(2, save, str(tmp_path))[0]
    for name, (url, table) in saved.items():
        for limit in (1, 300, 1 << 30):
            target = tmp_path / f"{name}-{limit}"
            files = export_safetensors(url, str(target), max_file_bytes=limit, progress=nothing)
            index = json.loads((target / "model.safetensors.index.json").read_text())
            weights = {}
            for file in files[:-2]:
                part = load_file(target / file)
                assert {index["weight_map"][key] for key in part} == {file}
                size = sum(value.numel() * value.element_size() for value in part.values())
                assert size <= limit or len(part) == 1
                assert not weights.keys() & part.keys()
                weights |= part
            assert weights.keys() == index["weight_map"].keys()
            assert torch.equal(weights.pop("tables.item.weight"), table)
            tensors = CheckpointTensors(url)
            origins = {exported_name(key): key for key in tensors.saved}
            assert len(weights) > 2
            assert all(key.startswith(("model.", "tables.")) for key in weights)
            for key, value in weights.items():
                origin = origins[key]
                rows = tensors.shape(origin)[0] if tensors.shape(origin) else 1
                assert torch.equal(value, tensors.rows(origin, 0, rows)), key
            assert len(files[:-2]) == {1: len(weights) + 1}.get(limit, len(files[:-2]))
            assert len(files[:-2]) == 1 or limit < 1 << 30
            assert index["metadata"]["hash/data"] == "abc"
        with pytest.raises(ValueError, match="is not empty"):
            export_safetensors(url, str(target), max_file_bytes=1, progress=nothing)
    file = next(Path(url).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="is damaged"):
        export_safetensors(url, str(tmp_path / "none"), max_file_bytes=1, progress=nothing)
    assert not (tmp_path / "none").exists()


def test_an_export_that_ended_early_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_export, "BLOCK_BYTES", 50)
    url, _ = next(iter(run_ranks(2, save, str(tmp_path))[0].values()))
    target = tmp_path / "out"

    def ends(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_safetensors(url, str(target), max_file_bytes=1, progress=ends)
    assert len(list(target.iterdir())) > 1
    files = export_safetensors(url, str(target), max_file_bytes=1 << 30, progress=nothing)
    whole = export_safetensors(url, str(tmp_path / "w"), max_file_bytes=1 << 30, progress=nothing)
    assert {each.name for each in target.iterdir()} == set(files) == set(whole)
    for name in files:
        assert (target / name).read_bytes() == (tmp_path / "w" / name).read_bytes()


def test_a_full_disk_is_told_and_the_next_export_is_whole(
    tmp_path: Path,
) -> None:
    url, _ = next(iter(run_ranks(2, save, str(tmp_path))[0].values()))
    whole = tmp_path / "whole"
    names = export_safetensors(url, str(whole), max_file_bytes=1 << 30, progress=nothing)
    pages = -(-(whole / names[0]).stat().st_size // mmap.PAGESIZE)
    # A page for the mark, and all but the last of the file's.
    with small_disk(tmp_path / "disk", f"{pages * mmap.PAGESIZE}") as disk:
        target = disk / "out"
        for _ in range(2):
            with pytest.raises(StorageError, match=r"cannot be written .*[Nn]o space"):
                export_safetensors(url, str(target), max_file_bytes=1 << 30, progress=nothing)
            assert not (target / names[-1]).exists()
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        export_safetensors(url, str(target), max_file_bytes=1 << 30, progress=nothing)
        assert {each.name for each in target.iterdir()} == set(names)
        for name in names:
            assert (target / name).read_bytes() == (whole / name).read_bytes()


def test_tensors_that_a_file_could_not_tell_apart_are_refused() -> None:
    def exports(*saved: str) -> list[checkpoint_export._Export]:
        return [checkpoint_export._Export(exported_name(s) or "", s, 1) for s in saved]

    checkpoint_export._refuse_names(exports("dense/x/weight", "dense/y/weight"))
    for saved, told in (
        (["dense/loss_module.x/weight", "dense/x/weight"], "of 'dense/loss_module.x/weight', too"),
        (["dense/__metadata__/weight"], "of the file's own notes, too"),
    ):
        with pytest.raises(ValueError, match=told):
            checkpoint_export._refuse_names(exports(*saved))


def test_only_weights_are_exported() -> None:
    names = {
        "tables/item.weight": "tables.item.weight",
        "tables/item.momentum1": None,
        "dense/tables.item.weight/weight": "tables.item.weight",
        "dense/loss_module.model.norm.weight/weight": "model.norm.weight",
        "dense/loss_module.model.norm.weight/exp_avg": None,
        "buffers/loss_module.model.balance": "model.balance",
        "step": None,
        "rng/cpu": None,
    }
    assert {name: exported_name(name) for name in names} == names
