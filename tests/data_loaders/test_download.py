"""Downloads from a server that breaks off, lies, or is not there."""

import hashlib
import http.server
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_loaders import download
from data_loaders.download import RemoteFile, UnavailableError, Wheel, fetch, fetch_wheel

DATA = bytes(range(256)) * 4000
MD5 = "md5:" + hashlib.md5(DATA).hexdigest()


class _Server(http.server.ThreadingHTTPServer):
    """Serves DATA; `/broken/…` stops halfway the first time, `/other/…` serves something else."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ranges: list[str | None] = []

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        if "missing" in self.path:
            self.send_error(404)
            return
        data = b"<html>log in first</html>" if "other" in self.path else DATA
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if "broken" in self.path and not begin:
            self.wfile.write(data[: len(data) // 2])
            return
        self.wfile.write(data[begin:])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def _fetch(directory: Path, *addresses: str, checksum: str | None = MD5) -> Path:
    return fetch(RemoteFile("data.bin", addresses, checksum), directory, lambda line: None)


def test_broken_download_is_resumed(server: _Server, tmp_path: Path) -> None:
    path = _fetch(tmp_path, server.address("broken/data.bin"))
    assert path.read_bytes() == DATA
    assert server.ranges == [None, f"bytes={len(DATA) // 2}-"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.bin"]


def test_what_a_killed_run_left_is_resumed(server: _Server, tmp_path: Path) -> None:
    address = server.address("data.bin")
    partial = tmp_path / f"data.bin.{download._tag(address)}.part"
    partial.write_bytes(DATA[:1000])
    assert _fetch(tmp_path, address).read_bytes() == DATA
    assert server.ranges == ["bytes=1000-"]


def test_a_file_that_is_there_is_not_fetched_again(server: _Server, tmp_path: Path) -> None:
    _fetch(tmp_path, server.address("data.bin"))
    _fetch(tmp_path, server.address("data.bin"))
    assert len(server.ranges) == 1
    (tmp_path / "data.bin").write_bytes(b"damaged")
    assert _fetch(tmp_path, server.address("data.bin")).read_bytes() == DATA


def test_next_address_after_a_wrong_checksum(server: _Server, tmp_path: Path) -> None:
    addresses = [server.address(path) for path in ("other/a", "missing/b", "data.bin")]
    assert _fetch(tmp_path, *addresses).read_bytes() == DATA


def test_all_addresses_fail_and_each_says_why(server: _Server, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as error:
        _fetch(tmp_path, server.address("other/a"), server.address("missing/b"))
    message = str(error.value)
    assert "md5 checksum is" in message and f"instead of {MD5.removeprefix('md5:')}" in message
    assert "missing/b" in message and "404" in message
    assert not list(tmp_path.iterdir())


def test_silent_address_is_left_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ANSWER_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # accepts and never answers
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="no answer"):
            _fetch(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}/data.bin")
        assert time.monotonic() - began < 5


def _package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let `python -m pip download … --dest FOLDER NAME` be a script."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\n{script}\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))


def test_wheel_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Wheel("toy==1", "toy-1.whl", hashlib.sha256(b"wheel").hexdigest())
    _package_index(tmp_path, monkeypatch, 'printf wheel > "$2/toy-1.whl"')
    path = fetch_wheel(good, tmp_path / "cache", lambda line: None)
    assert path.read_bytes() == b"wheel"
    _package_index(tmp_path, monkeypatch, "exit 1")  # not asked again
    assert fetch_wheel(good, tmp_path / "cache", lambda line: None) == path
    other = Wheel("toy==1", "toy-1.whl", "0" * 64)
    _package_index(tmp_path, monkeypatch, 'printf wheel > "$2/toy-1.whl"')
    with pytest.raises(UnavailableError, match="instead of 0000"):
        fetch_wheel(other, tmp_path / "empty", lambda line: None)
    _package_index(tmp_path, monkeypatch, "echo ERROR: no such package >&2; exit 1")
    with pytest.raises(UnavailableError, match="toy==1: ERROR: no such package"):
        fetch_wheel(other, tmp_path / "empty", lambda line: None)
