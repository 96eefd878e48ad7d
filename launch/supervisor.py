"""A small process above the driver that starts it again when it dies, as the recipe allows.

It imports no Ray, holds no data, and hands signals on; what dies with its whole machine is for
Slurm, Kubernetes or whoever started the run.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from urllib.parse import urlsplit

from configs import storage
from configs.layout import RunLayout
from configs.recipe import Recipe
from launch.address import answers
from launch.termination import ENDINGS

SUPERVISED = "TANDEM_SUPERVISED"
"""Set in the environment of a driver that has a supervisor."""
ENDED = {0, 2, *(128 + number for number in ENDINGS)}
"""Exit statuses of a driver that is done: finished, told what is wrong, or asked to end."""
POLL_S = 0.5


def wants_supervisor(recipe: Recipe) -> bool:
    """Whether this process shall be the supervisor of another that is the driver."""
    config = recipe.failures
    restarts = config.driver.max_restarts or config.head.max_restarts
    return bool(restarts) and SUPERVISED not in os.environ


def supervise(command: Sequence[str], recipe: Recipe, first: Sequence[str] = ()) -> int:
    """Run a driver until it is done, or dies more often in a row than allowed; its exit status.

    Args:
        command: starts the driver.
        first: further arguments of the first attempt alone.
        recipe: with the failure policy, the cluster's address and the output.
    """
    config, counts = recipe.failures, {"driver": 0, "head": 0}
    head = head_address(recipe.cluster.address)
    progress = _progress(recipe)
    arguments = [*command, *first]
    while True:
        status = _run_once(arguments)
        arguments = [*command]
        if status in ENDED:
            return status
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
        if kind == "head" and head is not None and not _comes_back(head, config.head.wait_s):
            _say(f"{why} and did not come back within failures.head.wait_s={config.head.wait_s:g}")
            return status
        _say(f"{why}; starting the driver again, attempt {counts[kind] + 1} of {allowed + 1}")


def head_address(address: str) -> str | None:
    """host:port of the cluster's head, if it is told before a driver joins it."""
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    return named if urlsplit(f"//{named}").port is not None else None


def _comes_back(head: str, wait_s: float) -> bool:
    limit = time.monotonic() + wait_s
    while not answers(head):
        if time.monotonic() >= limit:
            return False
        time.sleep(POLL_S)
    return True


def _run_once(command: Sequence[str]) -> int:
    """A driver from start to end, told of every signal that this process is told."""
    driver = subprocess.Popen(command, env={**os.environ, SUPERVISED: "1"})

    def hand_on(number: int, frame: FrameType | None) -> None:
        driver.send_signal(number)

    heard = [number for number in ENDINGS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in heard}
    try:
        return driver.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    print(line, file=sys.stderr, flush=True)
