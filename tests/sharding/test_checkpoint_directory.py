"""Which checkpoints stay, whoever wrote them."""

from pathlib import Path

from configs import storage
from sharding.checkpoint_directory import CheckpointDirectory
from sharding.checkpoint_manifest import MANIFEST


def save(root: Path, directory: CheckpointDirectory, step: int, *needed: int) -> list[int]:
    """Commit a checkpoint, and remove what is too old; the steps of those that stay."""
    name = directory.fresh_name(step)
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
    failed = tmp_path / ours.fresh_name(3)
    failed.mkdir()
    ours.remove_debris()
    assert not failed.exists()
