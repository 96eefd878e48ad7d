"""How the ranks of a worker group find each other: by a store that only their network reaches.

Ray Train has torch make the store, which then listens on every address of the host and asks nobody
for a token: whoever reaches it reads and changes what ranks tell each other.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

LOOPBACK = "127.0.0.1"


@dataclass
class GroupConfig(TorchConfig):
    """Of a process group whose store listens on one address."""

    loopback: bool = False
    """All ranks are on this host; otherwise the store is at its node's address in the cluster."""

    @property
    def backend_cls(self) -> type["_GroupBackend"]:
        """What Ray Train starts the group by."""
        return _GroupBackend


class _GroupBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: GroupConfig) -> None:
        """Have rank 0 listen, and every rank join there."""
        host, port, listener = worker_group.execute_single(0, _listen, backend_config.loopback)
        worker_group.execute(_set_torch_distributed_env_vars)
        world_size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _join,
                    backend_config,
                    host,
                    port,
                    world_rank=rank,
                    world_size=world_size,
                    listener=listener if rank == 0 else None,
                )
                for rank in range(world_size)
            ]
        )


def loopback_interface() -> str:
    """Name of this host's loopback interface."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _listen(loopback: bool) -> tuple[str, int, int]:
    """Host, port and file descriptor of a new listening socket of this process."""
    host = LOOPBACK if loopback else ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.create_server((host, 0), family=family)
    return host, server.getsockname()[1], server.detach()


def _join(
    config: GroupConfig,
    host: str,
    port: int,
    world_rank: int,
    world_size: int,
    listener: int | None,
) -> None:
    """Make this process a rank of the group; the one with the listener serves the store."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)
    timeout = timedelta(seconds=config.timeout_s)
    store = dist.TCPStore(
        host,
        port,
        world_size,
        is_master=listener is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener,
    )
    dist.init_process_group(
        config.backend, store=store, rank=world_rank, world_size=world_size, timeout=timeout
    )
