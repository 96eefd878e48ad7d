"""The Ray that a run starts for itself: nobody else reaches it, and neither outlives the other."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants
from ray._private import utils as ray_utils
from ray._private import worker as ray_worker
from ray._private.node import Node

from configs.terminal import say_aside
from launch.termination import SAYING_S
from launch.user_errors import BUSY_STATUS

POLL_S = 1.0
_NEEDED = (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET)


@contextmanager
def off_the_network(embedded: bool) -> Iterator[None]:
    """An embedded Ray that is started meanwhile listens on loopback alone.

    Otherwise Ray takes the host's address in the network, even where it is told one on loopback,
    and serves metrics there to whoever asks; on macOS and Windows this constant keeps it from that.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = before and not embedded
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Ray takes no signal of this process: its handler would end it without a word."""
    before = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = before


@contextmanager
def ends_with_its_head() -> Iterator[None]:
    """This process ends with a sentence when the head that it started dies, or its raylet.

    Ray itself waits a minute for a head to come back, and then ends with a line of its log; without
    a raylet, what is asked fails. Nothing that asks Ray can be left in an orderly way by then.
    """
    node: Node | None = ray_worker._global_node
    over = threading.Event()
    watching = threading.Thread(target=_watch, args=(node, over), daemon=True)
    if node is not None:  # nothing was started here, where a cluster was joined
        watching.start()
    try:
        yield
    except Exception:
        if node is not None:
            _end_if_dead(node)
        raise
    finally:
        over.set()
        if watching.is_alive():
            watching.join()


def _watch(node: Node, over: threading.Event) -> None:
    while not over.wait(POLL_S):
        _end_if_dead(node)


def _end_if_dead(node: Node) -> None:
    for name, died in node.dead_processes():
        status = died.returncode
        if name not in _NEEDED or not status:
            continue
        how = f"signal {-status}" if status < 0 else f"status {status}"
        say_aside(
            f"the head of the embedded Ray died ({name}, {how}), maybe for want of memory; "
            "what is committed stands: the same command goes on",
            SAYING_S,
        )
        node.kill_all_processes(check_alive=False, allow_graceful=False)
        os._exit(BUSY_STATUS)


def leave() -> None:
    """Disconnect, and end what was started here.

    `ray.shutdown` would ask every daemon by SIGTERM, which they do not hear (`unheard`), and wait a
    second for each.
    """
    started, ray_worker._global_node = ray_worker._global_node, None
    ray.shutdown()
    if started is not None:
        if started.is_head():
            started.destroy_external_storage()
        started.kill_all_processes(check_alive=False, allow_graceful=False)
