"""The harness reports what ranks return, raise, and how they die."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import run_ranks


def add_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def test_results_come_by_rank() -> None:
    assert run_ranks(3, add_ranks, 10) == [(0, 33), (1, 33), (2, 33)]


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("lost")
    dist.barrier()


def test_an_exception_names_its_rank() -> None:
    with pytest.raises(AssertionError, match="rank 1 raised:(.|\\n)*KeyError: 'lost'"):
        run_ranks(2, raise_on, 1)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_killed_rank_gives_its_exit_code() -> None:
    with pytest.raises(AssertionError, match="rank 0 died with exit code -9"):
        run_ranks(2, die_on, 0)


def test_a_rank_that_hangs_is_named() -> None:
    with pytest.raises(TimeoutError, match="ranks .0. did not finish"):
        run_ranks(1, die_on, 5, timeout=2)
