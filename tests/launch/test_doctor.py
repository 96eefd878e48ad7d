"""The doctor finds planted problems and names the command that mends each."""

import os
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray.core.generated.gcs_service_pb2 import CheckAliveReply
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)

from launch import address, doctor, install, joining


def only(check: str) -> doctor.Finding:
    """The first problem of a check."""
    return next(f for f in getattr(doctor, check)() if f.is_problem)


def test_locked_versions_are_here() -> None:
    assert not [finding for finding in doctor.check_versions() if finding.is_problem]


def test_a_wrong_version_is_named_with_the_locked_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = tmp_path / "requirements"
    shutil.copytree(install.LOCKS, locks)
    lock = locks / "base.lock.txt"
    lock.write_text(lock.read_text().replace("ray==2.60.0", "ray==9.9") + "no-such-thing==1.0\n")
    monkeypatch.setattr(install, "LOCKS", locks)
    finding = only("check_versions")
    assert "ray 2.60.0 (locked 9.9)" in finding.detail
    assert "no-such-thing missing (locked 1.0)" in finding.detail
    assert finding.mend is not None and "make install" in finding.mend


def test_a_stranger_that_takes_our_name_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{install.ROOT}")
    found = [finding for finding in doctor.check_packages() if finding.is_problem]
    assert len(found) == 1
    assert str(tmp_path / "models") in found[0].detail and found[0].mend == "unset PYTHONPATH"


def test_our_packages_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(install.ROOT))
    assert not [finding for finding in doctor.check_packages() if finding.is_problem]


def test_absent_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no_such_package",))
    assert "no_such_package are not installed" in only("check_packages").detail


def test_stale_locks_are_found_and_fresh_ones_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert not [finding for finding in doctor.check_jit_cache() if finding.is_problem]
    old = time.time() - 3600
    os.utime(lock, (old, old))
    assert only("check_jit_cache").mend == f"rm {lock}"


def test_a_dead_cluster_is_told_from_a_living_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    session = tmp_path / "ray" / "ray_current_cluster"
    session.parent.mkdir()
    monkeypatch.setattr(joining, "cluster_lets_in", lambda head: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        session.write_text(f"127.0.0.1:{port}")
        assert not [f for f in doctor.check_ray() if f.is_problem and f.name == "ray"]
    assert only("check_ray").mend == f"rm {session}"


def test_a_token_that_others_can_read_is_found_and_protected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert only("check_ray").mend == f"chmod 600 {token}"
    address.protect_token()
    assert token.stat().st_mode & 0o777 == 0o600
    assert not [f for f in doctor.check_ray() if f.is_problem]


def test_little_room_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_DISK", 1 << 60)
    monkeypatch.setattr(doctor, "LEAST_SHARED_MEMORY", 1 << 60)
    assert [f.name for f in doctor.check_space() if f.is_problem] == ["disk", "shm"]


def test_report_counts_problems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_python, doctor.check_space))
    assert doctor.examine()
    monkeypatch.setattr(doctor, "LEAST_DISK", 1 << 60)
    assert not doctor.examine()
    output = capsys.readouterr().out
    assert "no problems found" in output and "1 problem found" in output and "mend: df" in output


@pytest.mark.parametrize(
    ("where", "loopback"),
    [
        ("127.0.0.1:6379", True),
        ("http://localhost:8265", True),
        ("http://[::1]:8265", True),
        ("127.3.2.1", True),
        ("10.0.0.1:6379", False),
        ("ray://head:10001", False),
        ("http://127.0.0.1.example.com:8265", False),
        ("0.0.0.0:1", False),
        ("", False),
    ],
)
def test_loopback(where: str, loopback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert address.is_loopback(where) == loopback
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if loopback:
        address.refuse_open(where, "--address")
    else:
        with pytest.raises(ValueError, match="RAY_AUTH_MODE=token"):
            address.refuse_open(where, "--address")
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        address.refuse_open(where, "--address")


def test_a_dashboard_beyond_this_machine_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    (tmp_path / "ray").mkdir()
    session = tmp_path / "ray" / "ray_current_cluster"
    monkeypatch.setattr(doctor, "answers", lambda head: True)
    monkeypatch.setattr(joining, "cluster_lets_in", lambda head: False)
    session.write_text("192.0.2.1:6379")
    [problem] = [finding for finding in doctor.check_ray() if finding.is_problem]
    assert "192.0.2.1:8265" in problem.detail and "--dashboard-host=127.0.0.1" in str(problem.mend)
    session.write_text("127.0.0.1:6379")
    assert not [finding for finding in doctor.check_ray() if finding.is_problem]


def test_a_cluster_without_tokens_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    server = grpc.server(ThreadPoolExecutor(1))
    add_NodeInfoGcsServiceServicer_to_server(Open(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
    try:
        assert "RAY_AUTH_MODE=token ray start" in str(only("check_ray").mend)
    finally:
        server.stop(None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        head = f"127.0.0.1:{silent.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(head)
        monkeypatch.setattr(joining, "GUARD_S", 0.2)
        assert "does not say whether it asks for a token" in only("check_ray").detail


class Open(NodeInfoGcsServiceServicer):
    """A head's door, to whoever knocks."""

    def CheckAlive(self, request: Any, context: Any) -> CheckAliveReply:  # noqa: N802 - Ray's name
        return CheckAliveReply()
