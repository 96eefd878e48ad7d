"""One run at a time on an output: a lock file with a heartbeat, on any storage.

Local storage makes a file only where there is none, so that one of many runs gets the lock, and one
of many takes over a dead run's. No other storage below fsspec has one way to do so: there a run
writes its lock, waits until a rival's write would show, and holds the output if it then reads back
its own.
"""

import errno
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from configs import storage
from configs.base import Config, Timestamp
from configs.terminal import say

FILE = ".tandem-run.lock"
"""Hidden, so that it is no log of a user's, and of a name that nothing else has."""
HEARTBEAT_S = 15.0
LOOK_S = 1.0
"""Between two looks at the clock on the wall, which goes on while this machine sleeps."""
STALE_S = 120.0
"""Silence after which a run on another machine is taken for dead; covers clocks that differ."""
SETTLE_S = 1.0
"""Where no file can be made exclusively: longest time between a rival's look at the lock and its
write being readable."""
_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP})
"""What disks say that know no second name of a file, such as exFAT."""


class OutputLock:
    """Context that holds `output` for this process.

    Raises:
        ValueError: on entry, another run holds it: who does, and the mend.
    """

    def __init__(self, output: str, lost: Callable[[], object] = lambda: None) -> None:
        """`lost` is called by another thread, once, when another run has taken over."""
        self._output, self._lost = output, lost
        self._url = storage.join(output, FILE)
        self._me = _this_process()
        self._rival: dict[str, Any] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "OutputLock":
        storage.make_directory(self._output)
        held = self._take()
        if held is not None:
            raise ValueError(self._refusal(held))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join()
        held = self._read()
        if held is not None and held["token"] == self._me["token"]:
            storage.remove(self._url)

    def check(self) -> None:
        """Refuse to go on where another run took over, as it may when this one slept.

        Raises:
            ValueError: it did.
        """
        if self._rival is not None:
            raise ValueError(
                f"another run has taken over {self._output!r} ({_who(self._rival)}) while this one "
                "showed no life; let that one end, then run the same command again"
            )

    def _take(self) -> dict[str, Any] | None:
        """Take the lock, or tell who holds it."""
        if not storage.is_local(self._url):
            return self._settle()
        try:
            return _take_exclusively(self._url, self._said())
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._settle()

    def _settle(self) -> dict[str, Any] | None:
        held = self._read()
        if held is not None and _lives(held):
            return held
        self._write()
        time.sleep(SETTLE_S)
        held = self._read()
        return None if held is None or held["token"] == self._me["token"] else held

    def _beat(self) -> None:
        while not self._wait():
            try:
                held = self._read()
                if held is not None and held["token"] != self._me["token"]:
                    self._rival = held
                    self._lost()
                    return
                self._write()
            except Exception as error:  # noqa: BLE001 - each storage back end raises its own kinds
                say(f"{self._url} cannot be renewed: {error}", error=True)

    def _wait(self) -> bool:
        """Until the next beat, or, at once, after a sleep; whether the lock is closed."""
        began, clock = time.monotonic(), time.time()
        while time.monotonic() - began < HEARTBEAT_S and time.time() - clock < HEARTBEAT_S:
            if self._closed.wait(min(LOOK_S, HEARTBEAT_S)):
                return True
        return False

    def _read(self) -> dict[str, Any] | None:
        storage.filesystem(self._url)[0].invalidate_cache()
        data = _content(self._url)
        return None if data is None else _parsed(data, self._url)

    def _write(self) -> None:
        storage.write_bytes(self._url, self._said())

    def _said(self) -> bytes:
        return storage.json_bytes(self._me | {"alive": time.time()})

    def _refusal(self, held: dict[str, Any]) -> str:
        return (
            f"output={self._output!r} is in use by another run ({_who(held)}); wait for it, stop "
            f"it, or choose another output (if it is dead on a machine of its own, this one may "
            f"begin {STALE_S:.0f} s after its last sign of life)"
        )


class _Holder(Config):
    """What a lock file says."""

    token: str
    host: str
    machine: str
    pid: int
    born: int | None
    since: Timestamp
    alive: Timestamp


def _content(url: str) -> bytes | None:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError:
        return None


def _parsed(data: bytes, url: str) -> dict[str, Any] | None:
    """What a lock file says; None if that is no lock, as a machine that lost power may leave it."""
    try:
        return _Holder.model_validate(storage.parse_json(data, url)).model_dump()
    except ValueError:
        return None


def _take_exclusively(url: str, mine: bytes) -> dict[str, Any] | None:
    """Make the local lock file `url`, which says `mine`, or tell who holds it.

    The lock of a dead run is replaced by who holds a lock on just this content of it, and finds it
    unchanged then: of others that saw it dead, each finds that lock, or the new one. A run may die
    in the middle of this, too: the lock on the lock is taken over in the same way.

    Raises:
        OSError: the disk cannot make a file exclusively.
    """
    while not _create(url, mine):
        seen = _content(url)
        if seen is None:  # its run has ended meanwhile
            continue
        if seen == mine:  # a share over the network may make the file and fail to say so
            return None
        held = _parsed(seen, url)
        if held is not None and _lives(held):
            return held
        heir = f"{url}.{storage.sha256_bytes(seen)[:16]}"
        rival = _take_exclusively(heir, mine)
        if rival is not None:
            return rival
        try:
            if _content(url) == seen:
                storage.write_bytes(url, mine)
                return None
        finally:
            storage.remove(heir)
    return None


def _create(url: str, data: bytes) -> bool:
    """Make a local file, whole from the first, if there is none; whether it did."""
    path, whole = (storage.filesystem(each)[1] for each in (url, f"{url}.{uuid.uuid4().hex}"))
    storage.write_bytes(whole, data)
    try:
        os.link(whole, path)
    except FileExistsError:
        return False
    finally:
        os.remove(whole)
    return True


def _who(held: dict[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["since"]))
    return f"host {held['host']}, process {held['pid']}, since {since}"


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "born": _born(pid),
        "since": time.time(),
    }


def _lives(held: dict[str, Any]) -> bool:
    """Whether the holder of a lock still runs, as far as this machine can tell."""
    if held["machine"] == _machine():
        return held["born"] is not None and _born(held["pid"]) == held["born"]
    return bool(time.time() - held["alive"] < STALE_S)


def _machine() -> str:
    """What process ids are unique in: a boot of a machine, and in it a container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # a sandbox that hides them
        return socket.gethostname()


def _born(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process, which its id alone does not tell from
    another's that had it earlier; None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
