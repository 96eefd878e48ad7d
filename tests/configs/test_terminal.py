"""A reader that left or stopped reading costs its lines, and nothing else."""

import os
import subprocess
import sys
import time

import pytest

from configs.terminal import say
from tests.integration.jobs import ROOT

ENDING = """
import os, signal, sys, time
from launch.termination import Termination
def ask(): print("asked", file=sys.stderr, flush=True)
with Termination() as termination, termination.asks(ask, 60):
    {before}
    os.kill(os.getpid(), signal.SIGTERM)
    assert termination._timer is not None
print("asked late", file=sys.stderr, flush=True)
os._exit(0)
"""


def run(code: str, stdout: int) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def broken() -> int:
    """A pipe whose reader has left."""
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


def test_what_is_said_to_nobody_vanishes(broken: int) -> None:
    code = "from configs.terminal import say\nfor n in range(3): say(str(n))\n"
    code += "say('on', error=True); print('more', flush=True)"
    done = run(code, broken)
    assert (done.returncode, done.stderr) == (0, "on\n")


def test_a_group_is_asked_to_save_although_the_reader_left(broken: int) -> None:
    done = run(ENDING.format(before="pass"), broken)
    assert (done.returncode, done.stderr) == (0, "asked\nasked late\n")


def test_a_group_is_asked_to_save_although_the_reader_has_stopped() -> None:
    """Another thread waits for it in the middle of a line."""
    ours, theirs = os.pipe()
    block = "import threading; from configs.terminal import say; "
    block += "threading.Thread(target=say, args=('x' * 1_000_000,), daemon=True).start(); "
    block += "time.sleep(0.3)"
    started = time.monotonic()
    done = run(ENDING.format(before=block), theirs)
    assert (done.returncode, done.stderr) == (0, "asked\nasked late\n")
    assert time.monotonic() - started < 30
    os.close(ours)
    os.close(theirs)


def test_what_is_said_is_fit_to_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    say("s3://me:wJalrXUtnFEMI@b/x \x1b[31mred\x1b]0;title\x07 \u202eback \ud800 \r", style="bold")
    say("größe\t1\n日本語\u3000二 👩\u200d🔬", error=True, end="|")
    shown = capsys.readouterr()
    assert shown.out == (r"s3://***@b/x \x1b[31mred\x1b]0;title\x07 \u202eback \ud800 \r" + "\n")
    assert shown.err == "größe\t1\n日本語\u3000二 👩\u200d🔬|"
