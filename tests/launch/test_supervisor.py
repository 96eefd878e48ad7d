"""A driver that dies is started again; one that is done, is not."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from configs.recipe import Recipe
from launch.supervisor import SUPERVISED, head_address, supervise, wants_supervisor
from tests.integration.jobs import ROOT, wait_for

DRIVER = """
import os, pathlib, signal, sys, time
attempts = pathlib.Path(sys.argv[1])
with attempts.open("a") as stream:
    stream.write(os.environ["TANDEM_SUPERVISED"] + "\\n")
what = sys.argv[2].split(",")[len(attempts.read_text().splitlines()) - 1]
if what == "wait":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    time.sleep(60)
if what == "sleep":  # as before the run attends to signals
    time.sleep(60)
if what == "abort":
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(1))
    time.sleep(60)
if what.startswith("checkpoint"):
    place = attempts.parent / "run/checkpoints/train-0/newest" / what
    place.mkdir(parents=True)
    (place / "MANIFEST.json").write_text("{}")
    what = "die"
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "SIGTERM":
    os.kill(os.getpid(), signal.SIGTERM)
sys.exit(int(what))
"""


def recipe(output: Path, **blocks: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "output": str(output / "run"),
            "data": {"source": {"kind": "public", "name": "ml-100k"}},
            "model": {"kind": "sasrec"},
            **blocks,
        }
    )


def command(tmp_path: Path, then: str) -> list[str]:
    return [sys.executable, "-c", DRIVER, str(tmp_path / "attempts"), then]


def attempts(tmp_path: Path) -> list[str]:
    return (tmp_path / "attempts").read_text().splitlines()


@pytest.mark.parametrize(
    ("then", "status", "times"),
    [
        ("0", 0, 1),
        ("2", 2, 1),
        ("143", 143, 1),
        ("75,0", 0, 2),
        ("die,1,0", 0, 3),
        ("die,die,die,0", -9, 3),
    ],
)
def test_only_a_death_is_a_reason_to_start_again(
    tmp_path: Path, then: str, status: int, times: int
) -> None:
    told = recipe(tmp_path, failures={"driver": {"max_restarts": 2}})
    assert supervise(command(tmp_path, then), told) == status
    assert len(attempts(tmp_path)) == times
    [begun] = set(attempts(tmp_path))  # one file for all attempts
    assert not Path(begun).parent.exists()


def test_a_checkpoint_sets_the_count_back(tmp_path: Path) -> None:
    told = recipe(tmp_path, failures={"driver": {"max_restarts": 1}})
    assert supervise(command(tmp_path, "checkpoint-1,checkpoint-2,0"), told) == 0


def test_a_lost_head_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
    policy = {"head": {"max_restarts": 1, "wait_s": 30}}
    told = recipe(tmp_path, failures=policy, cluster={"address": address})

    def come_back() -> None:
        time.sleep(1.5)
        servers.append(socket.create_server(("127.0.0.1", int(address.rsplit(":", 1)[1]))))

    servers: list[socket.socket] = []
    thread = threading.Thread(target=come_back)
    thread.start()
    assert supervise(command(tmp_path, "1,0"), told) == 0
    thread.join()
    servers[0].close()
    assert f"head {address} is gone; starting the driver again" in capfd.readouterr().err
    policy["head"]["wait_s"] = 0.6
    (tmp_path / "attempts").unlink()
    told = recipe(tmp_path, failures=policy, cluster={"address": address})
    assert supervise(command(tmp_path, "1,0"), told) == 1
    assert "did not come back within failures.head.wait_s=0.6" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("then", "number", "status"),
    [
        ("wait", signal.SIGTERM, 143),
        ("sleep,0", signal.SIGTERM, 143),
        ("abort,0", signal.SIGINT, 130),
        ("1,0", signal.SIGTERM, 143),  # while the head is waited for
    ],
)
def test_a_signal_is_handed_on_and_nothing_begins_after_it(
    tmp_path: Path, then: str, number: signal.Signals, status: int
) -> None:
    code = "import sys; from tests.launch.test_supervisor import *\n"
    code += "policy = {'driver': {'max_restarts': 1}, 'head': {'max_restarts': 1}}\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"told = recipe(Path({str(tmp_path)!r}), failures=policy, "
    code += f"cluster={{'address': {'127.0.0.1:1' if then == '1,0' else 'local'!r}}})"
    code += f"\nsys.exit(supervise({command(tmp_path, then)!r}, told))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(lambda: (tmp_path / "attempts").exists(), timeout=60)
    time.sleep(1.0)
    process.send_signal(number)
    assert process.wait(30) == status
    assert len(attempts(tmp_path)) == 1


def test_a_driver_that_a_signal_ended_was_asked_to_end(tmp_path: Path) -> None:
    told = recipe(tmp_path, failures={"driver": {"max_restarts": 1}})
    assert supervise(command(tmp_path, "SIGTERM,0"), told) == 143
    assert len(attempts(tmp_path)) == 1


def test_who_supervises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUPERVISED, raising=False)
    told = recipe(tmp_path, failures={"driver": {"max_restarts": 1}})
    assert wants_supervisor(told) and not wants_supervisor(recipe(tmp_path))
    monkeypatch.setenv(SUPERVISED, "1")
    assert not wants_supervisor(told)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert head_address("auto") == "10.0.0.1:6379" and head_address("local") is None
    assert os.environ[SUPERVISED] == "1"
