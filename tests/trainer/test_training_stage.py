"""What a training stage does about the checkpoints it finds."""

import logging
import os
from pathlib import Path

from configs import storage
from sharding.checkpoint import CheckpointStore
from sharding.checkpoint_manifest import MANIFEST
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, make_policy
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
