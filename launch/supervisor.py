"""A small process above the driver that starts it again when it dies, as the recipe allows.

It imports no Ray, holds no data, and hands signals on; what dies with its whole machine is for
Slurm, Kubernetes or whoever started the run.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, TracebackType
from typing import Any

from configs import storage
from configs.cluster import split_address
from configs.layout import RunLayout
from configs.recipe import Recipe
from configs.terminal import say
from launch.address import answers
from launch.termination import ENDINGS

SUPERVISED = "TANDEM_SUPERVISED"
"""Set in the environment of a driver that has a supervisor: the file of its `Begun`."""
ENDED = {0, 2, *(128 + number for number in ENDINGS)}
"""Exit statuses of a driver that is done: finished, told what is wrong, or asked to end."""
POLL_S = 0.5


class Begun:
    """What one command has begun anew, in this driver and in those of its before this one.

    So a stage is begun anew once, however often the driver dies, and before that or after.
    """

    def __init__(self) -> None:
        self._file = os.environ.get(SUPERVISED)  # without a supervisor there is no driver before

    def note(self, step: str) -> None:
        """Remember `step`."""
        if self._file is not None:
            with open(self._file, "a") as stream:
                stream.write(step + "\n")

    def __contains__(self, step: str) -> bool:
        if self._file is None or not os.path.exists(self._file):
            return False
        return step in Path(self._file).read_text().splitlines()


def wants_supervisor(recipe: Recipe) -> bool:
    """Whether this process shall be the supervisor of another that is the driver."""
    config = recipe.failures
    restarts = config.driver.max_restarts or config.head.max_restarts
    return bool(restarts) and SUPERVISED not in os.environ


def supervise(command: Sequence[str], recipe: Recipe) -> int:
    """Run a driver until it is done, or dies more often in a row than allowed; its exit status.

    Args:
        command: starts the driver.
        recipe: with the failure policy, the cluster's address and the output.
    """
    with _Driver() as driver, TemporaryDirectory(prefix="tandem-") as folder:
        environment = {**os.environ, SUPERVISED: str(Path(folder) / "begun")}
        return _supervise(driver, partial(driver.run, command, environment), recipe)


def _supervise(driver: "_Driver", run: Callable[[], int], recipe: Recipe) -> int:
    config, counts = recipe.failures, {"driver": 0, "head": 0}
    head = head_address(recipe.cluster.address)
    progress = _progress(recipe)
    while True:
        status = run()
        if status in ENDED:
            return status
        if (number := driver.asked() or _ending(status)) is not None:
            return _ended_by(number)
        if (now := _progress(recipe)) != progress:
            counts, progress = {"driver": 0, "head": 0}, now
        kind = "head" if head is not None and not answers(head) else "driver"
        allowed = (config.head if kind == "head" else config.driver).max_restarts
        why = f"head {head} is gone" if kind == "head" else f"the driver died ({_how(status)})"
        if counts[kind] >= allowed:
            times = f"{counts[kind] + 1} times in a row"
            _say(f"{why}, {times} (failures.{kind}.max_restarts={allowed})")
            return status
        counts[kind] += 1
        back = kind != "head" or head is None or _comes_back(head, config.head.wait_s, driver)
        if (number := driver.asked()) is not None:
            return _ended_by(number)
        if not back:
            _say(f"{why} and did not come back within failures.head.wait_s={config.head.wait_s:g}")
            return status
        _say(f"{why}; starting the driver again, attempt {counts[kind] + 1} of {allowed + 1}")


def head_address(address: str) -> str | None:
    """host:port of the cluster's head, if it is told before a driver joins it."""
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    try:
        split_address(named)
    except ValueError:
        return None
    return named


def _comes_back(head: str, wait_s: float, driver: "_Driver") -> bool:
    limit = time.monotonic() + wait_s
    while not answers(head):
        if driver.asked() or time.monotonic() >= limit:
            return False
        time.sleep(POLL_S)
    return True


class _Driver:
    """The driver of the moment; while the context lasts it is told of every signal that this
    process is told, and none is started after one."""

    def __init__(self) -> None:
        self._told: signal.Signals | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Driver":
        heard = [number for number in ENDINGS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self) for number in heard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._told = signal.Signals(number)
        if self._process is not None:
            self._process.send_signal(number)

    def asked(self) -> signal.Signals | None:
        """What asked this process to end, if anything did."""
        return self._told

    def run(self, command: Sequence[str], environment: dict[str, str]) -> int:
        """From start to end; the exit status."""
        if (number := self.asked()) is not None:
            return 128 + number
        self._process = subprocess.Popen(command, env=environment)
        if (number := self.asked()) is not None:  # while it was being started
            self._process.send_signal(number)
        return self._process.wait()


def _ending(status: int) -> signal.Signals | None:
    """What ended a driver that could not attend to it yet, or any more."""
    return signal.Signals(-status) if -status in ENDINGS else None


def _ended_by(number: signal.Signals) -> int:
    """The exit status of a run that was asked to end before it could attend to that."""
    _say(f"ended by {number.name}; what is committed stands: the same command goes on")
    return 128 + number


def _progress(recipe: Recipe) -> list[str]:
    """Changes whenever a stage ends or a checkpoint is committed."""
    layout = RunLayout(storage.absolute(recipe.output))
    stores = storage.join(layout.root, "checkpoints")
    names = storage.list_names(storage.join(layout.root, "stages"))
    for store in storage.list_names(stores):
        newest = storage.join(stores, store, "newest")
        names += [
            name
            for name in storage.list_names(newest)
            if storage.exists(storage.join(newest, name, "MANIFEST.json"))
        ]
    return names


def _how(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _say(line: str) -> None:
    say(line, error=True)
