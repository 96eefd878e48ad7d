"""Signals to a driver: ask a group that trains, end the rest, and leave their status."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from launch import termination as module
from launch.termination import ENDINGS, Termination, current_termination, unheard
from tests.integration.jobs import ROOT


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Also where these tests run in a script's background, which ignores Ctrl-C."""
    defaults = (signal.SIG_DFL, signal.default_int_handler, signal.SIG_DFL)
    before = [signal.signal(n, handler) for n, handler in zip(ENDINGS, defaults, strict=True)]
    yield
    for number, handler in zip(ENDINGS, before, strict=True):
        signal.signal(number, handler)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_group_is_asked_once_and_a_second_signal_ends(
    number: signal.Signals,
    status: int,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []
    before = [signal.getsignal(each) for each in ENDINGS]
    with Termination() as termination:
        assert current_termination() is termination
        termination.check()
        with termination.asks(lambda: asked.append(time.monotonic()), 60):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a supervisor, told as well, has handed it on
            assert termination.asked and len(asked) == 1
            monkeypatch.setattr(module, "REPEAT_S", 0.0)
            with pytest.raises(SystemExit) as ended:
                os.kill(os.getpid(), number)
        assert ended.value.code == status
        with pytest.raises(SystemExit):
            termination.check()  # no further stage begins
    assert [signal.getsignal(each) for each in ENDINGS] == before
    told = capfd.readouterr().out
    assert f"{number.name}: the workers are asked to save and end, within 60 s" in told
    assert "the same command goes on" in told


def test_the_status_outlives_who_takes_the_end_for_another() -> None:
    """As Ray does with what a handler raises while it waits for a result."""
    with pytest.raises(SystemExit) as ended, Termination():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except SystemExit:
            raise SystemExit(1) from None
    assert ended.value.code == 130
    with pytest.raises(SystemExit) as ended, Termination():
        raise SystemExit(3)  # none of ours
    assert ended.value.code == 3


def test_impatience_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals that follow one another closely do not put off the second one for ever."""
    monkeypatch.setattr(module, "REPEAT_S", 0.3)
    asked: list[float] = []
    with Termination() as termination, termination.asks(lambda: asked.append(0.0), 60):
        with pytest.raises(SystemExit) as ended:
            for _ in range(6):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
        assert ended.value.code == 130 and len(asked) == 1


def test_what_is_started_unheard_is_told_nothing() -> None:
    code = "import os, sys; os.killpg(0, 15); os.killpg(0, 1); os.killpg(0, 2); print('here')"
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with unheard():
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, process_group=0)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray takes the place
            # To this thread: others, which tests before have left, do not block it, and would end.
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            assert told == []
        assert told == [signal.SIGTERM]  # heard late, by the handler of before
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.stdout == "here\n"


def test_what_another_thread_hears_meanwhile_is_heard_afterwards() -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    over = threading.Event()
    waiting = threading.Thread(target=over.wait)
    waiting.start()
    try:
        with unheard():
            terminate()
            time.sleep(0.1)
            assert told == []
        assert told == [signal.SIGTERM]
    finally:
        over.set()
        waiting.join()
        signal.signal(signal.SIGTERM, before)


def test_a_run_that_shall_not_hear_of_ctrl_c_does_not() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Termination():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_hang_up_leaves_the_terminal_that_is_gone() -> None:
    code = "import os, signal, time; from launch.termination import *\n"
    code += "with Termination() as t, t.asks(lambda: None, 60):\n"
    code += "    os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.1); print('on', flush=True)\n"
    code += "t.end('saved')"
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "input();" + code], cwd=ROOT, stdin=subprocess.PIPE, stdout=theirs
    )
    os.close(theirs)
    os.close(ours)  # what is printed fails from now on
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 129


def test_without_a_group_the_run_ends_at_once() -> None:
    with Termination(), pytest.raises(SystemExit) as ended:
        terminate()
    assert ended.value.code == 143
    assert not current_termination().asked  # there is none: one that is never asked


def test_a_group_that_ended_in_time_is_not_hurried() -> None:
    """The process outlives the time that its group was given."""
    with Termination() as termination:
        with termination.asks(lambda: None, 0.2):
            terminate()
        time.sleep(0.5)
        assert termination.asked


def test_a_group_that_does_not_end_in_time_is_left() -> None:
    code = "import os, signal, time; from launch.termination import *\n"
    code += "with Termination() as t, t.asks(lambda: None, 0.2):\n"
    code += "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 143 and time.monotonic() - started < 20
