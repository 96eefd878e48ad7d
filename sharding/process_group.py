"""The process group of a worker group, and the few collectives the rest of the code needs."""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Device = Literal["cpu", "cuda"]
T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This process's place among the ranks; every method is collective."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Whose collectives are used; None: those of the whole world."""

    def apart(self) -> "DistributedContext":
        """The same ranks with a group of their own, on the CPU.

        Its collectives may run in another thread, in another order than the world's.
        """
        if not dist.is_initialized():
            return self
        group = dist.new_group(backend="gloo")
        return replace(self, device=torch.device("cpu"), group=group)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; returns `tensor`."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_sum_later(self, tensor: Tensor) -> Callable[[], object]:
        """Start a sum over ranks in place; the returned function waits until it is there."""
        if self.world_size == 1:
            return lambda: None
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work.wait

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Maximum over ranks, in place; returns `tensor`."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def any(self, here: bool) -> bool:
        """Whether `here` is true of a rank."""
        return bool(self.all_reduce_max(torch.tensor(int(here), device=self.device)))

    def _reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor, op, group=self.group)
        return tensor

    def all_gather_object(self, value: T) -> list[T]:
        """`value` of every rank, by rank (pickled: for small things)."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """`value` of rank `source` on every rank (pickled: for small things)."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, source, group=self.group)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier(group=self.group)


def hush_libraries() -> None:
    """Keep what TorchRec and DeepSpeed say about themselves out of a user's terminal.

    Errors still show. Per-step deprecation warnings of torch.distributed are DeepSpeed's to mend.
    """
    for name in ("torchrec", "DeepSpeed", "torch.fx._symbolic_trace", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(torch|torchrec|deepspeed)\b"
    )


def current_context(device: Device) -> DistributedContext:
    """The context of this process; makes the process group if nobody has.

    A worker of a Ray Train group already has one. Otherwise RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT describe it, and without them this process is a world of one.
    """
    hush_libraries()
    if not dist.is_initialized():
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world_size = dist.get_world_size()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    os.environ["DS_ACCELERATOR"] = device
    # DeepSpeed's CPU accelerator otherwise starts `numactl` in every step to count devices.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    return DistributedContext(dist.get_rank(), world_size, place)
