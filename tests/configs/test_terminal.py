"""A reader that left or stopped reading costs its lines, and nothing else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


SLOW = """
from configs.terminal import say
for n in range(3000): say(f"line {n} " + "x" * 100)
say("RESULTS")
"""


def test_a_slow_reader_that_is_not_waited_for_gets_every_line() -> None:
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=theirs,
    )  # fmt: skip
    os.close(theirs)
    time.sleep(0.5)
    with os.fdopen(ours) as reader:
        lines = reader.read().splitlines()
    assert process.wait(timeout=60) == 0
    assert len(lines) == 3001 and lines[-1] == "RESULTS"


FULL = """
import resource, signal
from configs.terminal import say
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
for n in range(300): say(f"line {n} " + "x" * 80)
"""
ROOM = "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1)); say('RESULTS')"


@pytest.mark.parametrize(("then", "status"), [(ROOM, 0), ("", 120)])
def test_a_full_disk_costs_the_lines_of_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str, status: int
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with open(tmp_path / "log", "w") as log:
        done = run(FULL + then, log.fileno())
    text = (tmp_path / "log").read_text()
    assert done.returncode == status and text.startswith("line 0 x")
    if then:
        assert text.endswith("\n(lines were lost here: File too large)\nRESULTS\n")
        assert text.count("lost here") == 1
    else:
        assert "File too large" in done.stderr


@pytest.mark.parametrize("closed", ["1", "1 2"])
def test_a_hang_up_without_output_asks_the_group(closed: str, tmp_path: Path) -> None:
    """Whatever was opened in its place, such as a file or a device, stays."""
    code = ENDING.format(before="other = os.open(os.devnull, os.O_RDONLY)").replace(
        "SIGTERM", "SIGHUP"
    )
    code = code.replace(
        'def ask(): print("asked", file=sys.stderr, flush=True)',
        f"def ask(): open({str(tmp_path / 'asked')!r}, 'w')",
    )
    closing = " ".join(f"{number}>&-" for number in closed.split())
    command = f'exec "$0" -c "$1" {closing}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, code],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
        # A suite under nohup ignores hang-ups, and so would all it starts.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "asked").exists()
