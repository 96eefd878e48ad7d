"""Alignment of models that write semantic ids: reference, first step, ranks, resume, rank-wise."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_loaders.preferences import preference_batches, read_reference
from models.base import CodeDecoder, TableModel
from models.generation.log_probs import sequence_log_probs
from tests.harness import run_ranks
from tests.trainer.conftest import write_pairs
from tests.trainer.runs import assert_named, logged, quiet, settings_of
from tests.trainer.test_align import align, interrupting, read_all
from tests.trainer.test_code_stages import BLOCKS, write_run
from trainer.align import align_worker
from trainer.codes import last_requests, with_codes
from trainer.evaluate import evaluation_policy, load_policy
from trainer.policy import start_worker
from trainer.pretrain import train_worker
from trainer.scoring import catalogue_trie

ALIGNMENT = {
    "kind": "s_dpo",
    "beta": 1.0,
    "epochs": 2,
    "pairs_per_step": 32,
    "log_every_steps": 1,
    "validation_share": 0.3,
    "checkpoint": {"every_steps": 2},
}
DECODERS: dict[str, dict[str, Any]] = {
    "lazy_decoder": BLOCKS["model"],
    "hstu_decoder": {"kind": "hstu_decoder", "width": 8, "qk_width": 4, "v_width": 4},
}


def settings_for(
    root: Path, name: str, model: str, workers: int = 1, reference: str = "reference", **more: Any
) -> dict[str, Any]:
    blocks = BLOCKS | {"model": DECODERS[model], "alignment": ALIGNMENT}
    blocks |= {"cluster": {"num_workers": workers}}
    urls = {"pairs": str(root / "pairs"), "reference": str(root / f"{reference}-{model}")}
    return settings_of(root, name, blocks, semantic_ids=str(root / "codes"), **urls, **more)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("codes")
    write_run(path)
    write_pairs(str(path / "data"), str(path / "pairs"), losers=3)
    return path


@pytest.fixture(scope="module", params=DECODERS)
def pretrained(request: pytest.FixtureRequest, root: Path) -> tuple[str, dict[str, Any]]:
    [outputs] = run_ranks(1, train_worker, settings_for(root, request.param, request.param), quiet)
    return request.param, outputs["checkpoint"]


def teacher_forced(settings: dict[str, Any]) -> Tensor:
    """log π of every pair's items [P, 1 + K] under the start, NaN where there is none."""
    worker = start_worker(settings, quiet)
    policy = evaluation_policy(worker)
    load_policy(worker, policy, settings["start"])
    assert worker.semantic_ids is not None
    table, trie, found = worker.semantic_ids.codes.long(), catalogue_trie(worker), []
    for pairs in preference_batches(
        settings["pairs"], "all", pairs_per_batch=16, rank=0, world_size=1
    ):
        assert isinstance(policy.model, CodeDecoder)
        batch = with_codes(last_requests(policy.model, pairs.batch), table)
        items = torch.cat([pairs.chosen_ids[:, None], pairs.rejected_ids], dim=1)

        def use(
            model: TableModel, rows: dict[str, Tensor], batch: Any = batch, items: Tensor = items
        ) -> Tensor:
            assert isinstance(model, CodeDecoder)
            columns = []
            for column in items.unbind(1):
                codes = table[column]
                logits = model.teacher_forced(model.encode(batch, rows, 0, "last"), codes)
                columns.append(sequence_log_probs(logits, codes, trie, known=True).sum(1))
            return torch.stack(columns, dim=1)

        found.append(policy.infer(batch, use).masked_fill(items == 0, torch.nan))
    return torch.cat(found)


def test_the_reference_is_teacher_forced_and_the_world_changes_nothing(
    root: Path, pretrained: tuple[str, dict[str, Any]]
) -> None:
    model, start = pretrained
    settings = settings_for(root, f"align-{model}", model, start=start)
    [outputs] = run_ranks(1, align_worker, settings, quiet)
    assert outputs["selected_on"] == "validation"
    rows = read_all(settings["reference"], read_reference(settings["reference"]).parts)
    names = ["chosen", "rejected_1", "rejected_2", "rejected_3"]
    reference = torch.tensor([[row[name] for name in names] for row in rows])
    [exact] = run_ranks(1, teacher_forced, settings)
    there = ~exact.isnan()
    assert 0 < (~there).sum() < there.numel() / 2
    torch.testing.assert_close(reference[there], exact[there].float(), rtol=1e-4, atol=1e-4)

    two = settings_for(root, f"two-{model}", model, 2, "of-two", start=start)
    assert len(run_ranks(2, align_worker, two, quiet)) == 2
    alone, shared = (logged(root, "align", f"{n}-{model}") for n in ("align", "two"))
    assert_named(settings, alone)
    counts = there[:, 1:].sum(1)
    for found in (alone, shared):
        assert found[1]["train/margin"] == pytest.approx(0, abs=1e-4)
        first = found[1]["train/preference_loss"]
        assert math.log(2) < first < math.log(1 + int(counts.max()))
        assert abs(found[max(found)]["train/margin"]) > 1e-3
    assert shared.keys() == alone.keys()
    for step, row in alone.items():
        for tag in row.keys() & {"train/loss", "train/preference_loss", "train/supervised_loss"}:
            assert shared[step][tag] == pytest.approx(row[tag], rel=1e-3)
    assert 0 < alone[max(alone)]["validation/preference_accuracy"] < 1


def test_going_on_from_the_middle_changes_no_loss(
    root: Path, pretrained: tuple[str, dict[str, Any]]
) -> None:
    model, start = pretrained
    whole = settings_for(root, f"whole-{model}", model, start=start)
    run_ranks(1, align_worker, whole, quiet)
    cut = settings_for(root, f"cut-{model}", model, start=start)
    assert run_ranks(1, align, cut, interrupting) == [None]
    assert (
        0
        < max(logged(root, "align", f"cut-{model}"))
        < max(logged(root, "align", f"whole-{model}"))
    )
    run_ranks(1, align_worker, cut, quiet)
    assert logged(root, "align", f"cut-{model}") == logged(root, "align", f"whole-{model}")
