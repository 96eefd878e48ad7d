"""The two distributed steps that preparation is made of, on Ray Data.

`map_parts` runs a function on each part; `exchange` brings together all rows of a partition.
A step's rows live in staged Parquet parts; what comes back to the driver is one small report per
part or partition, so its memory does not grow with the data. A task that is run again after a
failure writes the same file again.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.data.context import ShuffleStrategy

from configs.storage_faults import StorageError

Report = dict[str, Any]
"""JSON-able facts about one part: counts and paths."""

Part = TypeVar("Part")
PARTITION = "partition"
MAX_SORTED_PARTS = 256
"""Up to here rows are exchanged by sorting, which starts at once; beyond, its intermediate blocks
(parts squared) become too many and Ray Data's hash shuffle takes over."""


@dataclass
class Progress:
    """Says at most every few seconds, and at the end of each phase, how far it is; and now and then
    that a phase goes on where no part of it is ready for long."""

    say: Callable[[str], None]
    every_s: float = 5.0
    patience_s: float = 20.0
    _began: float = field(default=0.0, init=False)
    _said: float = field(default=0.0, init=False)
    _done: int = field(default=0, init=False)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[None]:
        """Around the work of a phase of `total` parts, each told by `step`."""
        self._began, self._done = time.monotonic(), 0
        self._said, ended = self._began, threading.Event()

        def wait() -> None:
            while not ended.wait(self.patience_s / 4):
                now = time.monotonic()
                if now - self._said >= self.patience_s:
                    self._said = now
                    self.say(
                        f"  {name:<24} part {self._done} of {total} after {now - self._began:.0f} "
                        "s; the next ones are at work, or wait for a free CPU or GPU"
                    )

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        try:
            yield
        finally:
            ended.set()
            waiting.join()

    def step(self, phase: str, done: int, total: int, rows: int) -> None:
        """`done` of `total` parts of the phase are ready; they held `rows` rows."""
        now, self._done = time.monotonic(), done
        if done == total or now - self._said >= self.every_s:
            self._said = now
            spent = max(now - self._began, 1e-9)
            left = spent / max(done, 1) * (total - done)
            parts = "" if done == total else f"  part {done} of {total}, {left:.0f} s left"
            self.say(
                f"  {phase:<24} {rows:>13,} rows {spent:7.1f} s {rows / spent:>11,.0f}/s{parts}"
            )


def map_parts(
    phase: str,
    progress: Progress,
    count: int,
    function: Callable[[int], Report],
    gpus: float = 0,
) -> list[Report]:
    """Reports of `function(0) … function(count - 1)`, each run by a task of its own.

    `gpus` is what each task holds while it runs.
    """

    def run(batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        return _packed([function(int(index)) for index in batch["id"]])

    if not count:
        return []
    resources = {"num_gpus": gpus} if gpus else {}
    dataset = ray.data.range(count, override_num_blocks=count)
    dataset = dataset.map_batches(run, batch_size=None, **resources)
    return _collect(dataset, phase, progress, count)


def exchange(
    phase: str,
    progress: Progress,
    parts: Sequence[Part],
    load: Callable[[Part], Iterator[pa.Table]],
    reduce: Callable[[int, pa.Table], Report],
    partitions: int,
) -> list[Report]:
    """Reports of `reduce(partition, rows)` for each partition that has rows, by partition.

    Args:
        load: rows of one part (a URL, a chunk); their column `partition` (int64) says where they
            belong.
        reduce: gets all rows of a partition at once, in no particular order.
    """
    if not parts:
        return []

    def read(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for index in batch["id"]:
            yield from load(parts[int(index)])

    def run(rows: pa.Table) -> dict[str, list[str]]:
        partition = rows[PARTITION][0].as_py()
        return _packed(
            [{**reduce(partition, rows.drop_columns([PARTITION])), PARTITION: partition}]
        )

    with _shuffle_for(len(parts)):
        dataset = ray.data.range(len(parts), override_num_blocks=len(parts))
        groups = dataset.map_batches(read, batch_size=None).groupby(PARTITION, partitions)
        reports = _collect(
            groups.map_groups(run, batch_format="pyarrow"), phase, progress, partitions
        )
    return sorted(reports, key=lambda report: int(report[PARTITION]))


@contextmanager
def _shuffle_for(parts: int) -> Iterator[None]:
    context = DataContext.get_current().copy()
    sorts = parts <= MAX_SORTED_PARTS
    context.shuffle_strategy = (
        ShuffleStrategy.SORT_SHUFFLE_PULL_BASED if sorts else ShuffleStrategy.HASH_SHUFFLE
    )
    with DataContext.current(context):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, Ray Data says nothing of its own: no bars, plans, statistics, or stack traces.

    A failure still raises here; what it would print besides are frames of Ray.
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    # Ray's wrapper does not carry the error that our code raised across processes.
    context.raise_original_map_exception = True
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


def _packed(reports: list[Report]) -> dict[str, list[str]]:
    return {"report": [json.dumps(report) for report in reports]}


def _collect(dataset: Dataset, phase: str, progress: Progress, total: int) -> list[Report]:
    reports: list[Report] = []
    rows = 0
    with progress.phase(phase, total):
        try:
            for row in dataset.iter_rows():
                reports.append(json.loads(row["report"]))
                rows += reports[-1]["rows"]
                if len(reports) < total:
                    progress.step(phase, len(reports), total, rows)
        except (ray.exceptions.RayTaskError, ray.exceptions.UserCodeException) as error:
            raise users_error(error) from error
    progress.step(phase, total, total, rows)
    return reports


def offsets(reports: list[Report], key: str, partitions: int) -> np.ndarray:
    """int64 [partitions]: rows in earlier partitions."""
    counts = np.zeros(partitions, np.int64)
    for report in reports:
        counts[int(report["partition"])] = report[key]
    return np.cumsum(counts) - counts


def users_error(error: Exception) -> Exception:
    """The sentence that our own code raised inside a task, or the error as it is."""
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None) or cause.__cause__
        for kind in (ValueError, StorageError):
            if type(cause) is kind:
                return kind(str(cause).partition("\n")[0])  # Ray appends advice about retries
        cause = inner
    return error
