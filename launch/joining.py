"""Whether the Ray cluster at an address may be joined, and why it was not."""

import os

import grpc
from ray._private.services import get_ray_address_from_environment
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from configs.cluster import split_address
from launch.address import PROBE_S, answers, refuse_open, refuse_unguarded, token_file


def check_door(address: str) -> None:
    """Refuse a cluster that lets anyone in, or is not there.

    Args:
        address: `cluster.address`; Ray finds what `auto` is.

    Raises:
        ValueError: it lets anyone in, or its address is none.
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

    Not one that wants TLS: it answers nobody who cannot show a certificate.
    """
    with grpc.insecure_channel(address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=PROBE_S)
        except grpc.RpcError:
            return False
    return True


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
