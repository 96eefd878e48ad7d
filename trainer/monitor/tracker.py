"""Numbers of a training stage over its steps: TensorBoard event files and `metrics.jsonl`.

A row is one JSON object a line: `{"step", "time", "values": {tag: number or null}, "crc32"}`; null
stands for a number that was not finite, and the last tells damage. Tags are `<group>/<name>`:
`train/…` at each log interval (loss, lr, the objective's metrics), `validation/…`, `speed/…` and
`memory/…`.
"""

import json
import logging
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from configs.storage import (
    absolute,
    exists,
    is_local,
    join,
    make_directory,
    read_bytes,
    remove,
    write_bytes,
)
from configs.storage_faults import explained
from trainer.monitor.event_file import EventFile

_log = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
EVENTS_DIRECTORY = "tensorboard"
CHECK = "crc32"


@dataclass(frozen=True)
class MetricRow:
    """Numbers of one step."""

    step: int
    time: float
    """Seconds since the epoch."""
    values: dict[str, float]
    """Tag → number; nan where it was not finite."""

    @property
    def is_validation(self) -> bool:
        """Whether these are the numbers of a validation, which has a row of its own."""
        return any(tag.startswith("validation/") for tag in self.values)


class Tracker:
    """Writes the numbers of one stage; only rank 0 has one.

    On a file system of this machine rows are appended as they come. On other storage, which cannot
    append, both files are kept in a temporary directory and published whole by `flush`; call it
    before a checkpoint is committed, so that a resumed stage finds every row up to its step.
    """

    def __init__(
        self, directory_url: str, resumed_step: int | None = None, *, unjudged: bool = False
    ) -> None:
        """Open the stage's directory.

        Args:
            directory_url: any fsspec URL; created if absent.
            resumed_step: step of the checkpoint that training goes on from: later rows, which will
                be made again, are dropped. None begins afresh and drops all.
            unjudged: the validation of that step will be made again, too.
        """
        self._url = absolute(directory_url)
        make_directory(self._url)
        self._published = not is_local(self._url)
        self._local = tempfile.mkdtemp(prefix="tandem-") if self._published else self._url
        kept = [] if resumed_step is None else _rows_until(self._url, resumed_step, unjudged)
        write_bytes(join(self._url, METRICS_FILE), _encode(kept))
        if self._published:
            write_bytes(join(self._local, METRICS_FILE), _encode(kept))
        events = join(self._url, EVENTS_DIRECTORY)
        if resumed_step is None:
            remove(events)
        purged = None if resumed_step is None else resumed_step + 1
        rows = join(self._local, METRICS_FILE)
        with explained(self._local, "written"):
            self._events = EventFile(join(self._local, EVENTS_DIRECTORY), purged)
            self._rows = open(rows, "ab")  # noqa: SIM115 - closed by close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row and send its numbers to TensorBoard.

        Args:
            step: optimizer steps done.
            values: tag → number, see the module's docstring for tags.

        Raises:
            StorageError: the disk is full.
        """
        row = MetricRow(step, time.time(), dict(values))
        with explained(self._local, "written"):
            self._rows.write(_encode([row]))
            self._rows.flush()
            self._events.log(step, row.values, row.time)
            self._events.flush()

    def flush(self) -> None:
        """Make everything logged so far durable where the run lies.

        Raises:
            StorageError: the storage is full, refuses, or does not answer.
        """
        with explained(self._local, "written"):
            self._events.flush()
            self._rows.flush()
            os.fsync(self._rows.fileno())
        if self._published:
            self._publish()

    def close(self) -> None:
        """Flush and let go of the files."""
        if self._rows.closed:
            return
        self.flush()
        self._rows.close()
        self._events.close()
        if self._published:
            self._publish()
            shutil.rmtree(self._local)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; what already goes wrong says more than that this cannot be done."""
        try:
            self.close()
        except OSError as closing:
            if error is None:
                raise
            _log.warning("the metrics of the last steps may be lost: %s", closing)

    def _publish(self) -> None:
        write_bytes(join(self._url, METRICS_FILE), read_bytes(join(self._local, METRICS_FILE)))
        target = join(self._url, EVENTS_DIRECTORY)
        make_directory(target)
        for name in sorted(os.listdir(join(self._local, EVENTS_DIRECTORY))):
            write_bytes(join(target, name), read_bytes(join(self._local, EVENTS_DIRECTORY, name)))


def read_rows(directory_url: str) -> list[MetricRow]:
    """Rows of a stage in the order written; empty where the stage has not logged yet.

    A last line without its end is what a killed process left and is passed over.

    Raises:
        ValueError: another line is damaged.
    """
    url = join(directory_url, METRICS_FILE)
    if not exists(url):
        return []
    *lines, _unfinished = read_bytes(url).split(b"\n")
    return [_decode(line, url, number) for number, line in enumerate(lines, 1)]


def _rows_until(directory_url: str, step: int, unjudged: bool) -> list[MetricRow]:
    """Rows of a training that goes on after `step`, of whose validation only if it was judged."""
    rows = (row for row in read_rows(directory_url) if row.step <= step)
    return [row for row in rows if not (unjudged and row.step == step and row.is_validation)]


def _decode(line: bytes, url: str, number: int) -> MetricRow:
    try:
        row = json.loads(line)
        check = row.pop(CHECK, None)
        if check is not None and check != _check(row):
            raise ValueError("its numbers were changed since")
        values = {k: math.nan if v is None else float(v) for k, v in row["values"].items()}
        return MetricRow(int(row["step"]), float(row["time"]), values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"line {number} of {url} is damaged ({error}); delete that line, or the file"
        ) from error


def _encode(rows: Sequence[MetricRow]) -> bytes:
    objects = (_object(row) for row in rows)
    return b"".join(json.dumps(o | {CHECK: _check(o)}).encode() + b"\n" for o in objects)


def _check(row: dict[str, object]) -> int:
    """Changes with the content of a row; a flipped bit is noticed."""
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())


def _object(row: MetricRow) -> dict[str, object]:
    finite = {tag: v if math.isfinite(v) else None for tag, v in row.values.items()}
    return {"step": row.step, "time": row.time, "values": finite}
