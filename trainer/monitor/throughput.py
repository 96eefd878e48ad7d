"""Speed and memory of a training loop: tokens/s, model FLOPs utilisation, bytes in use."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import psutil
import torch

BACKWARD_FACTOR = 3.0
"""Forward plus backward, in forward passes."""
PROBE_SECONDS = 0.3


@lru_cache(maxsize=8)
def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on this device: a short probe, not a data sheet.

    The best of the repeats of a third of a second, with this process's threads and whatever else
    runs on the machine meanwhile (ranks that share one probe it together). Measured once a process.
    """
    size = 8192 if device.type == "cuda" else 1024
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    right = torch.full((size, size), 0.5, device=device, dtype=dtype)
    product = left @ right  # warm-up: library handles and kernels load here
    best, deadline = float("inf"), time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < deadline:
        _wait(device)
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Speed:
    """What one window of training steps achieved."""

    tokens_per_s: float
    """Over all ranks."""
    mfu: float | None
    """Share of the measured matmul peak of all ranks, 0…1; None where no peak was given."""


class Throughput:
    """Tokens/s and MFU between two readings, without the time spent in `paused()`."""

    def __init__(
        self,
        forward_flops_per_token: float,
        peak_flops: float | None,
        world_size: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the first window.

        Args:
            forward_flops_per_token: `SequenceModel.flops_per_token`; backward counts twice more.
            peak_flops: one rank's `measured_peak_flops`; None leaves MFU out.
            world_size: ranks that train; all are taken to be alike.
            clock: seconds, for tests.
        """
        self._flops_per_token = forward_flops_per_token * BACKWARD_FACTOR
        self._peak = None if peak_flops is None else peak_flops * world_size
        self._clock = clock
        self._tokens = 0
        self._start = clock()

    def add(self, tokens: int) -> None:
        """Count the tokens of a step, summed over all ranks."""
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of what is not training: validation, saving."""
        begin = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - begin

    def read(self) -> Speed:
        """Speed since the last reading; starts a new window."""
        now = self._clock()
        seconds = max(now - self._start, 1e-9)
        rate = self._tokens / seconds
        self._tokens, self._start = 0, now
        mfu = None if self._peak is None else rate * self._flops_per_token / self._peak
        return Speed(tokens_per_s=rate, mfu=mfu)


@dataclass(frozen=True)
class Memory:
    """Bytes in use by this process."""

    rss: int
    """Resident memory of the process."""
    device: int | None
    """Peak of CUDA memory allocated to tensors; None on a CPU."""
    device_total: int | None


def memory_in_use(device: torch.device) -> Memory:
    """Read this process's memory now."""
    rss = int(psutil.Process().memory_info().rss)
    if device.type != "cuda":
        return Memory(rss=rss, device=None, device_total=None)
    total = torch.cuda.get_device_properties(device).total_memory
    return Memory(rss=rss, device=torch.cuda.max_memory_allocated(device), device_total=total)
