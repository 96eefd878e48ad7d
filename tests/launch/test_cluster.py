"""Why a cluster was not joined."""

import socket
import time

import pytest

from configs.cluster import ClusterConfig
from launch.cluster import connect
from launch.joining import why_not


def test_why_a_cluster_was_not_joined() -> None:
    """Nobody there is one sentence at once; what answers but refuses is another."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "export RAY_AUTH_MODE=token" in why_not(address, ConnectionError("refused"))
    started = time.monotonic()
    with (
        pytest.raises(ValueError, match=r"no Ray cluster answers there .* `ray start --head`"),
        connect(ClusterConfig(address=address)),
    ):
        pass
    assert time.monotonic() - started < 10
