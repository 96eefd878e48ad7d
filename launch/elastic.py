"""A worker group that goes on with fewer workers when nodes leave, and with more when they join.

Ray Train's own elastic policy counts what it reserves at the autoscaling coordinator. That looks
at the nodes every 20 s, keeps what a killed driver had reserved for 180 s, takes any number of
workers, and resizes a running group without a checkpoint. Ours keeps its requests to the
autoscaler, but takes only sizes that divide the batches, counts what is free on nodes that answer,
and lets a group that has room to grow save first.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray._private.state import available_resources_per_node
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import ScalingConfig

from launch.nodes import alive_nodes, ask

SETTLE_S = 10.0
"""How long a start waits for the whole group's room: what the last group held is freed late."""
UNIT = 10_000
"""Ray counts resources in parts of this."""
POLL_S = 1.0
Free = Mapping[str, Mapping[str, float]]
"""Node id → resource → what is free."""


@dataclass(frozen=True)
class ElasticGroup:
    """How large a group may be, and what a worker of it needs."""

    sizes: tuple[int, ...]
    """Numbers of workers, ascending."""
    needed: dict[str, float]
    placement: str
    start_timeout_s: float
    grows_every_s: float | None
    """How often a running group looks for room; None: it never grows."""

    def due(self, looked: float) -> bool:
        """Whether a group that looked for room then (monotonic seconds) looks again."""
        return self.grows_every_s is not None and time.monotonic() - looked >= self.grows_every_s

    def room(self, held: Counter[str]) -> int:
        """The largest size that the cluster has room for; `held` are workers that run, by node."""
        places = free_places(_free(), self.needed, held)
        if fitting(self.sizes, places, self.placement) > held.total():
            more = [node for node, count in places.items() if count > held[node]]
            answering = ask(more, _nothing).answers
            places = {node: n if node in answering else held[node] for node, n in places.items()}
        return fitting(self.sizes, places, self.placement)


class GroupTrainer(TorchTrainer):
    """A TorchTrainer whose group may be elastic."""

    def __init__(self, *args: Any, group: ElasticGroup | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group = group

    def _register_sigint_handler(self, *_: Any) -> None:
        """Leave Ctrl-C to `launch.termination`; Ray Train's handler aborts the group unsaved."""

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        # Ray Train has no public place for a policy: it chooses one by the type of num_workers.
        if self._group is not None:
            parts["scaling_policy"] = GroupPolicy(self.scaling_config, self._group)
        return super()._initialize_and_run_controller(**parts)


class GroupPolicy(ElasticScalingPolicy):
    """Decides in Ray Train's controller how many workers a group begins with."""

    def __init__(self, scaling_config: ScalingConfig, group: ElasticGroup) -> None:
        super().__init__(scaling_config)
        self._group = group
        self._waiting_since: float | None = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """The largest group that there is room for; as large as can be, if that comes soon."""
        self._maybe_send_resource_request()
        now = time.monotonic()
        self._waiting_since = now if self._waiting_since is None else self._waiting_since
        size, waited = self._group.room(Counter()), now - self._waiting_since
        if size == self._group.sizes[-1] or (size and waited >= SETTLE_S):
            self._waiting_since = None
            return self._get_resize_decision(size)
        if waited > self._group.start_timeout_s:
            self._waiting_since = None
            raise WorkerGroupStartupTimeoutError(self._group.sizes[0])
        time.sleep(POLL_S)
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """None: Ray Train would end workers where they are. The group itself looks for room
        (`ElasticGroup.room`), saves, and ends to begin anew."""
        self._maybe_send_resource_request()
        return NoopDecision()


def free_places(free: Free, needed: Mapping[str, float], held: Mapping[str, int]) -> dict[str, int]:
    """Workers that each node could have: those that it has, and those that its free rest holds."""
    wants = {name: round(count * UNIT) for name, count in needed.items() if count}
    return {
        node: held.get(node, 0)
        + min((round(has.get(name, 0.0) * UNIT) // n for name, n in wants.items()), default=0)
        for node, has in free.items()
    }


def fitting(sizes: tuple[int, ...], places: Mapping[str, int], strategy: str) -> int:
    """The largest of `sizes` that finds places as its placement strategy wants them; 0: none."""
    match strategy:
        case "STRICT_SPREAD":
            total = sum(min(count, 1) for count in places.values())
        case "STRICT_PACK":
            total = max(places.values(), default=0)
        case _:
            total = sum(places.values())
    return max((size for size in sizes if size <= total), default=0)


def _free() -> Free:
    """What is free on every node that Ray believes alive."""
    alive = alive_nodes()
    return {node: has for node, has in available_resources_per_node().items() if node in alive}


def _nothing() -> None:
    """Run on a node to see that it is there."""
