"""SIGTERM to a rank: remembered while training attends to it, so that all ranks save and end.

The notice is its own signal handler: whoever asks the process for its handler finds it, from any
thread, and no other state of the process is needed.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StoppedError(Exception):
    """Training ended where it was asked to, and is saved there; the same on every rank."""

    def __init__(self, stage: str, step: int) -> None:
        super().__init__(stage, step)
        self.stage = stage
        self.step = step

    def __str__(self) -> str:
        return (
            f"stage {self.stage!r} was asked to end (a signal, or a node that is taken away) and "
            f"is saved at step {self.step:,}; the same command goes on from there"
        )


class StopNotice:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.given = False
        self._attended = False
        self._before: Any = signal.SIG_DFL

    def install(self) -> None:
        """Become the handler of SIGTERM. Only the main thread may.

        What an embedded Ray starts does not hear of it (`launch.termination.unheard`) until here.
        """
        self._before = signal.signal(signal.SIGTERM, self)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take note; where nobody attends, do what would have been done without this."""
        if self._attended:
            self.given = True
        elif callable(self._before):
            self._before(number, frame)
        elif self._before == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def _uninstall(self) -> None:
        signal.signal(signal.SIGTERM, self._before)


def install_notice() -> None:
    """For processes whose training runs in another thread than the main one, which calls this."""
    StopNotice().install()


@contextmanager
def attended() -> Iterator[StopNotice]:
    """The process's notice, while the caller looks at `given` between steps.

    In a thread, of a process whose main thread called `install_notice` before; without that a
    thread's notice is never given.
    """
    handler = signal.getsignal(signal.SIGTERM)
    notice = handler if isinstance(handler, StopNotice) else StopNotice()
    installs = notice is not handler and threading.current_thread() is threading.main_thread()
    if installs:
        notice.install()
    notice._attended = True
    try:
        yield notice
    finally:
        notice._attended = False
        if installs:
            notice._uninstall()
