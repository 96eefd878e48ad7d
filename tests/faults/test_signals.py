"""The run as a user starts it: told to end, its driver killed, then one of its workers told to end.

Where Ray Train would keep its snapshots by itself lies one that is cut short, and would block it.
"""

import os
import re
import signal
from pathlib import Path

import pytest

from configs.load import load_recipe
from tests.faults.trainings import attempt, course
from tests.integration.jobs import (
    checkpoints,
    finish,
    losses,
    start,
    wait_for,
    workers_below,
    write_recipe,
)

TRAINING = {
    "epochs": 30,
    "log_every_steps": 1,
    "validation": {"every_epochs": 20},
    "checkpoint": {"every_steps": 4},
}


def alive(pids: set[int]) -> bool:
    return any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids)


def driver_of(supervisor: int) -> int:
    """The process that the supervisor started."""
    [driver] = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return int(driver)


def newest_step(run: Path) -> int:
    return max(int(path.parent.name.split("-")[1]) for path in checkpoints(run, "train"))


@pytest.mark.slow
def test_told_to_end_killed_and_told_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    failures = {"driver": {"max_restarts": 1}}
    path = write_recipe(tmp_path, training=TRAINING, alignment=None, failures=failures)
    recipe = str(path)
    stale = tmp_path / "ray_results" / "pretrain-train_worker" / "checkpoint_manager_snapshot.json"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"version": 1, "latest_check')
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # what is compiled
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": cache}
    job = start("run", recipe, "--until", "train", variables=home)
    wait_for(lambda: checkpoints(run, "train"), job=job)
    # As a service manager or a scheduler does: the supervisor, the driver, and all daemons of Ray.
    os.killpg(job.pid, signal.SIGTERM)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 128 + signal.SIGTERM, output
    saved = re.search(r"asked to end .* is saved at step (\d+); the same command goes on", output)
    assert saved is not None and "within 120 s" in output, output
    step = newest_step(run)
    assert int(saved[1]) == step
    assert max(losses(run, "train")) == step  # no step was done and not saved

    before = checkpoints(run, "train")
    job = start("run", recipe, "--until", "train", variables=home)
    wait_for(lambda: checkpoints(run, "train") - before, job=job)
    workers = workers_below(job.pid)
    os.kill(driver_of(job.pid), signal.SIGKILL)  # the driver alone
    assert len(workers) == 2
    wait_for(lambda: not alive(workers), timeout=120)

    before = checkpoints(run, "train")
    wait_for(lambda: checkpoints(run, "train") - before, job=job)
    os.kill(max(workers_below(job.pid)), signal.SIGTERM)
    output = finish(job, timeout=600)
    assert f"resuming from step {step}" in output
    again = "the driver died (SIGKILL); starting the driver again, attempt 2 of 2"
    assert again in output and "resuming from step" in output.split(again)[1], output
    told = re.search(r"asked to end \(.* saved at step (\d+)", output)
    assert told is not None and "attempt 2 of 101" in output, output
    assert f"resuming from step {told[1]}" in output.split("attempt 2 of 101")[1]

    calm = tmp_path / "calm"
    calm.mkdir()
    (calm / "data").symlink_to(run / "data")
    settings = {
        "recipe": load_recipe(recipe, []).recipe.model_dump(mode="json"),
        "output": str(calm),
        "fingerprint": "calm",
        "semantic_ids": None,
        "start": None,
    }
    assert losses(run, "train") == course(calm, attempt(settings)).losses
