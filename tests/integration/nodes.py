"""A Ray cluster of several nodes on this host, as a process of its own, protected by a token.

Ray reads its authentication mode when it is imported, so the cluster cannot live in the process of
the tests, whose other clusters have none.
"""

import os
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.integration.jobs import ROOT, workers_below


class Nodes:
    """Talks to the process that holds the cluster."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address, self.job_server = self._answer().split()
        self.others: list[int] = []
        """Nodes that were added, and neither killed nor drained."""

    def workers(self) -> set[int]:
        """Processes that are ranks of a worker group."""
        return workers_below(self._process.pid)

    def add(self, directory: Path) -> int:
        """Start a node of one CPU whose processes stand in `directory`; its number."""
        self.others.append(int(self._ask(f"add {directory}")))
        return self.others[-1]

    def remove(self, node: int) -> None:
        """Kill a node and all its processes."""
        self._ask(f"remove {node}")
        self.others.remove(node)

    def drain(self, node: int, seconds: float) -> None:
        """Have Ray tell that a node will be taken away, as an autoscaler does."""
        self._ask(f"drain {node}:{seconds}")
        self.others.remove(node)

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        """The next line that is meant for us; Ray prints others."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("> "):
                return line[2:].strip()
        raise AssertionError("the process that holds the cluster died")


def token_environment(directory: Path) -> dict[str, str]:
    """Variables of everything that may talk to the cluster; the token lies in `directory`."""
    token = directory / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": path}


@contextmanager
def cluster(environment: dict[str, str], directory: Path) -> Iterator[Nodes]:
    """A cluster whose head has one CPU and stands in `directory`; ends with the context."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.nodes"],
        cwd=directory,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_raylet_start_wait_time_s": "300",  # of a machine that tests something else as well
            **environment,
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Nodes(process)
    finally:
        process.communicate(timeout=60)  # the end of its input ends it


def _drain(node: Any, seconds: float) -> None:
    from ray.core.generated import autoscaler_pb2

    accepted, why = node.get_gcs_client().drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "taken away by a test",
        int((time.time() + seconds) * 1000),
    )
    assert accepted, why


def quiet_port() -> int:
    """A free port below those that connections are given, which may take it before it is used."""
    while True:
        port = random.randrange(20_000, 30_000)
        with suppress(OSError), socket.create_server(("", port)):
            return port


def _serve() -> None:
    from ray.cluster_utils import Cluster

    agent_port = quiet_port()  # the default may belong to another Ray on this host
    held = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": True,
            "dashboard_port": 0,
            "dashboard_agent_listen_port": agent_port,
        },
    )
    nodes = []
    print(f"> {held.address} http://{held.head_node.webui_url}", flush=True)
    for line in sys.stdin:
        verb, argument = line.split()
        if verb == "add":
            os.chdir(argument)
            nodes.append(held.add_node(num_cpus=1))
            answer = len(nodes) - 1
        elif verb == "drain":
            number, _, seconds = argument.partition(":")
            answer = int(number)
            _drain(nodes[answer], float(seconds))
        else:
            held.remove_node(nodes[int(argument)], allow_graceful=False)
            answer = int(argument)
        print(f"> {answer}", flush=True)
    held.shutdown()


if __name__ == "__main__":
    _serve()
