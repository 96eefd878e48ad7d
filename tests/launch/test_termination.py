"""SIGTERM to a driver: asks a group that trains, ends the rest, and leaves with its status."""

import os
import signal
import subprocess
import sys
import time

import pytest

from launch.termination import Termination, current_termination
from tests.integration.jobs import ROOT


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_group_is_asked_once_and_a_second_signal_ends(capfd: pytest.CaptureFixture[str]) -> None:
    asked: list[float] = []
    before = signal.getsignal(signal.SIGTERM)
    with Termination() as termination:
        assert current_termination() is termination
        termination.check()
        with termination.asks(lambda: asked.append(time.monotonic()), 60):
            terminate()
            assert termination.asked and len(asked) == 1
            with pytest.raises(SystemExit) as ended:
                terminate()
        assert ended.value.code == 143
        with pytest.raises(SystemExit):
            termination.check()  # no further stage begins
    assert signal.getsignal(signal.SIGTERM) == before
    assert "asked to save and end, within 60 s" in capfd.readouterr().out


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
