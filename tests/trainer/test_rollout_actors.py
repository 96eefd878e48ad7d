"""Groups from Ray actors: how old they may be, and what becomes of killed actors and of runs."""

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

from configs.cluster import ClusterConfig
from data_loaders.synthetic import write_synthetic
from launch.cluster import connect
from tests.harness import run_ranks
from tests.trainer.runs import ITEMS, USERS, assert_named, logged, quiet
from tests.trainer.test_align import InterruptedRunError
from tests.trainer.test_align_online import STEPS_PER_EPOCH, settings_for
from trainer.align import align_worker
from trainer.pretrain import train_worker
from trainer.rewards.group import Group

STEPS = 2 * STEPS_PER_EPOCH
SLOW_S = 1.5
TIMEOUT_S = 400.0
REWARDS = [{"kind": "hit"}, {"kind": "function", "path": f"{__name__}:slow_at_first"}]
_asked = 0


def slow_at_first(group: Group) -> Tensor:
    """Even items are better; the first batch is rewarded so slowly that actors run ahead."""
    global _asked
    _asked += 1
    if _asked == 1:
        time.sleep(SLOW_S)
    return ((group.items % 2 == 0) & group.legal).float()


def actor_processes() -> list[psutil.Process]:
    """Rollout actors below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RolloutActor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:  # or what is left of one
            continue
    return found


class Events:
    """A `say` that kills the actors at the start, and maybe the run at a validation."""

    def __init__(self, kills: bool, interrupts: bool) -> None:
        self.kills, self.interrupts = kills, interrupts
        self.killed = 0

    def __call__(self, line: str) -> None:
        if self.kills and "at the start" in line:
            for process in actor_processes():
                process.kill()
                self.killed += 1
        if self.interrupts and line.startswith("validation after epoch 1"):
            raise InterruptedRunError


def align_with_actors(settings: dict[str, Any], kills: bool, interrupts: bool) -> tuple[int, str]:
    """Actors killed, and why the run ended if it did; no actor outlives it."""
    events, why = Events(kills, interrupts), ""
    with connect(ClusterConfig(num_workers=1, start_timeout_s=300)):
        try:
            align_worker(settings, events)
        except InterruptedRunError:
            why = "interrupted"
        except RuntimeError as error:
            why = str(error)
        deadline = time.monotonic() + 20
        while actor_processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not actor_processes()
    return events.killed, why


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("actors")
    write_synthetic(str(path / "data"), USERS, ITEMS, 9, 3, rows_per_group=16)
    return path


@pytest.fixture(scope="module")
def start(root: Path) -> dict[str, Any]:
    [outputs] = run_ranks(1, train_worker, settings_for(root, "pretrain", "hstu"), quiet)
    checkpoint: dict[str, Any] = outputs["checkpoint"]
    return checkpoint


def run(
    root: Path,
    start: dict[str, Any],
    name: str,
    how: tuple[bool, bool],
    more: dict[str, Any] | None = None,
    **actors: Any,
) -> Any:
    more = {"rewards": REWARDS, "rollout_actors": actors} | (more or {})
    settings = settings_for(root, name, "hstu", start=start, **more)
    [ended] = run_ranks(1, align_with_actors, settings, *how, timeout=TIMEOUT_S)
    rows = logged(root, "align", name)
    if 1 in rows:
        assert_named(settings, rows)
    return *ended, rows


def test_groups_grow_no_older_than_allowed_through_kills_and_resume(
    root: Path, start: dict[str, Any]
) -> None:
    """Six batches are asked for ahead, and answered while the first is rewarded: of these only two
    are young enough."""
    limits = {"ahead": 6, "max_staleness": 1}
    killed, why, cut = run(root, start, "cut", (True, True), **limits)
    assert (killed, why) == (1, "interrupted")  # the actor came back, and its groups with it
    assert 2 <= max(cut) < STEPS
    killed, why, rows = run(root, start, "cut", (False, False), **limits)
    assert (killed, why) == (0, "")
    steps = [step for step in rows if step]
    assert steps == list(range(1, STEPS + 1))
    ages = [rows[step]["train/staleness"] for step in steps]
    assert ages[0] == 0 and max(ages) == 1
    assert rows[1]["train/ratio"] == pytest.approx(1.0, abs=1e-5)  # the actor's π is the loss's
    stale = next(step for step in steps if rows[step]["train/staleness"] == 1)
    assert abs(rows[stale]["train/ratio"] - 1) > 1e-5
    assert rows[1]["train/dropped"] == 0 < rows[max(steps)]["train/dropped"] < 1
    assert all(rows[step]["train/queue_wait"] >= 0 for step in steps)


def test_an_actor_that_dies_too_often_is_told(root: Path, start: dict[str, Any]) -> None:
    killed, why, _ = run(root, start, "dead", (True, False), max_restarts=0)
    assert killed == 1
    assert "alignment.rollout_actors.max_restarts=0 allows" in why


def test_after_a_roll_back_nothing_is_trained_that_the_abandoned_policy_generated(
    root: Path, start: dict[str, Any]
) -> None:
    """Its steps run on, so that its groups are young: they were asked for before the roll-back."""
    limit = {"metric": "ratio", "min": 2.0, "action": "roll_back"}  # broken by every window
    guardrails = {"limits": [limit], "window": 3, "max_rollbacks": 1}
    more = {"guardrails": guardrails, "validation": None, "rewards": REWARDS[:1], "epochs": 4}
    _, why, rows = run(root, start, "back", (False, False), more, ahead=1, max_staleness=4)
    assert (why, max(rows)) == ("", 6)
    assert rows[4]["train/staleness"] == 0
    assert rows[4]["train/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert rows[4]["train/kl"] == pytest.approx(0.0, abs=1e-6)  # the start again
