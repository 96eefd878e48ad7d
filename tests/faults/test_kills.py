"""After a kill, a full disk or SIGTERM the run goes on: samples, losses and state are equal."""

import os
import re
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from configs.storage_faults import StorageError
from sharding.checkpoint import CheckpointError
from tests.faults.conftest import EPOCHS
from tests.faults.trainings import (
    FILLER,
    FINGERPRINT,
    STEPS_PER_EPOCH,
    Course,
    Fault,
    attempt,
    course,
    saved_steps,
    settings,
    small_disk,
    steps_of,
    train,
    write_data,
)
from tests.harness import Ranks
from tests.trainer.runs import logged
from trainer import evaluate
from trainer.stop_notice import StoppedError


def test_the_calm_run_trains_every_sample_once_an_epoch(calm: Course) -> None:
    total = EPOCHS * STEPS_PER_EPOCH
    assert list(calm.losses) == list(range(1, total + 1))
    trained = sorted(s for ids in calm.samples.values() for s in ids)
    assert trained == sorted(list(range(80)) * EPOCHS)


@pytest.mark.parametrize(
    ("fault", "kept"),
    [
        (Fault("kill", 1, 10), (6, 9)),  # the save of step 9 may or may not be committed
        (Fault("kill before the files of a save", 1, 6), (3,)),
        (Fault("kill between the files of a save", 0, 6), (3,)),
        (Fault("kill within the file of a save", 1, 6), (3,)),
        (Fault("kill before the commit of a save", 0, 6), (3,)),
        (Fault("kill after the commit of a save", 0, 6), (6,)),
    ],
    ids=str,
)
def test_a_killed_rank(calm: Course, tmp_path: Path, fault: Fault, kept: tuple[int, ...]) -> None:
    write_data(tmp_path)
    outcomes = attempt(settings(tmp_path, EPOCHS), fault)
    assert outcomes[fault.rank] == -signal.SIGKILL
    assert isinstance(outcomes[1 - fault.rank], Exception)  # it says so, and does not hang
    assert saved_steps(tmp_path)[-1] in kept
    assert course(tmp_path, attempt(settings(tmp_path, EPOCHS))) == calm


def test_a_full_disk_is_a_sentence_and_costs_nothing_that_was_committed(
    calm: Course, tmp_path: Path
) -> None:
    write_data(tmp_path)
    outcomes = attempt(settings(tmp_path, EPOCHS), Fault("full disk", 1, 7))
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes), outcomes
    assert str(outcomes[0]) == str(outcomes[1])
    # The save of step 6 may have been written by then.
    told = re.search("step (6|9) could not be written to .* check space", str(outcomes[0]))
    assert told is not None and saved_steps(tmp_path) == ([3] if told[1] == "6" else [3, 6])
    assert course(tmp_path, attempt(settings(tmp_path, EPOCHS))) == calm


def test_a_disk_that_others_fill_costs_nothing_that_was_committed(
    calm: Course, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        write_data(disk)
        told = settings(disk, EPOCHS)
        outcomes = attempt(told, Fault("disk that others fill", 0, 7))
        # While the save, which runs behind training, has taken the rest, a row of metrics may be
        # what finds no room first: rank 0 says that, and rank 1 loses its peer.
        assert isinstance(outcomes[0], CheckpointError | StorageError), outcomes
        assert re.search("(could not|cannot) be written .*[Nn]o space", str(outcomes[0]))
        if isinstance(outcomes[0], CheckpointError):
            assert str(outcomes[0]) == str(outcomes[1])
        assert saved_steps(disk) in ([3], [3, 6])
        (disk / FILLER).unlink()
        assert course(disk, attempt(told)) == calm


@pytest.mark.parametrize("behind", [True, False])
def test_sigterm_to_one_rank_saves_at_one_step_of_all(
    calm: Course, tmp_path: Path, behind: bool
) -> None:
    write_data(tmp_path)
    checkpoint = {"every_steps": None, "every_epochs": None, "behind_training": behind}
    told = settings(tmp_path, EPOCHS, training={"checkpoint": checkpoint})
    outcomes = attempt(told, Fault("SIGTERM", 1, 7))  # when step 7 has begun
    assert [type(outcome) for outcome in outcomes] == [StoppedError] * 2, outcomes
    assert [outcome.step for outcome in outcomes] == [8, 8] == saved_steps(tmp_path) * 2
    steps = len(list(steps_of(tmp_path, 0).iterdir()))
    finished = course(tmp_path, attempt(told))
    assert finished == calm
    again = len(list(steps_of(tmp_path, 0).iterdir()))
    assert steps == 8 and again == len(calm.losses)  # no step was done twice


def told_while_validating(step: int, settings: dict[str, Any]) -> dict[str, str]:
    """Train where SIGTERM comes to rank 1 in the validation after a step, which takes for ever."""
    batches, validated = evaluate.evaluation_batches, [0]

    def endless(*args: Any, **kwargs: Any) -> Iterator[Any]:
        validated[0] += 2 * STEPS_PER_EPOCH  # every other epoch, and the last
        users = batches(*args, **kwargs)
        while min(validated[0], EPOCHS * STEPS_PER_EPOCH) == step:
            users = batches(*args, **kwargs)
            yield next(users)
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
        yield from users

    evaluate.evaluation_batches = endless  # type: ignore[assignment]
    return train(settings)


@pytest.mark.parametrize("step", [2 * STEPS_PER_EPOCH, EPOCHS * STEPS_PER_EPOCH])
def test_sigterm_within_a_validation_saves_first_and_validates_when_resumed(
    calm: Course, calm_root: Path, tmp_path: Path, step: int
) -> None:
    write_data(tmp_path)
    checkpoint = {"every_steps": None, "every_epochs": None}
    told = settings(tmp_path, EPOCHS, training={"checkpoint": checkpoint})
    with Ranks(2, partial(told_while_validating, step, told)) as ranks:
        outcomes = ranks.outcomes(240)
    assert [type(outcome) for outcome in outcomes] == [StoppedError] * 2, outcomes
    assert [outcome.step for outcome in outcomes] == [step, step] == saved_steps(tmp_path) * 2
    rows = logged(tmp_path, "train", FINGERPRINT)
    assert not any(tag.startswith("validation/") for tag in rows[step])
    found = course(tmp_path, attempt(told))
    assert (found.losses, found.samples) == (calm.losses, calm.samples)
    assert found.state == (calm.state if step < len(calm.losses) else {})  # no step was left to do
    assert logged(tmp_path, "train", FINGERPRINT) == logged(calm_root, "train", FINGERPRINT)


def test_sigterm_from_outside(calm: Course, tmp_path: Path) -> None:
    write_data(tmp_path)
    record = steps_of(tmp_path, 0)
    with Ranks(2, partial(train, settings(tmp_path, EPOCHS))) as ranks:
        limit = time.monotonic() + 120
        while not (record.exists() and any(record.iterdir())) and time.monotonic() < limit:
            time.sleep(0.01)
        for process in ranks.processes:  # as a machine that shuts down tells everybody
            process.terminate()
        outcomes = ranks.outcomes(120)
    if all(isinstance(outcome, dict) for outcome in outcomes):
        pytest.skip("the training was done before the signal came")
    assert {type(outcome) for outcome in outcomes} == {StoppedError}, outcomes
    assert saved_steps(tmp_path)[-1] == outcomes[0].step == outcomes[1].step
    assert course(tmp_path, attempt(settings(tmp_path, EPOCHS))) == calm
