"""SIGTERM is remembered while training attends to it, and does what it did before otherwise."""

import os
import signal
import subprocess
import sys
import threading
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


def test_the_sentence_names_stage_and_step() -> None:
    assert "stage 'train' was asked to end" in str(StoppedError("train", 1200))
    assert "saved at step 1,200" in str(StoppedError("train", 1200))
