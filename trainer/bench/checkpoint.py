"""`tandem bench checkpoint`: saving and loading against plain files, and what training waits.

A real policy with a large item table trains on this process alone. Its checkpoint is saved and
loaded in turn with one file of as many bytes that is written and read from front to back, so that
both meet the same disk in the same minutes, by turns the one first and the other. Every write goes
to new files and ends with fsync; nothing old is removed while it is timed. Before every read, the
pages of what is read are dropped from memory (`posix_fadvise`), where the files lie on this
machine. Of each the fastest counts, and of the pairs the median of their ratios.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs import storage
from configs.recipe import Recipe
from data_loaders.synthetic import write_synthetic
from sharding.background_saves import BackgroundSaves
from sharding.checkpoint import CheckpointInfo, CheckpointStore
from sharding.checkpoint_tensors import CheckpointTensors
from sharding.parallelize import ParallelModel
from trainer.bench.measure import machine, table
from trainer.losses import pretraining_loss
from trainer.policy import Worker, parallelize_policy, start_worker
from trainer.pretrain import NextItemInputsMaker, training_loader
from trainer.trainer import TrainerState

BLOCK_BYTES = 8 << 20
LENGTH, USERS_PER_BATCH = 20, 4
WARM_STEPS = 3


@dataclass(frozen=True)
class Speeds:
    """Bytes per second, and ratios of ours to the plain file measured beside it."""

    num_bytes: int
    save: float
    plain_write: float
    save_ratio: float
    load: float
    """Finding, hashing and loading."""
    plain_read: float
    load_ratio: float


@dataclass(frozen=True)
class Stalls:
    """Seconds; medians."""

    step: float
    step_beside_a_save: float
    stall: float
    """Training waits for one save behind it: where it begins, and before the next update."""
    written: float
    """From the copy's begin to the commit, behind training."""

    @property
    def steps_a_save(self) -> int:
        """Steps until the save is committed: the least interval at which none waits for another."""
        return max(1, -(-int(1e6 * self.written) // int(1e6 * self.step_beside_a_save)))

    @property
    def share(self) -> float:
        """Of the time of those steps: what saving as often as the disk allows costs at most."""
        return self.stall / (self.steps_a_save * self.step_beside_a_save)


def bench_checkpoint(
    output: str, *, items: int, width: int, batch: int, repeats: int, seed: int, say: Any
) -> tuple[Speeds, Stalls]:
    """Measure, print, and leave `checkpoint.json` below `output` (any URL).

    Raises:
        AssertionError: what is loaded differs from what was saved.
    """
    url = storage.absolute(output)
    worker = _worker(url, items, width, batch, seed)
    training = _Training(worker, batch)
    training.steps(WARM_STEPS)
    speeds = _speeds(worker, training, storage.join(url, "store"), repeats, say)
    stalls = _stalls(worker, training, storage.join(url, "behind"), repeats)
    setting = {"items": items, "width": width, "batch": batch, "repeats": repeats, "seed": seed}
    result = {
        "machine": machine() | {"load": os.getloadavg()},
        "setting": setting,
        "speeds": asdict(speeds),
        "stalls": asdict(stalls) | {"steps_a_save": stalls.steps_a_save, "share": stalls.share},
    }
    storage.write_json(storage.join(url, "checkpoint.json"), result)
    say("\n" + render(speeds, stalls))
    return speeds, stalls


def render(speeds: Speeds, stalls: Stalls) -> str:
    """The tables that are printed."""
    rows = (
        ("save", speeds.save, speeds.plain_write, speeds.save_ratio),
        ("load", speeds.load, speeds.plain_read, speeds.load_ratio),
    )
    moved = table(
        ["", "GB", "GB/s", "plain GB/s", "share"],
        [
            [
                name,
                f"{speeds.num_bytes / 1e9:.2f}",
                f"{ours / 1e9:.2f}",
                f"{plain / 1e9:.2f}",
                f"{ratio:.0%}",
            ]
            for name, ours, plain, ratio in rows
        ],
    )
    waits = table(
        ["step ms", "beside a save", "stall ms", "written s", "steps a save", "stall's share"],
        [
            [
                f"{1e3 * stalls.step:.1f}",
                f"{1e3 * stalls.step_beside_a_save:.1f}",
                f"{1e3 * stalls.stall:.1f}",
                f"{stalls.written:.2f}",
                f"{stalls.steps_a_save}",
                f"{stalls.share:.1%}",
            ]
        ],
    )
    return f"{moved}\n\n{waits}"


class _Training:
    """Steps of pretraining."""

    def __init__(self, worker: Worker, batch: int) -> None:
        loss = pretraining_loss(worker)
        self.policy: ParallelModel = parallelize_policy(
            worker,
            loss.model,
            loss,
            total_steps=10_000,
            optimizer=worker.recipe.training.optimizer,
            sparse_lr=worker.recipe.sharding.optimizer.lr,
        )
        self._make_inputs = NextItemInputsMaker(worker)
        with training_loader(worker, TrainerState()) as loader:
            self._step: Any = next(iter(loader))

    def steps(self, count: int) -> list[float]:
        """Seconds of each of `count` steps; all on one batch, as data are not the matter."""
        seconds = []
        for _ in range(count):
            begun = time.perf_counter()
            inputs = self._make_inputs(self._step.micro_batches, self.policy.step)
            self.policy.train_step(inputs, self._step.sample_ids)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        return seconds


def _speeds(worker: Worker, training: _Training, root: str, repeats: int, say: Any) -> Speeds:
    store = CheckpointStore(root, repeats + 4, worker.ctx)  # none is removed while it is timed
    times: dict[str, list[float]] = {"save": [], "write": [], "load": [], "read": []}

    saved: list[CheckpointInfo] = []

    def save() -> None:
        saved.append(store.save(training.policy, training.policy.step, {}, {}, {}))

    save()
    num_bytes = sum(entry.bytes for entry in CheckpointTensors(saved[-1].url).manifest.files)
    for repeat in range(repeats + 1):  # the first only warms up
        plain = storage.join(root, f"plain-{repeat}.bin")  # as new as a checkpoint's files
        calls: list[tuple[str, Callable[[], None]]] = [
            ("save", save),
            ("write", partial(_write, plain, num_bytes)),
        ]
        for name, call in calls[:: -1 if repeat % 2 else 1]:  # neither always meets a rested disk
            times[name].append(_timed(call))
        _forget(saved[-1].url)
        times["load"].append(_timed(lambda: _load(store, training.policy)))
        _forget(plain)
        times["read"].append(_timed(partial(_read, plain)))
        for url in (plain, saved[-2].url):
            storage.remove(url)
    for seconds in times.values():
        del seconds[0]
    _check_loaded(store, training.policy, saved[-1])
    say(f"  {num_bytes / 1e6:,.0f} MB: measured {repeats} times")
    best = {name: num_bytes / min(seconds) for name, seconds in times.items()}
    return Speeds(
        num_bytes=num_bytes,
        save=best["save"],
        plain_write=best["write"],
        save_ratio=_ratio(times["write"], times["save"]),
        load=best["load"],
        plain_read=best["read"],
        load_ratio=_ratio(times["read"], times["load"]),
    )


def _stalls(worker: Worker, training: _Training, root: str, repeats: int) -> Stalls:
    store = CheckpointStore(root, 2, worker.ctx)
    saves = BackgroundSaves(worker.ctx)
    calm = training.steps(5 * repeats)
    beside: list[float] = []
    stalls, written = [], []
    for _ in range(repeats + 1):  # the first touches the memory that is copied to
        before = saves.times.stalled, saves.times.written
        saves.save(store, training.policy, {}, {}, {})
        while saves.in_flight():
            beside += training.steps(1)
        stalls.append(saves.times.stalled - before[0])
        saves.wait()
        written.append(saves.times.written - before[1])
    median = statistics.median
    return Stalls(
        step=median(calm),
        step_beside_a_save=median(beside or calm),
        stall=median(stalls[1:]),
        written=median(written[1:]),
    )


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _ratio(plain: list[float], ours: list[float]) -> float:
    """Median over pairs of our speed as a share of the plain file's beside it."""
    return statistics.median(p / o for p, o in zip(plain, ours, strict=True))


def _load(store: CheckpointStore, policy: ParallelModel) -> None:
    info = store.newest()
    assert info is not None, "it was just saved"
    store.load(policy, info)


def _check_loaded(store: CheckpointStore, policy: ParallelModel, info: CheckpointInfo) -> None:
    """What lies on the disk is what the policy holds after loading it."""
    again = store.save(policy, policy.step, {}, {}, {})
    one, other = CheckpointTensors(info.url).manifest, CheckpointTensors(again.url).manifest
    hashes = [{e.path: e.sha256 for e in each.files} for each in (one, other)]
    assert hashes[0] == hashes[1], "what was loaded and saved again differs from what was saved"


def _write(url: str, count: int) -> None:
    """One file of `count` bytes from front to back, and fsync."""
    block = memoryview(os.urandom(BLOCK_BYTES))
    with storage.open_to_write(url) as stream:
        while count:
            part = block[: min(count, BLOCK_BYTES)]
            count -= stream.write(part)


def _read(url: str) -> None:
    """The whole file, from front to back."""
    block = bytearray(BLOCK_BYTES)
    with storage.open_to_read(url) as stream:
        while stream.readinto(block):  # type: ignore[attr-defined]  # binary files have it
            pass


def _forget(url: str) -> None:
    """Drop the pages of a file, or of a directory's files, from this machine's memory."""
    if not storage.is_local(url):
        return
    place = Path(storage.filesystem(url)[1])
    for file in place.iterdir() if place.is_dir() else [place]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _worker(url: str, items: int, width: int, batch: int, seed: int) -> Worker:
    """The worker of a pretraining on synthetic data, in a world of one."""
    users = batch * USERS_PER_BATCH
    write_synthetic(storage.join(url, "data"), users, items, LENGTH, seed, features=False)
    recipe = {
        "name": "bench-checkpoint",
        "output": url,
        "seed": seed,
        "data": {
            "source": {"kind": "public", "name": "ml-100k"},
            "loader": {"global_batch": batch, "max_length": LENGTH, "prefetch": 0},
        },
        "model": {"kind": "hstu", "width": width, "num_layers": 2},
        "sharding": {"default": "row_wise"},
        "objective": {"kind": "sampled_softmax", "num_negatives": 128, "shared": "batch"},
        "cluster": {"num_workers": 1, "threads_per_worker": torch.get_num_threads()},
    }
    settings: dict[str, Any] = {"output": url, "fingerprint": "bench", "semantic_ids": None}
    settings["recipe"] = Recipe.model_validate(recipe).model_dump(mode="json")
    return start_worker(settings, lambda line: None)
