"""SIGTERM is remembered while training attends to it, and does what it did before otherwise."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.integration.jobs import ROOT
from trainer.stop_notice import StopNotice, StoppedError, attended, install_notice


@pytest.fixture
def before() -> Iterator[list[int]]:
    """A handler that was there first, and the signals that reached it."""
    heard: list[int] = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, old)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_is_noted_while_it_is_attended_to(before: list[int]) -> None:
    with attended() as notice:
        assert not notice.given
        terminate()
        terminate()  # as when the whole group of processes is told, and then the driver tells again
        assert notice.given and before == []
    terminate()
    assert before == [signal.SIGTERM]
    with attended() as notice:
        assert not notice.given  # of another training


def test_a_thread_attends_to_what_the_main_thread_installed(before: list[int]) -> None:
    install_notice()
    terminate()
    assert before == [signal.SIGTERM]  # nobody attends
    found: list[StopNotice] = []

    def train() -> None:
        with attended() as notice:
            ready.set()
            done.wait(10)
            found.append(notice)

    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=train)
    thread.start()
    ready.wait(10)
    terminate()
    done.set()
    thread.join()
    assert found[0].given and before == [signal.SIGTERM]
    terminate()
    assert before == [signal.SIGTERM] * 2


def test_where_nobody_attends_the_process_ends_as_it_would() -> None:
    code = "import os, signal; from trainer.stop_notice import *; install_notice()\n"
    code += "os.kill(os.getpid(), signal.SIGTERM); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


HEEDING = """
import os, signal, sys, threading, time
from trainer import stop_notice
from trainer.stop_notice import *
stop_notice.LEAVE_S = 1
install_notice()
def work():
    with {context}:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep({seconds})
    return "done"
def run():
    try:
        print(heeding(work), flush=True)
    except AbandonedError as error:
        print("left:", str(error)[:25], flush=True)
thread = threading.Thread(target=run)
thread.start()
while thread.is_alive():  # as Ray's main thread, which looks for signals now and then
    thread.join(0.05)
if {context!r} == "open(os.devnull)":
    time.sleep(20)  # nobody ends the process, which does not hear of SIGTERM any more
"""


@pytest.mark.parametrize(
    ("context", "seconds", "status", "said"),
    [
        ("open(os.devnull)", 60, -signal.SIGALRM, "left: a rank was asked to end ("),
        ("attended()", 0.5, 0, "done"),
    ],
)
def test_work_that_nobody_would_save_is_left_at_once(
    context: str, seconds: float, status: int, said: str
) -> None:
    code = HEEDING.format(context=context, seconds=seconds)
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, f"{said}\n"), done.stderr
    assert time.monotonic() - started < 15


def test_what_heeded_work_raises_is_raised() -> None:
    code = "from trainer.stop_notice import *; install_notice()\ndef work(): raise TimeoutError(7)"
    code += "\ntry: heeding(work)\nexcept TimeoutError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "7\n", done.stderr


def test_the_sentence_names_stage_and_step() -> None:
    assert "stage 'train' was asked to end" in str(StoppedError("train", 1200))
    assert "saved at step 1,200" in str(StoppedError("train", 1200))
