"""When the watchdog barks, and whom the reports of a group accuse."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from configs import storage
from configs.failures import HangConfig
from configs.storage_faults import StorageError
from trainer import watchdog
from trainer.watchdog import EXIT_STATUS, Watchdog, diagnose_hang


def watch(tmp_path: Path, ended: list[int], **config: Any) -> Watchdog:
    hang = HangConfig.model_validate(config)
    return Watchdog(hang, str(tmp_path), stage="train", rank=0, end=ended.append)


def test_signs_of_life_keep_it_quiet(tmp_path: Path) -> None:
    ended: list[int] = []
    with watch(tmp_path, ended, step_timeout_s=1.0) as dog:
        for step in range(6):
            dog.sign(step, "updating")
            time.sleep(0.3)
        dog.sign(6, "validating")  # which may take longer
        time.sleep(1.5)
    assert ended == [] and list(tmp_path.iterdir()) == []
    with watch(tmp_path, ended, step_timeout_s=None):
        time.sleep(0.1)
    assert threading.active_count() < 50 and ended == []


@pytest.mark.parametrize("phase", ["loading", "validating", "saving"])
def test_every_phase_has_its_limit(
    tmp_path: Path, phase: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "SETTLE_S", 0.1)
    ended: list[int] = []
    limit = "validation_timeout_s" if phase == "validating" else "step_timeout_s"
    with watch(tmp_path, ended, **{limit: 0.3}) as dog:
        dog.sign(4, phase)
        time.sleep(3)
    assert ended == [EXIT_STATUS]
    sentence = diagnose_hang(str(tmp_path), 0.0, 1)
    assert sentence is not None and f"after step 4, while {phase}, at `time.sleep(3)`" in sentence


def report(tmp_path: Path, rank: int, waits: bool, step: int = 3) -> None:
    content = {"rank": rank, "step": step, "phase": "updating", "seconds": 9.0, "time": 100.0}
    content |= {"stage": "train", "other_threads": {}}
    content |= {"waits_for_others": waits, "host": "h", "process": 1, "stack": "  at x\n    x()\n"}
    storage.write_sealed(str(tmp_path / f"hang-train-{rank}-rank-{rank}.json"), content)


def test_the_accused_are_those_that_wait_for_nobody(tmp_path: Path) -> None:
    assert diagnose_hang(str(tmp_path), 0.0, 3) is None
    for rank in (0, 2):
        report(tmp_path, rank, waits=True)
    sentence = diagnose_hang(str(tmp_path), 0.0, 3)
    assert sentence is not None and sentence.startswith("rank 1 gave no sign of life")
    report(tmp_path, 1, waits=True)
    sentence = diagnose_hang(str(tmp_path), 0.0, 3)
    assert sentence is not None and "every rank waits for the others after step 3" in sentence
    report(tmp_path, 1, waits=False)
    sentence = diagnose_hang(str(tmp_path), 0.0, 3)
    assert sentence is not None and sentence.startswith("rank 1 (host h, process 1) made no")
    assert diagnose_hang(str(tmp_path), 101.0, 3) is None
    changed = tmp_path / "hang-train-1-rank-1.json"  # it accuses nobody of what it did not write
    changed.write_text(changed.read_text().replace("at x", "at y"))
    sentence = diagnose_hang(str(tmp_path), 0.0, 3)
    assert sentence is not None and sentence.startswith("rank 1 gave no sign of life")


def test_a_report_that_cannot_be_read_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old one of another user's, say: whatever ends the group now is told as it is."""
    (tmp_path / "hang-train-1-rank-0.json").write_text("{}")

    def refused(url: str) -> None:
        raise StorageError(f"{url} cannot be read")

    monkeypatch.setattr(storage, "read_json", refused)
    assert diagnose_hang(str(tmp_path), 0.0, 1) is None
