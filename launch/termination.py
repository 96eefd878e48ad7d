"""SIGTERM, Ctrl-C or a hang-up to the driver: its workers are asked to save, and the run ends."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

from configs.terminal import leave_terminal, say_aside

ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a run to end: of schedulers and service managers, of Ctrl-C, of a terminal that
is closed."""
REPEAT_S = 1.0
"""Signals so close together are one: who tells a whole group of processes tells the supervisor as
well, which hands it on; and `timeout` tells its child, then its group."""
SAYING_S = 1.0
"""What a reader that has stopped reading may cost."""
GIVEN_UP_STATUS = 2
"""Of a run that another one has taken over, if it cannot say so."""


class Termination:
    """Context of a run; while it lasts it is the main thread's handler of `ENDINGS`.

    Where no worker group trains, nothing is lost by ending at once. Otherwise the group is asked to
    save; a second signal, or the end of the time it is given, ends the run without waiting.
    """

    def __init__(self) -> None:
        self.asked = False
        self._by = signal.SIGTERM
        self._told_at = -REPEAT_S
        self._late = False
        self._given_up = False
        self._status: int | None = None
        self._ask: Callable[[], None] | None = None
        self._grace_s = 0.0
        self._timer: threading.Timer | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():
            for number in ENDINGS:
                # A run of `nohup`, or in a script's background, shall not hear of these.
                ignored = signal.getsignal(number) == signal.SIG_IGN
                if number == signal.SIGTERM or not ignored:
                    self._before[number] = signal.signal(number, self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, SystemExit) and self._status is not None:
            error.code = self._status  # Ray, while it waits, makes a 1 of what a handler raises

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Ask the worker group, or end."""
        if self._given_up:
            self._leave(GIVEN_UP_STATUS)
        now = time.monotonic()
        if now - self._told_at < REPEAT_S and not self._late:
            return
        self._told_at = now  # of one that was heeded: an impatient user's add up to a second one
        if not self.asked:
            self._by = signal.Signals(number)
            if self._by == signal.SIGHUP:
                leave_terminal()
        if self._ask is None or self.asked:
            self.end(
                f"ended by {self._by.name}; what is committed stands: the same command goes on"
            )
        self.asked = True
        self._ask()
        self._timer = threading.Timer(self._grace_s, self._hurry)
        self._timer.daemon = True
        self._timer.start()
        told = f"{self._by.name}: the workers are asked to save and end, within {self._grace_s:g} s"
        say_aside(f"{told}; a second one ends the run at once", SAYING_S)

    def give_up(self) -> None:
        """From another thread: end the run at once, and let its workers save nothing more."""
        self._given_up = True
        if self._before:  # otherwise there is no handler, and what the run finds out must do
            os.kill(os.getpid(), signal.SIGTERM)

    def _hurry(self) -> None:
        self._late = True
        os.kill(os.getpid(), self._by)

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
            name = self._by.name
            self.end(f"ended by {name} after the stage had finished; the same command goes on")

    def end(self, sentence: str) -> NoReturn:
        """Say why, and leave with the status of a process that the signal ended."""
        say_aside(sentence, SAYING_S)
        self._leave(128 + self._by)

    def _leave(self, status: int) -> NoReturn:
        self._status = status
        raise SystemExit(status)


def current_termination() -> Termination:
    """That of the run of this process; one that is never asked where there is none."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, Termination) else Termination()


@contextmanager
def unheard() -> Iterator[None]:
    """What this thread starts meanwhile is never told by `ENDINGS`, nor is what that starts.

    A signal to the whole group of processes, or to all of a service or a job, would otherwise end
    the daemons of an embedded Ray before the workers have saved. One that comes meanwhile is heard
    afterwards, by the handlers of before.
    """
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in ENDINGS} if main else {}
    told: list[int] = []
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:  # another thread, which does not block it, may be told
            signal.signal(number, lambda number, frame: told.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for each in told[:1]:
            signal.raise_signal(each)
