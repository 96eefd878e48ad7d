"""Which checkpoints stay, whoever wrote them."""

import errno
from pathlib import Path

import pytest
import torch

from configs import storage
from sharding.checkpoint import CheckpointError, CheckpointStore
from sharding.checkpoint_directory import CheckpointDirectory
from sharding.checkpoint_manifest import MANIFEST
from sharding.process_group import current_context


def save(root: Path, directory: CheckpointDirectory, step: int, *needed: int) -> list[int]:
    """Commit a checkpoint, and remove what is too old; the steps of those that stay."""
    name = directory.fresh_name(step)
    directory.claim(name)
    storage.write_bytes(str(root / name / MANIFEST), b"{}")
    steps = {int(each.split("-")[1]): each for each in directory.committed()}
    directory.prune(name, 2, (), [steps[each] for each in needed])
    return [int(each.split("-")[1]) for each in directory.committed()]


def test_a_run_that_was_overtaken_removes_nothing_that_is_ahead_of_it(tmp_path: Path) -> None:
    first, second = CheckpointDirectory(str(tmp_path)), CheckpointDirectory(str(tmp_path))
    assert save(tmp_path, first, 100) == [100]
    assert save(tmp_path, second, 400) == [400, 100]
    assert save(tmp_path, second, 500) == [500, 400]
    assert save(tmp_path, first, 120) == [120, 500, 400]  # it wakes up, and goes on
    assert save(tmp_path, first, 140) == [140, 120, 500, 400]
    assert save(tmp_path, first, 160) == [160, 140, 500, 400]
    assert save(tmp_path, second, 600) == [600, 160]


def test_what_was_left_further_on_goes_once_it_is_passed(tmp_path: Path) -> None:
    before, resumed = CheckpointDirectory(str(tmp_path)), CheckpointDirectory(str(tmp_path))
    for step in (5, 10):
        save(tmp_path, before, step)
    assert save(tmp_path, resumed, 6) == [6, 10]
    assert save(tmp_path, resumed, 8) == [8, 6, 10]
    assert save(tmp_path, resumed, 10) == [10, 8]


def test_what_is_needed_stays(tmp_path: Path) -> None:
    directory = CheckpointDirectory(str(tmp_path))
    for step in range(1, 5):
        save(tmp_path, directory, step, 1)
    assert save(tmp_path, directory, 5, 1) == [5, 4, 1]
    assert save(tmp_path, directory, 6) == [6, 5]


def test_names_sort_after_all_before_even_those_that_are_not_there_yet(tmp_path: Path) -> None:
    directory = CheckpointDirectory(str(tmp_path))
    names = [directory.fresh_name(step) for step in (3, 1, 2)]
    ahead = f"step-00000001-{int(names[-1].split('-')[2], 16) + 10**18:016x}"  # of a fast clock
    storage.write_bytes(str(tmp_path / ahead / MANIFEST), b"{}")
    names += [ahead, directory.fresh_name(1), directory.fresh_name(1)]
    times = [name.split("-")[2] for name in names]
    assert times == sorted(set(times))


def test_only_the_first_sweep_takes_what_others_left(tmp_path: Path) -> None:
    """Later, another run may be at a save: of one that this run took over from, or that took it."""
    ours = CheckpointDirectory(str(tmp_path))
    for step in (1, 2):
        debris = tmp_path / CheckpointDirectory(str(tmp_path)).fresh_name(step)
        debris.mkdir()
        ours.remove_debris()
        assert debris.exists() == (step == 2)


def test_a_failed_save_leaves_nothing_by_whichever_store_it_was_named(tmp_path: Path) -> None:
    policy, reference = (
        CheckpointStore(str(tmp_path / place), 2, current_context("cpu"))
        for place in ("policy", "policy/reference")
    )
    for step in (1, 2):
        name = policy.next_name(step)
        reference.write(step, {"x": torch.zeros(3)}, {}, {}, name)
        policy.write(step, {"x": torch.zeros(3)}, {}, {}, name)
    for store in (reference, policy):
        name = policy.next_name(3)
        with pytest.raises(CheckpointError, match="not JSON serializable.*earlier ones are intact"):
            store.write(3, {"x": torch.zeros(3)}, {"state.json": {"x": object()}}, {}, name)
        assert len(store.names()) == 2 and name not in storage.list_names(store.root)


def test_a_removal_that_fails_is_repeated_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, CheckpointDirectory(str(tmp_path)), 1)
    ours = CheckpointDirectory(str(tmp_path))
    whole = storage.remove

    def fails(url: str) -> None:
        if not url.endswith(MANIFEST):
            raise OSError(errno.EIO, "Input/output error", url)
        whole(url)

    monkeypatch.setattr(storage, "remove", fails)
    for step in (2, 3, 4):
        save(tmp_path, ours, step)
    assert len(storage.list_names(str(tmp_path))) == 4
    monkeypatch.setattr(storage, "remove", whole)
    save(tmp_path, ours, 5)
    assert storage.list_names(str(tmp_path)) == sorted(ours.committed())


def test_a_manifest_that_the_storage_hides_for_a_moment_is_no_debris(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = "memory://late-manifest/newest"
    before = CheckpointDirectory(root)
    names = [_commit(root, before, step) for step in (4, 8)]
    hidden = storage.join(root, names[-1], MANIFEST)
    shown = storage.exists
    monkeypatch.setattr(storage, "exists", lambda url: url != hidden and shown(url))
    resumed = CheckpointDirectory(root)
    names.append(_commit(root, resumed, 12))
    monkeypatch.undo()
    assert resumed.committed() == names[::-1]
    assert storage.read_sealed(f"{root}/committed.json")["names"] == names

    resumed.remove(names[0])
    assert storage.read_sealed(f"{root}/committed.json")["names"] == names[1:]
    debris = storage.join(root, resumed.fresh_name(16), "part")
    storage.write_bytes(debris, b"")
    CheckpointDirectory(root).remove_debris()
    assert not storage.exists(debris) and resumed.committed() == names[:0:-1]


def _commit(root: str, directory: CheckpointDirectory, step: int) -> str:
    name = directory.fresh_name(step)
    directory.claim(name)
    storage.write_bytes(storage.join(root, name, MANIFEST), b"{}")
    directory.remember(name)
    return name


def test_a_name_of_no_clock_is_no_checkpoint(tmp_path: Path) -> None:
    """The next would have a digit more, and be found by nothing."""
    directory = CheckpointDirectory(str(tmp_path))
    (tmp_path / f"step-00000004-{'f' * 16}").mkdir()
    assert save(tmp_path, directory, 5) == [5]
    (tmp_path / f"step-00000004-7{'f' * 15}").mkdir()
    with pytest.raises(ValueError, match="named as of the end of time.*move it elsewhere"):
        directory.fresh_name(6)
