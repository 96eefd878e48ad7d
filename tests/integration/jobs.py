"""Small real jobs for the integration tests: raw logs on disk, a recipe, a process to kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from configs import storage

ROOT = Path(__file__).resolve().parents[2]
USERS, ITEMS, EVENTS = 96, 40, 16


def write_log(path: Path, seed: int = 0) -> None:
    """A CSV log in which users walk through the items in steps of one or two, and rate them."""
    rng = np.random.default_rng(seed)
    step = rng.integers(1, 3, (USERS, EVENTS)).cumsum(1)
    items = (rng.integers(0, ITEMS, (USERS, 1)) + step) % ITEMS
    times = 1_600_000_000 + rng.integers(60, 86_400, (USERS, EVENTS)).cumsum(1)
    ratings = np.where(items % 3 == 0, 1, 5)
    users = np.repeat(np.arange(USERS), EVENTS)
    rows = zip(users, items.ravel(), times.ravel(), ratings.ravel(), strict=True)
    lines = [f"u{u},i{i},{t},{r}" for u, i, t, r in rows]
    path.write_text("user,item,time,stars\n" + "\n".join(lines) + "\n")


def write_items(path: Path) -> None:
    """A CSV of what the log's items are: odd or even, and since which day there are any."""
    rows = [
        f"i{n},Item {n},{('even', 'odd')[n % 2]},2020-01-{1 + n // 2:02d}" for n in range(ITEMS)
    ]
    path.write_text("\n".join(["item,title,kind,released", *rows, ""]))


def write_recipe(directory: Path, **overrides: Any) -> Path:
    """A recipe that runs every stage on the log in seconds."""
    write_log(directory / "events.csv")
    write_items(directory / "items.csv")
    recipe: dict[str, Any] = {
        "name": "tiny",
        "output": str(directory / "run"),
        "seed": 5,
        "data": {
            "source": {
                "kind": "csv",
                "url": str(directory / "events.csv"),
                "columns": {"user": "user", "item": "item", "timestamp": "time", "rating": "stars"},
                "item_text": {
                    "url": str(directory / "items.csv"),
                    "format": "csv",
                    "features": ["kind", "released"],
                },
            },
            "shards": {"num_shards": 2, "rows_per_group": 16},
            "loader": {"global_batch": 16, "max_length": 12},
        },
        "model": {"kind": "hstu", "width": 16, "qk_width": 16, "v_width": 16, "dropout": 0.1},
        "sharding": {"default": "row_wise"},
        "objective": {"kind": "sampled_softmax", "num_negatives": 16, "shared": "sequence"},
        "training": {"epochs": 10, "log_every_steps": 1, "checkpoint": {"every_steps": 4}},
        "alignment": {
            "kind": "dpo",
            "epochs": 1,
            "pairs_per_step": 16,
            "log_every_steps": 1,
            "checkpoint": {"every_steps": 8},
        },
        "evaluation": {"ks": [1, 5, 10], "users_per_batch": 32},
        "recommend": {"num_users": 1, "top_k": 5},
        "cluster": {"num_workers": 2},
    }
    recipe.update(overrides)
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(*arguments: str, variables: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `tandem …` in a session of its own, so that all of it can be killed at once."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A suite that a shell started in the background ignores Ctrl-C, and so would the job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(job: subprocess.Popen[str], timeout: float = 1200) -> str:
    """Wait for a job; its output. Fails with the output if the job failed; ends a late one."""
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not done in {timeout:.0f} s:\n{kill_everything(job)}") from None
    assert job.returncode == 0, f"exit {job.returncode}:\n{output}"
    return output


def kill_everything(job: subprocess.Popen[str]) -> str:
    """`kill -9` of the driver and of every process it started; what it had printed."""
    victims = _descendants(job.pid) | {job.pid}
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return job.communicate()[0]


def kill_one_worker(job: subprocess.Popen[str]) -> None:
    """`kill -9` of one rank of the job's worker group."""
    workers = workers_below(job.pid)
    assert workers, "the job has no worker to kill"
    os.kill(min(workers), signal.SIGKILL)


def workers_below(root: int) -> set[int]:
    """Ranks of worker groups among the descendants of a process."""
    return {pid for pid in _descendants(root) if b"RayTrainWorker" in _command(pid)}


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _descendants(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found = {root}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return found - {root}
        found |= more


def wait_for(
    condition: Any, timeout: float = 900, job: subprocess.Popen[str] | None = None
) -> None:
    """Poll until `condition()` holds; fails when `job`, which is to bring it about, has ended."""
    limit = time.monotonic() + timeout
    while not condition():
        if job is not None and job.poll() is not None:
            raise AssertionError(f"the job ended before:\n{job.communicate()[0]}")
        if time.monotonic() > limit:
            printed = "" if job is None else kill_everything(job)
            raise AssertionError(f"what the test waits for never happened:\n{printed}")
        time.sleep(0.05)


def checkpoints(run: Path, stage: str) -> set[Path]:
    """Manifests of a stage's newest committed checkpoints."""
    return set(run.glob(f"checkpoints/{stage}-*/newest/*/MANIFEST.json"))


def losses(run: Path, stage: str) -> dict[int, float]:
    """Step → training loss that a stage recorded."""
    (directory,) = (run / "metrics").glob(f"{stage}-*")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["values"]["train/loss"] for r in rows if "train/loss" in r["values"]}


def results(run: Path) -> dict[str, Any]:
    """results.json of a run."""
    value: dict[str, Any] = storage.read_json(str(run / "results.json"))
    return value


def measured(run: Path) -> dict[str, Any]:
    """Metrics of every policy, without the checkpoint's hash, which covers the run's own paths."""
    models = results(run)["models"]
    return {n: {k: v for k, v in m.items() if k != "checkpoint"} for n, m in models.items()}
