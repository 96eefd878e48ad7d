"""A rank that stops making steps is named, with its stack, by a thread of its own.

Where one rank hangs all others wait for it, so every rank's watchdog runs out, reports where its
rank stands into `<output>/failures/`, and ends its process; whoever started the group reads the
reports and tells the rank that hung from those that waited for it. A rank that cannot even report
(stopped, or in native code that holds the interpreter) is the one that hung; in the latter case
`faulthandler`, which needs no interpreter, writes its stack to the log of its process.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt

from configs import storage
from configs.base import Config, Timestamp
from configs.failures import HangConfig
from configs.storage_faults import StorageError

EXIT_STATUS = 70
"""Of a rank that its watchdog ended."""
LONGEST_PAUSE_S = 60.0
"""Between two looks at the last sign of life."""
SETTLE_S = 5.0
"""From a rank's report to its end, so that all others report, too."""
Phase = Literal["loading", "updating", "validating", "saving"]
_WAITS = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/c10d_logger.py",
    "torchrec/distributed/comm_ops.py",
    "torchrec/distributed/dist_data.py",
    "deepspeed/comm/torch.py",
    "sharding/process_group.py",
)
"""Files whose code waits for other ranks."""


@dataclass(frozen=True)
class _Sign:
    """The last sign of life."""

    step: int
    phase: Phase
    at: float


class HangReport(Config):
    """Where a rank stood when its watchdog ran out."""

    stage: str
    rank: NonNegativeInt
    step: NonNegativeInt
    phase: Phase
    seconds: NonNegativeFloat
    """Since its last sign of life."""
    time: Timestamp
    waits_for_others: bool
    host: str
    process: int
    stack: str
    other_threads: dict[str, str]


class Watchdog:
    """Context around training; `sign` is called by the thread that entered it, at every phase."""

    def __init__(
        self,
        config: HangConfig,
        failures: str,
        *,
        stage: str,
        rank: int,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """`failures` is the URL of the directory for reports; `end` ends the process."""
        self._config, self._failures, self._stage, self._rank = config, failures, stage, rank
        self._end = end
        self._sign = _Sign(0, "loading", time.monotonic())
        self._watched = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._watched = threading.get_ident()
        self.sign(0, "loading")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def sign(self, step: int, phase: Phase) -> None:
        """The rank has done `step` updates and begins `phase`."""
        self._sign = _Sign(step, phase, time.monotonic())

    def _limit(self, phase: Phase) -> float | None:
        if phase == "validating":
            return self._config.validation_timeout_s
        return self._config.step_timeout_s

    def _watch(self) -> None:
        limits = (self._config.step_timeout_s, self._config.validation_timeout_s)
        pause = min([limit / 4 for limit in limits if limit is not None] + [LONGEST_PAUSE_S])
        while True:
            sign = self._sign
            limit = self._limit(sign.phase)
            left = pause if limit is None else sign.at + limit - time.monotonic()
            if left <= 0:
                break
            if limit is not None and sys.__stderr__ is not None:  # for a thread that cannot run
                late = left + pause + SETTLE_S
                faulthandler.dump_traceback_later(late, file=sys.__stderr__)
            if self._closed.wait(min(left, pause)):
                return
        faulthandler.cancel_dump_traceback_later()
        try:
            self._report(sign)
            time.sleep(SETTLE_S)
        finally:
            self._end(EXIT_STATUS)

    def _report(self, sign: _Sign) -> None:
        frames = sys._current_frames()
        stack = traceback.format_stack(frames[self._watched])
        saving = next((f for f in frames.values() if _saves_behind(f)), None)
        inner = frames[self._watched]
        if saving is not None and _in_code(inner, "background_saves.py"):
            inner = saving
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        others = {
            names.get(ident, str(ident)): "".join(traceback.format_stack(frame))
            for ident, frame in frames.items()
            if ident not in (self._watched, threading.get_ident())
        }
        report = HangReport(
            stage=self._stage,
            rank=self._rank,
            step=sign.step,
            phase=sign.phase,
            seconds=round(time.monotonic() - sign.at, 1),
            time=time.time(),
            waits_for_others=inner.f_code.co_filename.endswith(_WAITS),
            host=os.uname().nodename,
            process=os.getpid(),
            stack="".join(stack),
            other_threads=others,
        )
        name = f"hang-{self._stage}-{time.time_ns():x}-rank-{self._rank}.json"
        storage.write_sealed(storage.join(self._failures, name), report.model_dump())


def _in_code(frame: FrameType | None, name: str) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.endswith(name):
            return True
        frame = frame.f_back
    return False


def _saves_behind(frame: FrameType) -> bool:
    """Whether a thread writes a checkpoint behind training."""
    outer: FrameType | None = frame
    while outer is not None:
        if outer.f_code.co_filename.endswith("background_saves.py"):
            return outer.f_code.co_name == "_write"
        outer = outer.f_back
    return False


def diagnose_hang(failures: str, since: float, ranks: int) -> str | None:
    """Which ranks of a group hung, from the reports written after `since`; None without any.

    Args:
        failures: URL of the directory of reports.
        since: seconds since the epoch.
        ranks: size of the group.
    """
    reports: dict[int, tuple[str, HangReport]] = {}
    for name in storage.list_names(failures):
        if name.startswith("hang-"):
            url = storage.join(failures, name)
            report = _read_report(url)
            if report is not None and report.time >= since:
                reports[report.rank] = (url, report)
    if not reports:
        return None
    silent = [rank for rank in range(ranks) if rank not in reports]
    stuck = [entry for entry in reports.values() if not entry[1].waits_for_others]
    behind = min(report.step for _, report in reports.values())
    parts = [
        f"rank {report.rank} (host {report.host}, process {report.process}) made no "
        f"progress for {report.seconds:g} s after step {report.step:,}, while "
        f"{report.phase}, at `{_last_line(report.stack)}` (its stack: {url})"
        for url, report in sorted(stuck, key=lambda entry: entry[0])[:3]
    ]
    if silent:
        named = ", ".join(map(str, silent[:10]))
        parts.append(
            f"rank{'s' if len(silent) > 1 else ''} {named} gave no sign of life (stopped, or in "
            f"native code: see the log of its process) after step {behind:,}"
        )
    if not parts:
        parts.append(
            f"every rank waits for the others after step {behind:,}: their calls do not "
            f"match (stacks: {failures})"
        )
    return "; ".join(parts)


def _read_report(url: str) -> HangReport | None:
    """What a rank wrote; of a report that is damaged or cannot be read, nothing: it is no reason to
    hide what happened now."""
    try:
        return HangReport.model_validate(storage.read_sealed(url))
    except (StorageError, ValueError):
        return None


def _last_line(stack: str) -> str:
    return (stack.strip().splitlines() or ["an unknown place"])[-1].strip()
