"""One small training on plain ranks, faults inside them, and how two trainings are compared."""

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from subprocess import PIPE, run
from typing import Any

import pytest

from configs.layout import RunLayout
from data_loaders.synthetic import write_synthetic
from sharding import block_file, checkpoint, checkpoint_files
from sharding.loss_module import LossOutput
from sharding.parallelize import ParallelModel
from sharding.step_result import StepResult
from tests.harness import Ranks
from tests.sharding.policies import whole_state
from tests.trainer.runs import ITEMS, USERS, quiet, settings_of
from trainer.pretrain import train_worker

FINGERPRINT = "faults"
STEPS_PER_EPOCH = USERS // 16


@dataclass(frozen=True)
class Fault:
    """Something that happens to one rank, once, at a step or in the save after it."""

    kind: str
    rank: int = 0
    step: int = 1

    def __str__(self) -> str:
        return f"{self.kind} (rank {self.rank}, step {self.step})"


KINDS = (
    "kill",
    "kill before the files of a save",
    "kill within the file of a save",
    "kill between the files of a save",
    "kill before the commit of a save",
    "kill after the commit of a save",
    "SIGTERM",
    "full disk",
)
"""Faults that a plain restart is the mend for."""
OF_RANK_0 = KINDS[3:6]
"""Only rank 0 comes to these points."""


def settings(root: Path, epochs: int, **blocks: Any) -> dict[str, Any]:
    """Of a training on `write_data`'s users, that saves every three steps, behind training."""
    training = {
        "epochs": epochs,
        "log_every_steps": 1,
        "validation": {"every_epochs": 2, "metric": "ndcg@10"},
        "checkpoint": {"every_steps": 3, "every_epochs": None},
    }
    model = {"kind": "hstu", "width": 8, "qk_width": 8, "v_width": 8, "num_layers": 1}
    return settings_of(
        root,
        FINGERPRINT,
        {
            "training": training | blocks.pop("training", {}),
            "model": model | {"dropout": 0.1},
            "cluster": {"num_workers": 2},
            **blocks,
        },
    )


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of so many bytes (`64k`) at `place`; skips the test where none can be made."""
    place.mkdir()
    made = run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", str(place)], stderr=PIPE)
    if made.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {made.stderr.decode().strip()}")
    try:
        yield place
    finally:
        run(["umount", "--lazy", str(place)], check=True)


FILLER = "of-others"
LESS_THAN_A_SAVE = 40 * 1024
"""Bytes; enough for the metrics of some steps, unless a save is under way."""


def fill(file: Path, leave: int) -> None:
    """Take all of a small disk but so many bytes."""
    with file.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(4096))
    os.truncate(file, file.stat().st_size - leave)


def write_data(root: Path) -> None:
    """Users for `settings`."""
    write_synthetic(str(root / "data"), USERS, ITEMS, 9, 3, rows_per_group=16)


def train(settings: dict[str, Any], fault: Fault | None = None) -> dict[str, str]:
    """On one rank: the stage's own worker; what became of the model, hashed by tensor."""
    rank = int(os.environ["RANK"])
    trained: list[ParallelModel] = []
    root = Path(settings["output"])
    steps_of(root, rank).mkdir(exist_ok=True)
    _record(trained, root, fault if fault is not None and fault.rank == rank else None)
    if fault is not None and fault.rank == rank and "save" in fault.kind:
        _break_save(fault)
    train_worker(settings, quiet)
    if not trained:
        return {}
    state = whole_state(trained[-1])
    return {name: sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}


def _record(trained: list[ParallelModel], root: Path, fault: Fault | None) -> None:
    """Write down every step's samples and loss; bring about a fault of a step."""
    record = steps_of(root, int(os.environ["RANK"]))
    train_step = ParallelModel.train_step

    def recorded(
        self: ParallelModel, inputs: Any, sample_ids: Any = None, stop: bool = False
    ) -> StepResult:
        trained[:] = [self]
        if fault is not None and self.step + 1 == fault.step:
            _bring_about(fault, self, root)
        result = train_step(self, inputs, sample_ids, stop)
        line = {"step": self.step, "loss": result.loss, "samples": [int(s) for s in sample_ids]}
        # A file a step: small enough for a disk that is full.
        (record / f"{time.time_ns()}.json").write_text(json.dumps(line))
        return result

    ParallelModel.train_step = recorded  # type: ignore[method-assign]


