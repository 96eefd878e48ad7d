"""Run a function on several ranks: each a fresh process with its own gloo group.

Processes are forked from a server that has imported torch, TorchRec and DeepSpeed once, so a call
costs a third of a second and nothing leaks from one call into the next.
"""

import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import cloudpickle

PRELOAD = ["torch", "torchrec.distributed.planner", "deepspeed", "tests.preload"]


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """`fn(*args)` on every rank of a gloo group of `world_size`; results by rank.

    `sharding.process_group.current_context("cpu")` inside `fn` gives the context. A rank that
    raises or dies fails the call with its traceback or exit code; the other ranks are ended.
    """
    with Ranks(world_size, fn, *args) as ranks:
        return ranks.results(timeout)


class Ranks:
    """Context in which `fn(*args)` runs on every rank; at its end the ranks are killed."""

    def __init__(self, world_size: int, fn: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
        context.set_forkserver_preload(PRELOAD)
        self._directory = tempfile.mkdtemp(prefix="tandem-ranks-")
        self.processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        payload = cloudpickle.dumps((fn, args))
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, world_size, self._directory, payload, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    def results(self, timeout: float) -> list[Any]:
        """What the ranks return; fails as soon as one does not."""
        return _collect(self.processes, self._pipes, time.monotonic() + timeout)

    def outcomes(self, timeout: float) -> list[Any]:
        """What each rank returned, or the exception it raised, or the exit code it died with."""
        deadline = time.monotonic() + timeout
        found: list[Any] = []
        for rank, (pipe, process) in enumerate(zip(self._pipes, self.processes, strict=True)):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"rank {rank} did not finish in time")
            try:
                _, _, value = cloudpickle.loads(pipe.recv_bytes())
            except EOFError:
                process.join(5)
                value = process.exitcode
            found.append(value)
        return found


def _collect(processes: list[BaseProcess], pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    while len(results) < len(pipes) and not failures:
        pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            raise TimeoutError(f"ranks {late} did not finish in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            failure = _receive(rank, pipes[rank], processes[rank], results)
            failures.extend([failure] if failure else [])
    if failures:
        raise AssertionError("\n".join(failures))
    return [results[rank] for rank in range(len(pipes))]


def _receive(
    rank: int, pipe: Connection, process: BaseProcess, results: dict[int, Any]
) -> str | None:
    """Store a rank's result, or say how it failed."""
    try:
        ok, trace, value = cloudpickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(5)
        return f"rank {rank} died with exit code {process.exitcode}"
    if not ok:
        return f"rank {rank} raised:\n{trace}"
    results[rank] = value
    return None


def _rank_main(
    rank: int, world_size: int, directory: str, payload: bytes, pipe: Connection
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    store = dist.FileStore(os.path.join(directory, "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        fn, args = cloudpickle.loads(payload)
        answer: tuple[bool, str, Any] = (True, "", fn(*args))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the caller reports it
        answer = (False, traceback.format_exc(), error)
    pipe.send_bytes(_packed(answer))
    pipe.close()
    if answer[0]:
        dist.barrier()  # nobody leaves while a peer still needs the store
        dist.destroy_process_group()


def _packed(answer: tuple[bool, str, Any]) -> bytes:
    try:
        return cloudpickle.dumps(answer)
    except Exception:  # noqa: BLE001 - an exception may hold what cannot be sent
        return cloudpickle.dumps((answer[0], answer[1], RuntimeError(answer[1])))
