"""What one rank finds out, all ranks decide by: they go on together, or raise the same sentence."""

import logging
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from configs.storage_faults import StorageError, first_line
from sharding.process_group import DistributedContext

_log = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used; one sentence, the same on every rank."""


class UnreadableError(CheckpointError):
    """The storage refuses or does not answer: whether the checkpoint is whole is not known."""


class Failure(NamedTuple):
    """What went wrong on a rank."""

    sentence: str
    of_storage: bool = False

    def error(self, prefix: str = "") -> CheckpointError:
        """What all ranks raise."""
        kind = UnreadableError if self.of_storage else CheckpointError
        return kind(prefix + self.sentence)


class Agreement:
    """Every method is collective: all ranks call it, and raise together."""

    def __init__(self, ctx: DistributedContext) -> None:
        self._ctx = ctx

    def on_first_rank(self, function: Callable[[], T]) -> T:
        """What `function` gives on rank 0, on every rank."""
        value, failure = None, None
        if self._ctx.rank == 0:
            value, failure = _attempt(function)
        value, failure = self._ctx.broadcast_object((value, failure))
        if failure is not None:
            raise failure.error()
        return value  # type: ignore[return-value]

    def on_every_rank(self, function: Callable[[], T]) -> T:
        """What `function` gives on this rank, if it succeeds on all."""
        value, failure = _attempt(function)
        self.raise_together(failure)
        return value  # type: ignore[return-value]

    def raise_together(self, failure: Failure | None) -> None:
        """Raise the first rank's failure on every rank; one of storage before others."""
        failures = self._ctx.all_gather_object(failure)
        found = [(rank, each) for rank, each in enumerate(failures) if each is not None]
        for rank, each in sorted(found, key=lambda entry: not entry[1].of_storage):
            raise each.error(f"rank {rank}: " if len(failures) > 1 else "")


def _attempt(function: Callable[[], T]) -> tuple[T | None, Failure | None]:
    """The value, or why there is none."""
    try:
        return function(), None
    except Exception as error:  # noqa: BLE001 - each storage back end raises its own kinds
        _log.debug("attempt failed", exc_info=True)
        return None, Failure(first_line(error), isinstance(error, StorageError))
