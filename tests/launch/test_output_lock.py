"""One run at a time on an output; what the dead leave behind stops nobody."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from configs import storage
from configs.load import load_recipe
from launch import cli, output_lock
from launch.output_lock import FILE, HEARTBEAT_S, OutputLock
from launch.run import run
from tests.integration.jobs import ROOT, write_recipe

HOLD = """
import sys, time
from launch.output_lock import OutputLock
with OutputLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(output: str) -> subprocess.Popen[str]:
    """A process that holds `output`."""
    command = [sys.executable, "-c", HOLD, output]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture(params=["local", "memory"])
def output(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An output on a local directory, and on a store that is neither local nor a directory."""
    monkeypatch.setattr(output_lock, "SETTLE_S", 0.05)
    if request.param == "local":
        yield str(tmp_path / "run")
        return
    yield "memory://lock-test/run"
    storage.remove("memory://lock-test")


def test_a_second_run_is_refused_and_told_who_holds_the_output(tmp_path: Path) -> None:
    loaded = load_recipe(write_recipe(tmp_path))
    process = holder(loaded.recipe.output)
    try:
        with pytest.raises(ValueError) as error:
            run(loaded, until="prepare")
        sentence = str(error.value)
        assert "is in use by another run (host" in sentence and "\n" not in sentence
        assert f"process {process.pid}, since {time.strftime('%Y-')}" in sentence
        assert "wait for it, stop it, or choose another output" in sentence
    finally:
        process.send_signal(signal.SIGKILL)
    # Killed, and not even waited for: the same command goes on at once.
    started = time.monotonic()
    while True:
        try:
            with OutputLock(loaded.recipe.output):
                break
        except ValueError:  # the signal is on its way
            assert time.monotonic() - started < 5
    process.communicate()
    assert not (Path(loaded.recipe.output) / FILE).exists()


def test_the_lock_goes_with_the_run_also_when_it_fails(output: str) -> None:
    url = storage.join(output, FILE)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), OutputLock(output):
            assert storage.read_json(url)["pid"] == os.getpid()
            with pytest.raises(ValueError, match=f"process {os.getpid()}, since"):
                OutputLock(output).__enter__()
            raise error
        assert not storage.exists(url)


def leave(output: str, **changes: Any) -> None:
    """The lock of a run that has gone."""
    left = OutputLock(output)._me | {"alive": time.time()} | changes
    storage.write_json(storage.join(output, FILE), left)


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({"born": 1}, False),  # the process id belongs to another process now
        ({"pid": 2**22 + 1}, False),
        ({"machine": "elsewhere", "pid": 2**22 + 1}, True),
        ({"machine": "elsewhere", "alive": 1e9}, False),
    ],
)
def test_stale_locks_are_taken_over(output: str, changes: dict[str, Any], blocks: bool) -> None:
    leave(output, **changes)
    if blocks:
        with pytest.raises(ValueError, match=f"host .*process {2**22 + 1}"):
            OutputLock(output).__enter__()
    else:
        with OutputLock(output):
            pass


def test_a_lock_cut_short_by_a_power_failure_is_taken_over(output: str) -> None:
    storage.write_bytes(storage.join(output, FILE), b'{"tok')
    with OutputLock(output):
        assert storage.read_json(storage.join(output, FILE))["pid"] == os.getpid()


@pytest.mark.parametrize("left", [None, b'{"tok', "a dead run's"])
def test_of_many_at_once_one_goes_on_however_slow_the_disk(
    left: bytes | str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, locks = storage.join(str(tmp_path), FILE), [OutputLock(str(tmp_path)) for _ in range(5)]
    calls = count()
    if isinstance(left, bytes):
        storage.write_bytes(url, left)
    elif left is not None:
        leave(str(tmp_path), born=1)
    write = storage.write_bytes

    def slowly(url: str, data: bytes) -> None:
        time.sleep(0.1 * (1 + next(calls) % len(locks)))
        write(url, data)

    monkeypatch.setattr(storage, "write_bytes", slowly)
    with ThreadPoolExecutor(len(locks)) as pool:
        entered = [pool.submit(lock.__enter__) for lock in locks]
        refused = [each.exception() for each in entered]
    assert [str(error)[:7] for error in refused if error] == ["output="] * (len(locks) - 1)
    locks[refused.index(None)].__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_run_that_died_as_it_took_a_lock_over_is_taken_over(tmp_path: Path) -> None:
    leave(str(tmp_path), born=1)
    dead = (tmp_path / FILE).read_bytes()
    (tmp_path / f"{FILE}.{storage.sha256_bytes(dead)[:16]}").write_bytes(dead)
    with OutputLock(str(tmp_path)):
        assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_disk_without_links_locks_as_other_storage_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuses)
    monkeypatch.setattr(output_lock, "SETTLE_S", 0.05)
    with OutputLock(str(tmp_path)):
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
        with pytest.raises(ValueError, match="in use by another run"):
            OutputLock(str(tmp_path)).__enter__()


def test_of_two_at_once_on_other_storage_the_last_to_write_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = "memory://lock-test/two"
    other = OutputLock(output)
    monkeypatch.setattr(output_lock.time, "sleep", lambda _: other._write())
    with pytest.raises(ValueError, match="in use by another run"):
        OutputLock(output).__enter__()
    assert storage.read_json(storage.join(output, FILE))["token"] == other._me["token"]
    storage.remove(output)


def test_heartbeats_renew_the_lock_and_notice_a_rival(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_lock, "HEARTBEAT_S", 0.01)
    url = storage.join(output, FILE)
    with OutputLock(output) as lock:
        first = storage.read_json(url)["alive"]
        limit = time.monotonic() + 5
        while storage.read_json(url)["alive"] == first:
            assert time.monotonic() < limit
        lock.check()
        leave(output, host="elsewhere")
        while lock._rival is None and time.monotonic() < limit:
            time.sleep(0.01)
            leave(output, host="elsewhere")  # a heartbeat that was under way may have hidden it
        with pytest.raises(ValueError, match="another run has taken over .*host elsewhere"):
            lock.check()
    assert storage.read_json(url)["host"] == "elsewhere"  # it keeps what it took
    storage.remove(url)


def test_who_wakes_looks_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock that a process waits by stands still while its machine sleeps."""
    monkeypatch.setattr(output_lock, "LOOK_S", 0.02)
    told = threading.Event()
    with OutputLock(str(tmp_path), lost=told.set):
        leave(str(tmp_path), host="elsewhere")
        assert not told.wait(0.2)
        monkeypatch.setattr(output_lock, "time", Awake(HEARTBEAT_S))
        assert told.wait(5)


class Awake:
    """The module `time` of a machine that has slept."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.monotonic = time.monotonic

    def time(self) -> float:
        return time.time() + self._seconds


def test_memory_is_refused_as_output_and_explained_as_input(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(cli.main, arguments)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        return result.stderr

    sentence = said("run", recipe, "output=memory://x/run")
    assert "output='memory://x/run' is memory of this process" in sentence
    assert "use a directory or an object store" in sentence
    submit = said("submit", recipe, "output=memory://x/run", "--address", "http://127.0.0.1:1")
    assert "output='memory://x/run' is memory of this process" in submit
    assert "--to='memory://x' is memory" in said("data", "get", "ml-100k", "--to", "memory://x")
    sentence = said("prepare", recipe, "data.source.url=memory://x/log.csv")
    assert "data.source.url='memory://x/log.csv' names no file" in sentence
    assert "no command line wrote any: give a directory" in sentence


@pytest.mark.parametrize("content", ["{}", "[1]", "no json"])
def test_what_is_no_lock_holds_nobody_up(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with OutputLock(str(tmp_path)):
        assert storage.read_json(str(tmp_path / FILE))["pid"] == os.getpid()
    assert not (tmp_path / FILE).exists()