def _bring_about(fault: Fault, model: ParallelModel, root: Path) -> None:
    match fault.kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        case "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        case "disk that others fill":
            fill(root / FILLER, leave=LESS_THAN_A_SAVE)
        case "hang":
            time.sleep(600)
        case "not finite":
            _once(model._loss, "forward", _not_finite)
        case "the update raises":
            _once(model._loss, "forward", _raise(IndexError("far out")))


def _once(owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Change what a method returns, at its next call alone."""
    method = getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, method)
        return change(method(*args, **kwargs))

    setattr(owner, name, changed)


def _not_finite(output: LossOutput) -> LossOutput:
    return replace(output, loss_sum=output.loss_sum * float("nan"))


def _raise(error: Exception) -> Callable[[Any], Any]:
    def change(_: Any) -> Any:
        raise error

    return change


def _break_save(fault: Fault) -> None:
    """Have this rank killed inside the first save of the fault's step or a later one."""
    write, saving = checkpoint.CheckpointStore.write, [0]

    def noted(self: checkpoint.CheckpointStore, step: int, *args: Any) -> Any:
        saving[0] = step  # not the model's: it trains on while an earlier step's save is written
        return write(self, step, *args)

    checkpoint.CheckpointStore.write = noted  # type: ignore[method-assign]

    def due() -> bool:
        return saving[0] >= fault.step

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    point = fault.kind.removeprefix("kill ").removesuffix(" of a save")
    if point == "before the files":
        _before(checkpoint, "CheckpointWriter", due, die)
    elif point == "within the file":
        written: list[bool] = []
        _before(block_file.BlockWriter, "write", lambda: due() and _second(written), die)
    elif point == "between the files":  # before the one that rank 0 writes when all have written
        _before(checkpoint_files.CheckpointWriter, "finish", due, die)
    elif point == "before the commit":
        _before(checkpoint, "write_manifest", due, die)
    else:
        _before(checkpoint.CheckpointStore, "_prune", due, die)


def _second(seen: list[bool]) -> bool:
    """Whether this was asked before; remembers that it was."""
    seen.append(True)
    return len(seen) > 1


def _before(owner: Any, name: str, due: Callable[[], bool], die: Callable[[], None]) -> None:
    wrapped = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if due():
            die()
        return wrapped(*args, **kwargs)

    setattr(owner, name, dying)


def attempt(
    settings: dict[str, Any], fault: Fault | None = None, world: int = 2, timeout: float = 240
) -> list[Any]:
    """Outcomes of the ranks of one attempt: hashes, an exception, or an exit code."""
    with Ranks(world, partial(train, settings, fault)) as ranks:
        return ranks.outcomes(timeout)


@dataclass(frozen=True)
class Course:
    """What a training came to, however often it was interrupted."""

    state: dict[str, str]
    losses: dict[int, float]
    samples: dict[int, list[int]]
    """Step → sorted samples of all ranks."""


def course(root: Path, outcomes: list[dict[str, str]]) -> Course:
    """Of the last attempt's outcomes and every step's last record."""
    assert all(isinstance(outcome, dict) for outcome in outcomes), outcomes
    losses: dict[int, float] = {}
    by_rank: dict[tuple[int, int], list[int]] = {}
    for rank in range(len(outcomes)):
        for file in sorted(steps_of(root, rank).iterdir()):
            row = json.loads(file.read_text())
            losses[row["step"]] = row["loss"]
            by_rank[row["step"], rank] = row["samples"]
    samples: dict[int, list[int]] = {}
    for (step, _), ids in by_rank.items():
        samples[step] = sorted([*samples.get(step, []), *ids])
    return Course(outcomes[0], losses, samples)


def steps_of(root: Path, rank: int) -> Path:
    """The directory of a rank's records, one file for each time that it did a step.

    It is beside the run and not on its disk, which may be full while a step is written down.
    """
    return root.parent / f"{root.name}-steps-{rank}"


def saved_steps(root: Path) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    newest = Path(RunLayout(str(root)).checkpoints("train", FINGERPRINT))
    return sorted(int(path.parent.name.split("-")[1]) for path in newest.glob("*/MANIFEST.json"))
