"""Which failures of a worker group are the user's to mend, and are not tried again."""

import socket
import time

import pytest
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError

from configs.cluster import ClusterConfig
from launch.cluster import _user_error, _why_not, connect
from sharding.loss_module import NonFiniteLossError


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (NonFiniteLossError("step 2: not finite"), "step 2: not finite"),
        (RuntimeError("a peer closed its connection"), None),
    ],
)
def test_a_deterministic_failure_is_the_users(error: Exception, sentence: str | None) -> None:
    failure = UserExceptionWithTraceback(error, "traceback")
    group = WorkerGroupError("a worker failed", {0: failure})
    assert _user_error(group) == sentence


def test_why_a_cluster_was_not_joined() -> None:
    """Nobody there is one sentence at once; what answers but refuses is another."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "export RAY_AUTH_MODE=token" in _why_not(address, ConnectionError("refused"))
    started = time.monotonic()
    with (
        pytest.raises(ValueError, match=r"no Ray cluster answers there .* `ray start --head`"),
        connect(ClusterConfig(address=address)),
    ):
        pass
    assert time.monotonic() - started < 10
