"""The pretraining worker: what it trains on, selects, hands on, and resumes from."""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from configs.layout import RunLayout
from data_loaders.items import train_counts
from sharding.parallelize import ParallelModel
from tests.harness import run_ranks
from tests.trainer.runs import (
    LENGTH,
    STEPS_PER_EPOCH,
    USERS,
    Pretrained,
    logged,
    quiet,
    settings_of,
)
from tests.trainer.test_evaluate import FINAL
from trainer import pretrain
from trainer.evaluate import Part, Targets, evaluation_policy, load_policy, rank_policy
from trainer.metrics import Measured
from trainer.policy import Worker, start_worker
from trainer.pretrain import train_worker, training_loader
from trainer.trainer import TrainerState

CURVE = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.25, 5: 0.9, 6: 0.1}
"""Epoch → what the scripted validation says: best is the second, unless one looks too far."""
PATIENT = {"training": {"epochs": 6, "validation": {"patience": 2}}}
Events = dict[int, list[tuple[list[int], list[int]]]]


def train_on_script(settings: dict[str, Any], fail_after: int | None = None) -> Any:
    """`train_worker` whose validation says CURVE; a failure in the validation after that epoch."""

    def scripted(worker: Worker, policy: ParallelModel, max_users: int | None) -> Any:
        def validate() -> Measured:
            epoch = policy.step // STEPS_PER_EPOCH
            if epoch == fail_after:
                raise InterruptedError
            return Measured({"ndcg@10": CURVE[epoch]})

        return validate

    with mock.patch.object(pretrain, "validation_ranker", scripted):
        try:
            return train_worker(settings, quiet)
        except InterruptedError:
            return None


def epoch_of(settings: dict[str, Any]) -> Events:
    """Sample → inputs and targets of each time that an epoch of this rank shows it."""
    shown: Events = defaultdict(list)
    with training_loader(start_worker(settings, quiet), TrainerState()) as loader:
        for step in loader:
            for batch in step.micro_batches:
                for b, sample in enumerate(batch.sample_ids.tolist()):
                    own = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
                    pair = (batch.item_ids[own].tolist(), batch.target_ids[own].tolist())
                    shown[sample].append(pair)
            if step.last_of_epoch:
                return dict(shown)
    raise AssertionError("unreachable")


def test_no_held_out_event_is_trained_on(pretrained: Pretrained) -> None:
    for blocks, end in (({}, "train_end"), (FINAL, "validation_end")):
        settings = settings_of(pretrained.root, "loader", blocks)
        one, two = run_ranks(2, epoch_of, settings)
        assert not one.keys() & two.keys()
        shown = one | two
        assert len(shown) == USERS
        for sample, row in enumerate(pretrained.users):
            items = row["item_ids"][: row[end]]
            assert shown[sample] == [(items[:-1][-LENGTH:], items[1:][-LENGTH:])]


def measured(settings: dict[str, Any], reference: dict[str, Any], counts: Any) -> dict[str, Any]:
    worker = start_worker(settings, quiet)
    policy = evaluation_policy(worker)
    load_policy(worker, policy, reference)
    parts: tuple[Part, ...] = ("validation", "test")
    return {part: rank_policy(worker, policy, counts, Targets(part)).metrics for part in parts}


def test_selection_measures_validation_and_the_world_changes_nothing(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    settings = settings_of(pretrained.root, "pretrained", {})
    selected, counts = pretrained.outputs["checkpoint"], train_counts(str(pretrained.root / "data"))
    [parts] = run_ranks(1, measured, settings, selected, counts)
    rows = logged(pretrained.root, "train", "pretrained")
    values = [rows[epoch * STEPS_PER_EPOCH]["validation/ndcg@10"] for epoch in (1, 2)]
    assert list(rows) == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    assert parts["validation"]["ndcg@10"] == pytest.approx(max(values), abs=1e-12)
    assert pretrained.outputs["best_value"] == max(values)
    assert selected["step"] == (1 + values.index(max(values))) * STEPS_PER_EPOCH
    assert parts["test"]["ndcg@10"] != pytest.approx(max(values), abs=1e-3)

    settings = settings_of(pretrained.root, "two", {"cluster": {"num_workers": 2}})
    outputs = run_ranks(2, train_worker, settings, quiet)
    assert outputs[0] == outputs[1]
    shared = logged(pretrained.root, "train", "two")
    assert shared.keys() == rows.keys()
    for step, row in rows.items():
        assert shared[step]["train/loss"] == pytest.approx(row["train/loss"], rel=1e-4)


def test_patience_ends_training_and_the_best_is_handed_on(pretrained: Pretrained) -> None:
    root = pretrained.root
    settings = settings_of(root, "patient", PATIENT)
    [outputs] = run_ranks(1, train_on_script, settings)
    assert outputs["steps"] == outputs["last_checkpoint"]["step"] == 4 * STEPS_PER_EPOCH
    assert outputs["checkpoint"]["step"] == 2 * STEPS_PER_EPOCH
    assert (outputs["best_value"], outputs["best_epoch"]) == (0.3, 2)
    assert outputs["checkpoint"]["hash"] != outputs["last_checkpoint"]["hash"]

    # A finished stage trains no more, and names the same checkpoints.
    assert run_ranks(1, train_on_script, settings, 4) == [outputs]

    # Interrupted after a validation without a new best, it still stops one validation later.
    cut = settings_of(root, "cut", PATIENT)
    assert run_ranks(1, train_on_script, cut, 4) == [None]
    [resumed] = run_ranks(1, train_on_script, cut)
    without = ("checkpoint", "last_checkpoint")
    assert {k: v for k, v in resumed.items() if k not in without} == {
        k: v for k, v in outputs.items() if k not in without
    }
    assert resumed["checkpoint"]["step"] == 2 * STEPS_PER_EPOCH
    assert logged(root, "train", "cut") == logged(root, "train", "patient")


def test_without_validation_the_last_step_is_handed_on(pretrained: Pretrained) -> None:
    blocks = {"training": {"epochs": 2, "max_steps": 7, "validation": None}}
    settings = settings_of(pretrained.root, "unselected", blocks)
    [outputs] = run_ranks(1, train_worker, settings, quiet)
    assert outputs["selected_on"] == "last step" and outputs["best_value"] is None
    assert outputs["checkpoint"] == outputs["last_checkpoint"]
    assert outputs["steps"] == 7
    assert list(logged(pretrained.root, "train", "unselected")) == list(range(1, 8))


def test_a_checkpoint_of_another_training_is_not_resumed(pretrained: Pretrained) -> None:
    """Copied into the directory by hand, though of the same data and the same shapes."""
    blocks = {"training": {"epochs": 1, "max_steps": 2, "validation": None}}
    theirs, ours = (settings_of(pretrained.root, name, blocks) for name in ("theirs", "ours"))
    run_ranks(1, train_worker, theirs, quiet)
    layout = RunLayout(str(pretrained.root))
    shutil.copytree(layout.checkpoints("train", "theirs"), layout.checkpoints("train", "ours"))
    refusal = (
        r"saved by another training \(theirs\) than the one whose directory it lies in \(ours\)"
    )
    with pytest.raises(AssertionError, match=refusal):
        run_ranks(1, train_worker, ours, quiet)
