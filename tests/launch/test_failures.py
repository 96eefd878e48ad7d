"""What a worker group's failure is taken for, and what each answer of the recipe does about it."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.cluster import ClusterConfig
from configs.failures import FailuresConfig
from configs.layout import RunLayout
from configs.load import load_recipe
from data_loaders.poison import PoisonedSampleError, read_quarantined
from launch.failures import Failure, Losses, Place, Restarts, diagnose
from launch.user_errors import GaveUpError
from sharding.loss_module import NonFiniteLossError
from tests.integration.jobs import ROOT
from trainer.stop_notice import AbandonedError, StoppedError

FINGERPRINT = "0" * 12
PEER = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3")


def place_of(tmp_path: Path) -> Place:
    return Place.of(RunLayout(str(tmp_path)), "train", FINGERPRINT)


def told(causes: list[BaseException], tmp_path: Path, **more: Any) -> Failure:
    return diagnose(causes, place_of(tmp_path), 0.0, 2, losses=lambda: Losses(**more))


def host_memory_error() -> BaseException:
    """Torch's own."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    return error.value


def test_each_cause_has_its_kind(tmp_path: Path) -> None:
    killed = RuntimeError("The actor died unexpectedly before finishing this task.")
    assert told([killed], tmp_path).kind == "worker"
    assert told([killed], tmp_path, node="node ab12").kind == "node"
    assert told([PEER, StoppedError("train", 7)], tmp_path).kind == "preemption"
    assert told([PEER, AbandonedError()], tmp_path).kind == "preemption"
    assert told([PoisonedSampleError([3], "x", "y"), PEER], tmp_path).kind == "poisoned_sample"
    raised = told([RuntimeError("the moon is down"), PEER], tmp_path)
    assert raised.sentence == "the moon is down"  # not that its peer lost it


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteLossError("step 2: not finite"),
        FileNotFoundError("events.csv"),
        ValueError("ask for less"),
    ],
)
def test_a_mistake_of_the_users_is_told_in_its_own_words(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{error}$"):
        told([PEER, error], tmp_path)


def test_memory_is_told_apart_and_its_mend_named(tmp_path: Path) -> None:
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    device = told([cuda], tmp_path)
    assert device.kind == "out_of_memory"
    assert "lower data.loader.tokens_per_micro_batch" in device.sentence
    blas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    assert "tokens_per_micro_batch" in told([blas], tmp_path).sentence
    for error in (
        host_memory_error(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 64 bytes from file <x>: Cannot allocate memory (12)"),
        MemoryError("Unable to allocate 4 TiB"),
        RuntimeError("Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: ..."),
    ):
        host = told([PEER, error], tmp_path)
        assert host.kind == "out_of_memory" and "cached_row_groups" in host.sentence
        keys = re.findall(r"\b[a-z]+(?:\.[a-z_]+){2,}\b", host.sentence)
        assert len(keys) == 5
        for key in keys:  # every one is a setting, and one that may be lowered alone
            whole = 64 if key.startswith("data") else "false"
            load_recipe("quickstart", [f"{key}={whole}"])
    killed = told([RuntimeError("died")], tmp_path, memory=True)
    assert killed.kind == "out_of_memory" and "the kernel killed a process" in killed.sentence


EATER = """
import subprocess, sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
from launch.failures import processes_killed_for_memory
before = processes_killed_for_memory()
died = subprocess.run([sys.executable, "-c", "x = b'x' * (900 << 20)"])
print(died.returncode, processes_killed_for_memory() - before)
"""


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A cgroup of 700 MiB."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    groups = dict(line.split(":", 2)[1:] for line in lines)
    first = "memory" in groups
    root = Path("/sys/fs/cgroup/memory" if first else "/sys/fs/cgroup")
    group = root / groups["memory" if first else ""].strip().strip("/") / f"test-{os.getpid()}"
    limits = ("memory.limit_in_bytes",) if first else ("memory.max", "memory.swap.max")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("this machine lets nobody make a cgroup")
    try:
        if not all((group / limit).exists() for limit in limits):
            pytest.skip("this machine's cgroups limit no memory")
        for limit in limits:
            (group / limit).write_text("0" if "swap" in limit else str(700 << 20))
        yield group
    finally:
        group.rmdir()


def test_a_process_that_the_kernel_kills_for_memory_is_counted(small_memory: Path) -> None:
    command = [sys.executable, "-c", EATER, str(small_memory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["-9", "1"], done.stderr


def restarts(tmp_path: Path, **failures: Any) -> tuple[Restarts, list[str]]:
    said: list[str] = []
    config = FailuresConfig.model_validate(failures)
    return Restarts(config, place_of(tmp_path), said.append), said


def commit_checkpoint(tmp_path: Path, step: int, saved: int = 0) -> None:
    name = f"step-{step:08d}-{saved:016x}"
    directory = Path(place_of(tmp_path).newest) / name
    directory.mkdir(parents=True)
    (directory / "MANIFEST.json").write_text("{}")


def test_restarts_in_a_row_are_counted_by_kind_until_a_checkpoint(tmp_path: Path) -> None:
    policy, said = restarts(tmp_path, worker={"max_restarts": 1}, node={"max_restarts": 1})
    worker = Failure("worker", "rank 1 died", RuntimeError("died"))
    policy.decide(worker)
    assert said[-1].endswith("restarting from the newest checkpoint, attempt 2 of 2")
    policy.decide(Failure("node", "node ab", RuntimeError("died")))  # a count of its own
    commit_checkpoint(tmp_path, 4)
    policy.decide(worker)  # weeks later
    with pytest.raises(GaveUpError, match=r"2 times in a row .*failures.worker.max_restarts=1"):
        policy.decide(worker)


def test_checkpoints_before_a_damaged_one_are_progress(tmp_path: Path) -> None:
    """That of step 40 stays until training has caught up with it."""
    commit_checkpoint(tmp_path, 40, saved=1)
    policy, _ = restarts(tmp_path, worker={"max_restarts": 1})
    for saved, step in enumerate((32, 34, 36), start=2):
        commit_checkpoint(tmp_path, step, saved)
        policy.decide(Failure("worker", "rank 1 died", RuntimeError("died")))


@pytest.mark.parametrize("kind", ["hang", "out_of_memory"])
def test_stop_and_restart_are_honoured(kind: Any, tmp_path: Path) -> None:
    failure = Failure(kind, "it is so", RuntimeError("died"))
    policy, _ = restarts(tmp_path, **{kind: {"action": "stop"}})
    with pytest.raises(ValueError, match=f"it is so; .*failures.{kind}.action=restart would"):
        policy.decide(failure)
    policy, said = restarts(tmp_path, **{kind: {"action": "restart", "max_restarts": 1}})
    policy.decide(failure)
    assert "it is so" in said[0]
    with pytest.raises(GaveUpError, match=f"failures.{kind}.max_restarts=1"):
        policy.decide(failure)


def test_poisoned_samples_stop_or_are_left_out_up_to_a_limit(tmp_path: Path) -> None:
    def failure(*samples: int) -> Failure:
        error = PoisonedSampleError(samples, "collating it", "KeyError: 'x'")
        return Failure("poisoned_sample", str(error), error)

    policy, _ = restarts(tmp_path)
    with pytest.raises(ValueError, match=r"sample 7 cannot .* KeyError: 'x'; .*action=skip"):
        policy.decide(failure(7))
    url = place_of(tmp_path).quarantined
    assert read_quarantined(url).tolist() == []
    policy, said = restarts(tmp_path, poisoned_sample={"action": "skip", "max_samples": 2})
    policy.decide(failure(7))
    policy.decide(failure(3))
    assert read_quarantined(url).tolist() == [3, 7]
    assert "without it (2 of 2 that may be left out" in said[-1]
    with pytest.raises(ValueError, match="this stage reads it although"):
        policy.decide(failure(3))  # as who makes the reference of all pairs does
    with pytest.raises(ValueError, match="2 samples are left out already, and .*max_samples=2"):
        policy.decide(failure(9))
    assert read_quarantined(url).tolist() == [3, 7]
    Path(url).write_text('[{"samples": ["x"]}]')
    with pytest.raises(ValueError, match="names samples that are none"):
        read_quarantined(url)


def test_the_old_key_says_where_it_went() -> None:
    with pytest.raises(ValueError, match=r"max_failures=3 has moved: .*worker.max_restarts"):
        ClusterConfig.model_validate({"max_failures": 3})
