"""Asking nodes themselves: what Ray believes of one that was killed is wrong for some 15 s."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_S = 30.0
"""Longest wait for a task on a node: Ray gives up a node that is gone sooner, and a process that
starts slowly on a busy one may take this long."""


@dataclass(frozen=True)
class Asked:
    """What nodes said."""

    answers: dict[str, Any]
    """Node id → what the function gave there."""
    lost: tuple[str, ...]
    """Nodes that are not there any more; of those that are in neither, nothing is known."""


def ask(nodes: Iterable[str], function: Callable[[], Any]) -> Asked:
    """Call `function` on each of the nodes, at once and without a claim on their resources."""
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(): node
        for node in nodes
    }
    if not asked:
        return Asked({}, ())
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    for ref in late:
        ray.cancel(ref)  # not by force: a process that starts slowly answers the next time
    answers: dict[str, Any] = {}
    for ref in ready:
        try:
            answers[asked[ref]] = ray.get(ref)
        except RayError:  # its node died, or took nothing any more
            continue
    alive = alive_nodes()
    silent = [node for node in asked.values() if node not in answers]
    return Asked(answers, tuple(node for node in silent if node not in alive))


def alive_nodes() -> set[str]:
    """Ids of the nodes that Ray believes alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
