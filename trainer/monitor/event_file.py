"""TensorBoard event files, written by whoever logs.

TensorBoard's own writer hands numbers to a thread, which tells of a full disk with a traceback of
its own, and late; here the call that could not write raises.
"""

import os
import socket
import time
import uuid
from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

VERSION = "brain.Event:2"


class EventFile:
    """A new event file in a local directory, beside those of earlier starts."""

    def __init__(self, directory: str, purge_step: int | None = None) -> None:
        """Begin the file.

        Args:
            directory: created if absent.
            purge_step: what earlier files tell of this step and later ones no longer counts.

        Raises:
            OSError: the file cannot be written.
        """
        os.makedirs(directory, exist_ok=True)
        # Readers take the files of a directory in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{uuid.uuid4().hex}"
        self._file = open(os.path.join(directory, name), "xb")  # noqa: SIM115 - closed by close()
        self._records = RecordWriter(self._file)
        self._add(Event(wall_time=time.time(), file_version=VERSION))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=purge_step, session_log=start))
        self.flush()

    def log(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        """Append the numbers of a step, by tag; `wall_time` in seconds since the epoch."""
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(Event(wall_time=wall_time, step=step, summary=Summary(value=scalars)))

    def flush(self) -> None:
        """Hand what was logged to the file system."""
        self._file.flush()

    def close(self) -> None:
        """Flush, and let go of the file."""
        self._file.close()

    def _add(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
