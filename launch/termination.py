"""SIGTERM to the driver: its workers are asked to save, and the run ends with status 143."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

from trainer.stop_notice import EXIT_STATUS


class Termination:
    """Context of a run; while it lasts it is the main thread's handler of SIGTERM.

    Where no worker group trains, nothing is lost by ending at once. Otherwise the group is asked to
    save; a second signal, or the end of the time it is given, ends the run without waiting.
    """

    def __init__(self) -> None:
        self.asked = False
        self._ask: Callable[[], None] | None = None
        self._grace_s = 0.0
        self._timer: threading.Timer | None = None
        self._before: Any = None

    def __enter__(self) -> "Termination":
        self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        mine: Any = self
        if self._before is not None and signal.getsignal(signal.SIGTERM) is mine:
            signal.signal(signal.SIGTERM, self._before)

    def install(self) -> None:
        """Become the handler, again after a library took the place. A thread changes nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.signal(signal.SIGTERM, self)
        if self._before is None:
            self._before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Ask the worker group, or end."""
        if self._ask is None or self.asked:
            self.end("ended by SIGTERM; what is committed stands, and the same command goes on")
        self.asked = True
        print(
            f"SIGTERM: the workers are asked to save and end, within {self._grace_s:g} s; "
            "a second one ends the run at once",
            flush=True,
        )
        self._ask()
        self._timer = threading.Timer(self._grace_s, os.kill, (os.getpid(), signal.SIGTERM))
        self._timer.daemon = True
        self._timer.start()

    @contextmanager
    def asks(self, ask: Callable[[], None], grace_s: float) -> Iterator[None]:
        """While a worker group trains: `ask` tells it to save and end."""
        self._ask, self._grace_s = ask, grace_s
        try:
            yield
        finally:
            self._ask = None
            if self._timer is not None:
                self._timer.cancel()  # the group has ended; what follows is not to be hurried

    def check(self) -> None:
        """End the run if it was asked to end, although the group had finished before it knew."""
        if self.asked:
            self.end("ended by SIGTERM after the stage had finished; the same command goes on")

    def end(self, sentence: str) -> NoReturn:
        """Say why, and leave with the status of a process that SIGTERM ended."""
        print(sentence, flush=True)
        raise SystemExit(EXIT_STATUS)


def current_termination() -> Termination:
    """That of the run of this process; one that is never asked where there is none."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, Termination) else Termination()
