"""What a training stage does about the checkpoints it finds."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from configs import storage
from configs.layout import RunLayout, weights_hash
from sharding.checkpoint import CheckpointStore
from sharding.checkpoint_manifest import MANIFEST
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, make_policy
from trainer.guardrails import WatchState
from trainer.stage_outcome import stage_outcome
from trainer.stage_stores import StageStores
from trainer.trainer import TrainerState
from trainer.training_stage import tell_damage


def start_after(root: str, damaged: str) -> tuple[list[str], str]:
    """Save twice, cut the file `damaged` of every checkpoint; what a stage tells, and its refusal.

    Without the manifest a directory is what a killed save leaves.
    """
    policy = make_policy(current_context("cpu"), Settings())
    store = CheckpointStore(root, 2, policy.ctx)
    for step in (1, 2):
        store.save(policy, step, {}, {}, {})
    for name in storage.list_names(root):
        path = Path(root) / name / damaged
        path.unlink() if damaged == MANIFEST else os.truncate(path, 1)
    told: list[str] = []
    info = store.newest()
    assert info is None
    try:
        tell_damage("pretrain", store, info, told.append)
    except ValueError as error:
        return told, str(error)
    return told, ""


def test_a_stage_does_not_start_over_where_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    told, refusal = run_ranks(1, start_after, str(tmp_path / "root"), "state.json")[0]
    assert told == []  # the refusal says it all, once
    assert "every checkpoint of stage 'pretrain' is damaged" in refusal
    assert refusal.count("state.json has 1 bytes") == 2
    assert "`tandem pretrain RECIPE --force`" in refusal


def told_and_logged(root: str) -> tuple[list[str], list[str]]:
    """Save twice, cut a file of the newest checkpoint; what a stage tells, and what is logged."""
    policy = make_policy(current_context("cpu"), Settings())
    store = CheckpointStore(root, 2, policy.ctx)
    for step in (1, 2):
        store.save(policy, step, {}, {}, {})
    os.truncate(Path(root) / storage.list_names(root)[-1] / "state.json", 1)
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sharding").addHandler(handler)
    told: list[str] = []
    tell_damage("pretrain", store, store.newest(), told.append)
    return told, logged


def test_a_damaged_checkpoint_is_reported_once(tmp_path: Path) -> None:
    told, logged = run_ranks(1, told_and_logged, str(tmp_path / "root"))[0]
    assert len(told) == 1 and "is skipped" in told[0] and logged == []


def test_a_stage_starts_where_only_unfinished_saves_are_left(tmp_path: Path) -> None:
    assert run_ranks(1, start_after, str(tmp_path / "root"), MANIFEST)[0] == ([], "")


def outcomes(root: str) -> tuple[dict[str, dict[str, Any]], list[str], list[str]]:
    """What a stage whose step 4 was best, and 6 the last, ends with as more and more is damaged;
    what it tells, and what it refuses with."""
    ctx, layout = current_context("cpu"), RunLayout(root)
    stores = StageStores.below(layout, "train", "f", 2, ctx)
    names = {
        (kind, step): CheckpointStore(url, 3, ctx)
        .write(step, {"w": torch.full((8,), float(step))}, {"state.json": {"of": kind}}, {})
        .name
        for kind, url, steps in (
            ("best", stores.best.root, (2, 4)),
            ("good", stores.good.root, (1, 5, 9)),  # the last by a run that was cut off
            ("newest", stores.newest.root, (4, 6)),
        )
        for step in steps
    }
    values = {2: 0.1, 4: 0.3, 6: 0.2}
    alarm = {"step": 6, "action": "stop", "reason": "fell"}
    plain = TrainerState(
        best=names["best", 4],
        good=names["good", 5],
        validations=[{"step": s, "epoch": s - 1, "ndcg@10": value} for s, value in values.items()],
    )
    acted = replace(plain, watch=WatchState(alarms=[alarm]))
    told, refused = list[str](), list[str]()

    def outcome(state: TrainerState, *damaged: tuple[str, int]) -> dict[str, Any]:
        for kind, step in damaged:
            place = Path(layout.best("train", "f")).parent / kind / names[kind, step]
            os.truncate(place / "__0_0.distcp", 1)
        try:
            return stage_outcome(state, stores, "ndcg@10", ctx, told.append)
        except ValueError as error:
            refused.append(str(error))
            return {}

    found = {
        "whole": outcome(plain),
        "twin": outcome(plain, ("best", 4)),
        "after a guardrail": outcome(acted),
        "good": outcome(replace(acted, best=None)),
        "nothing known": outcome(replace(plain, best=None)),
        "earlier good": outcome(replace(acted, best=None), ("good", 5)),
        "last": outcome(plain, ("newest", 4)),
        "none": outcome(acted, ("best", 2)),
        "newest": outcome(plain, ("newest", 6)),
    }
    return found, told, refused


def test_a_stage_ends_with_the_best_that_is_whole(tmp_path: Path) -> None:
    found, told, refused = run_ranks(1, outcomes, str(tmp_path))[0]
    ends = {
        case: (each["checkpoint"]["url"].split("/")[-2], each["checkpoint"]["step"])
        for case, each in found.items()
        if each
    }
    assert ends == {
        "whole": ("best", 4),
        "twin": ("newest", 4),
        "after a guardrail": ("best", 2),
        "good": ("good", 5),
        "nothing known": ("good", 5),
        "earlier good": ("good", 1),
        "last": ("newest", 6),
    }
    assert [found[case]["best_value"] for case in ends] == [0.3, 0.3, 0.1, None, None, None, 0.2]
    assert [found[case]["best_epoch"] for case in ends] == [4, 4, 2, None, None, None, 6]
    assert len(told) == 4 and all("__0_0.distcp has 1 bytes" in sentence for sentence in told)
    assert found["twin"]["checkpoint"]["url"] in told[0]
    whole, twin = found["whole"]["checkpoint"], found["twin"]["checkpoint"]
    assert whole["hash"] != twin["hash"] and weights_hash(whole) == weights_hash(twin)
    assert weights_hash(found["last"]["checkpoint"]) != weights_hash(whole)
    assert "nothing else that the stage could end with is whole: restore its files" in refused[0]
    assert refused[1].endswith("run the same command again") and len(refused) == 2
