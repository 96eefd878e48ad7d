"""metrics.jsonl and TensorBoard events: appended, resumed, and readable after a kill."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.storage import exists, list_names, remove
from trainer.monitor.tracker import Tracker, read_rows


def steps(url: str) -> list[int]:
    return [row.step for row in read_rows(url)]


def events(directory: Path) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(directory / "tensorboard"))
    accumulator.Reload()
    return [(e.step, e.value) for e in accumulator.Scalars("train/loss")]


def write(url: str, first: int, last: int, resumed: int | None, loss: float) -> None:
    with Tracker(url, resumed_step=resumed) as tracker:
        for step in range(first, last + 1):
            tracker.log(step, {"train/loss": loss + step, "validation/ndcg@10": 0.5})


def test_rows_and_events_hold_what_was_logged(tmp_path: Path) -> None:
    write(str(tmp_path), 1, 3, None, 10.0)
    rows = read_rows(str(tmp_path))
    assert [(r.step, r.values["train/loss"]) for r in rows] == [(1, 11.0), (2, 12.0), (3, 13.0)]
    assert events(tmp_path) == [(1, 11.0), (2, 12.0), (3, 13.0)]


def test_resuming_replaces_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    write(str(tmp_path), 1, 8, None, 10.0)
    write(str(tmp_path), 6, 9, 5, 20.0)
    rows = read_rows(str(tmp_path))
    assert [r.values["train/loss"] for r in rows] == [11, 12, 13, 14, 15, 26, 27, 28, 29]
    assert events(tmp_path) == [(r.step, r.values["train/loss"]) for r in rows]


def test_a_validation_that_is_made_again_replaces_its_row_and_no_other(tmp_path: Path) -> None:
    url = str(tmp_path)
    with Tracker(url) as tracker:
        for step in (1, 2):
            tracker.log(step, {"train/loss": 0.5})
            tracker.log(step, {"validation/ndcg@10": 0.1})
    with Tracker(url, 2, unjudged=True) as tracker:
        tracker.log(2, {"validation/ndcg@10": 0.2})
    rows = [(row.step, *row.values.values()) for row in read_rows(url)]
    assert rows == [(1, 0.5), (1, 0.1), (2, 0.5), (2, 0.2)]


def test_starting_afresh_leaves_nothing_of_the_old(tmp_path: Path) -> None:
    write(str(tmp_path), 1, 8, None, 10.0)
    write(str(tmp_path), 1, 2, None, 30.0)
    assert steps(str(tmp_path)) == [1, 2]
    assert events(tmp_path) == [(1, 31.0), (2, 32.0)]


def test_a_truncated_last_line_is_passed_over_and_dropped_on_resume(tmp_path: Path) -> None:
    write(str(tmp_path), 1, 4, None, 10.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert steps(str(tmp_path)) == [1, 2, 3]
    write(str(tmp_path), 4, 5, 3, 10.0)
    assert steps(str(tmp_path)) == [1, 2, 3, 4, 5]


def test_damage_elsewhere_names_the_line(tmp_path: Path) -> None:
    write(str(tmp_path), 1, 4, None, 10.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 2,', '"stop": 2,'))
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        read_rows(str(tmp_path))


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with Tracker(str(tmp_path)) as tracker:
        tracker.log(1, {"train/loss": math.inf, "train/lr": 0.1})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["values"] == {"train/loss": None, "train/lr": 0.1}
    assert math.isnan(read_rows(str(tmp_path))[0].values["train/loss"])


def test_a_stage_that_has_not_logged_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(str(tmp_path / "absent")) == []


def test_storage_that_cannot_append_gets_whole_files_at_each_flush() -> None:
    url = "memory://tracker-test/train"
    remove(url)
    tracker = Tracker(url)
    tracker.log(1, {"train/loss": 1.0})
    assert steps(url) == []
    tracker.flush()
    assert steps(url) == [1]
    tracker.log(2, {"train/loss": 2.0})
    tracker.close()
    tracker.close()
    write(url, 2, 3, 1, 0.0)
    assert steps(url) == [1, 2, 3]
    assert len(list_names(f"{url}/tensorboard")) == 2
    assert exists(f"{url}/metrics.jsonl")


def test_every_logged_row_survives_a_kill(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import os, signal
        from trainer.monitor.tracker import Tracker
        tracker = Tracker({str(tmp_path)!r})
        for step in range(1, 8):
            tracker.log(step, {{"train/loss": 1.0}})
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    dead = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False)
    assert dead.returncode == -9
    assert steps(str(tmp_path)) == list(range(1, 8))


def test_a_full_disk_is_one_sentence_and_replaces_no_other(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import resource, signal
        from configs.storage_faults import StorageError
        from trainer.monitor.tracker import Tracker

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as if the disk were full: an OSError
        tracker = Tracker({str(tmp_path)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, -1))
        try:
            with tracker:
                try:
                    while True:
                        tracker.log(1, {{"train/loss": 1.0}})
                except StorageError as error:
                    print(error)
                raise ValueError("what came first")
        except ValueError as error:
            print(error)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        timeout=60,
        check=False,
        capture_output=True,
        text=True,
    )
    told, first = ended.stdout.splitlines()
    assert told.startswith(f"{tmp_path} cannot be written (") and "free space there" in told
    assert first == "what came first" and "metrics of the last steps may be lost" in ended.stderr


def test_events_that_find_no_room_are_told_by_the_call_and_nothing_else(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import resource
        from trainer.monitor.event_file import EventFile
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        events = EventFile({str(tmp_path)!r})
        try:
            for step in range(1000):
                events.log(step, {{"train/loss": 1.0}}, 0.0)
                events.flush()
        except OSError as error:
            print(step, error.strerror)
        """
    )
    root = Path(__file__).parents[3]
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    step, told = ended.stdout.strip().split(" ", 1)
    assert 10 < int(step) < 200
    assert told == "File too large"
