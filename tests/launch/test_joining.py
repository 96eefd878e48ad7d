"""What counts as proof that a cluster asks for a token: nothing but its own refusal."""

import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray.core.generated.gcs_service_pb2 import CheckAliveReply
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)

from launch import joining, submit
from launch.address import refuse_unguarded
from launch.user_errors import BusyError

Serve = Callable[..., str]


class Door(NodeInfoGcsServiceServicer):
    """A head's, to whoever knocks; with a code it refuses."""

    def __init__(self, code: grpc.StatusCode | None) -> None:
        self._code = code

    def CheckAlive(self, request: Any, context: Any) -> CheckAliveReply:  # noqa: N802 - Ray's name
        if self._code is not None:
            context.abort(self._code, "Invalid or missing authentication token")
        return CheckAliveReply()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a head; its address."""
    servers = []

    def start(
        code: grpc.StatusCode | None = None, secured: grpc.ServerCredentials | None = None
    ) -> str:
        server = grpc.server(ThreadPoolExecutor(1))
        servers.append(server)
        add_NodeInfoGcsServiceServicer_to_server(Door(code), server)
        place = "127.0.0.1:0"
        port = (
            server.add_insecure_port(place)
            if secured is None
            else server.add_secure_port(place, secured)
        )
        server.start()
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


def test_a_proxy_is_not_asked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        dead = f"http://127.0.0.1:{gone.getsockname()[1]}"
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, dead)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    address = serve()
    assert joining.cluster_lets_in(address)
    with pytest.raises(ValueError, match="asks for no token"):
        joining.check_door(address)


def test_a_refusal_is_proof_and_another_error_is_none(serve: Serve) -> None:
    assert not joining.cluster_lets_in(serve(grpc.StatusCode.UNAUTHENTICATED))
    with pytest.raises(ValueError, match=r"cannot be told \(.*authentication.*of a Ray head"):
        joining.check_door(serve(grpc.StatusCode.UNIMPLEMENTED))


def test_a_head_that_does_not_answer_in_time_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "GUARD_S", 0.2)
    monkeypatch.setattr(joining, "PROBE_S", 0.2)
    monkeypatch.setattr(submit, "GUARD_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(BusyError, match="whether what answers there asks for a token cannot"):
            joining.check_door(address)
        with pytest.raises(BusyError, match=r"^--address='.*run the same command again"):
            refuse_unguarded(address, "--address", submit.server_lets_in)


def test_only_tls_that_wants_a_certificate_is_proof(serve: Serve, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", str(key), "-out", str(certificate), "-subj", "/CN=head"]
    subprocess.run(command, check=True, capture_output=True)
    chain = certificate.read_bytes()
    pair = [(key.read_bytes(), chain)]
    assert not joining.cluster_lets_in(
        serve(secured=grpc.ssl_server_credentials(pair, chain, require_client_auth=True))
    )
    with pytest.raises(ConnectionError):
        joining.cluster_lets_in(serve(secured=grpc.ssl_server_credentials(pair)))


@pytest.mark.parametrize(
    ("status", "text", "lets_in"),
    [
        (200, '{"version": "4", "ray_version": "2.60.0"}', True),
        (401, "Unauthorized: Missing authentication token", False),
        (403, "Forbidden", False),
        (200, "<html>a proxy's page</html>", None),
        (502, "Bad Gateway", None),
    ],
)
def test_a_job_server_is_guarded_if_it_says_so(
    status: int, text: str, lets_in: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    with closing(server.socket):
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        if lets_in is None:
            with pytest.raises(ValueError, match=rf"cannot be told \(it answers with .*{status}"):
                refuse_unguarded(address, "--address", submit.server_lets_in)
        else:
            assert submit.server_lets_in(address) is lets_in
        server.shutdown()
        thread.join()


def test_a_job_server_that_is_not_there_is_no_guarded_one() -> None:
    with pytest.raises(ConnectionError):
        submit.server_lets_in("http://127.0.0.1:1")
