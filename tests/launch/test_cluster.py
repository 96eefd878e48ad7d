"""Which failures of a worker group are the user's to mend, and are not tried again."""

import pytest
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError

from launch.cluster import _user_error
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
