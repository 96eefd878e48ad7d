"""Whether the Ray cluster at an address may be joined, and why it was not."""

import os
import socket
import ssl

import grpc
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
from ray._private.services import get_ray_address_from_environment
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from configs.cluster import split_address
from launch.address import GUARD_S, PROBE_S, answers, refuse_open, refuse_unguarded, token_file


def check_door(address: str) -> None:
    """Refuse a cluster that lets anyone in, or is not there.

    Args:
        address: `cluster.address`; Ray finds what `auto` is.

    Raises:
        ValueError: it lets anyone in, or does not say, or its address is none.
        BusyError: it did not say in time.
        ConnectionError: nothing answers.
    """
    what = "cluster.address"
    if address == "auto":
        address = get_ray_address_from_environment("auto", None)  # Ray's own search
        what = "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "cluster.address (auto)"
    try:
        split_address(address)
    except ValueError as error:
        raise ValueError(f"{what}={error}") from None
    refuse_open(address, what)
    if not answers(address):
        raise ConnectionError("connection refused")
    refuse_unguarded(address, what, cluster_lets_in)


def cluster_lets_in(address: str) -> bool:
    """Whether the head at `host:port` answers a caller that shows no token.

    Not one that wants a certificate: it answers nobody who cannot show one. It is asked the way
    that Ray's own clients go, which is by no proxy unless Ray is told so.

    Raises:
        ConnectionError: what answers says neither.
        TimeoutError: it says nothing within `GUARD_S`.
    """
    with grpc.insecure_channel(address, GLOBAL_GRPC_OPTIONS) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=GUARD_S)
        except grpc.RpcError as error:
            code, told = error.code(), " ".join(str(error.details()).split())
            if code == grpc.StatusCode.UNAUTHENTICATED or _wants_certificate(address):
                return False
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError(told) from error
            raise ConnectionError(told) from error
    return True


def _wants_certificate(address: str) -> bool:
    """Whether what listens at `host:port` speaks TLS, and hangs up on who shows no certificate.

    A server that takes such callers begins with its settings of HTTP/2.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # no secret is sent there
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # asks for it after the handshake
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(split_address(address), timeout=PROBE_S) as plain,
            context.wrap_socket(plain) as secured,
        ):
            return not secured.recv(1)
    except ssl.SSLError as error:
        return "CERTIFICATE_REQUIRED" in str(error.reason)
    except OSError:
        return False


def why_not(address: str, error: ConnectionError) -> str:
    """A sentence on why the cluster at `address` was not joined."""
    if answers(address):
        return (
            f"cluster.address={address!r}: what answers there does not let this job in; if it asks "
            f"for a token, export RAY_AUTH_MODE=token here, and put its token into {token_file()} "
            "(mode 0600)"
        )
    return (
        f"cluster.address={address!r}: no Ray cluster answers there ({error}); "
        "start one with `ray start --head`, or use cluster.address=local"
    )
