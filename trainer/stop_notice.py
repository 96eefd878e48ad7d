"""SIGTERM to a rank: remembered while training attends to it, so that all ranks save and end.

A validation is left for it, as it may take longer than whoever sent it waits. Where a rank does not
train (it loads, evaluates), there is nothing to save, and its work is left where it is. The notice
is its own signal handler: whoever asks the process for its handler finds it, from any thread, and
no other state of the process is needed.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
POLL_S = 0.2
LEAVE_S = 30
"""After this the kernel ends a process that was asked to end, if nobody else has (SIGALRM)."""


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


class AbandonedError(Exception):
    """A rank was asked to end where it made no steps; what it did is left where it was."""

    def __str__(self) -> str:
        return (
            "a rank was asked to end (a signal, or a node that is taken away) while it did not "
            "train; what is committed stands, and the same command goes on from there"
        )


class StopNotice:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.given = False
        """While training attended to it."""
        self.abandons = False
        """While it did not, of work that `heeding` does."""
        self._attended = False
        self._heeded = False
        self._before: Any = signal.SIG_DFL

    def install(self) -> None:
        """Become the handler of SIGTERM. Only the main thread may.

        What an embedded Ray starts does not hear of it (`launch.termination.unheard`) until here.
        """
        self._before = signal.signal(signal.SIGTERM, self)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take note; where nobody attends, do what would have been done without this.

        Not in work that `heeding` does: Ray would wait for what this process has asked of others,
        and some of that never comes.
        """
        if self._attended:
            self.given = True
        elif self._heeded:
            self.abandons = True
            signal.alarm(LEAVE_S)
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


def heeding(work: Callable[[], T]) -> T:
    """Do `work`, and leave it where it is once the process is asked to end and nobody attends.

    In a thread of its own, after the main thread has called `install_notice`. Whoever started the
    process is to end it when this raises.

    Raises:
        AbandonedError: it was asked to.
        BaseException: what `work` raised.
    """
    handler = signal.getsignal(signal.SIGTERM)
    assert isinstance(handler, StopNotice), "the main thread has called install_notice"
    outcome: Future[T] = Future()

    def do() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            outcome.set_exception(error)

    handler._heeded = True  # also when all is done: there is nothing left to save or to leave
    threading.Thread(target=do, name="stage", daemon=True).start()
    while not handler.abandons:
        if wait([outcome], POLL_S).done:
            return outcome.result()
    raise AbandonedError


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


def unless_asked(batches: Iterable[T], on_any_rank: Callable[[bool], bool]) -> Iterator[T]:
    """Measure on `batches`, as many on every rank, until training is asked to end. Collective.

    Args:
        batches: of a validation; an evaluation that nobody attends comes to their end.
        on_any_rank: whether something is true of a rank. Collective.

    Raises:
        AbandonedError: before the next batch, on all ranks alike.
    """
    handler = signal.getsignal(signal.SIGTERM)
    for batch in batches:
        noted = isinstance(handler, StopNotice) and handler._attended and handler.given
        if on_any_rank(noted):
            raise AbandonedError
        yield batch
