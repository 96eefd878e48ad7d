"""Timing and tables that the benches share."""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from trainer.monitor.results import library_versions

R = TypeVar("R")


def best_of(call: Callable[[], R], repeats: int, budget_s: float = 2.0) -> tuple[float, R]:
    """Shortest wall time of a call, in seconds, and its last result.

    The shortest, because other work on a machine only ever adds. Stops early once `budget_s` are
    spent, so that what is slow is measured once.
    """
    shortest, result, begun = float("inf"), None, time.perf_counter()
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        end = time.perf_counter()
        shortest = min(shortest, end - start)
        if end - begun > budget_s:
            break
    return shortest, result  # type: ignore[return-value]  # at least one repeat


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """PyTorch computes with `count` threads within; None takes all cores this process may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, Any]:
    """What numbers depend on."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns flush right, the header underlined."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])
