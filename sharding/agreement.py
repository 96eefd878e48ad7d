"""What one rank finds out, all ranks decide by: they go on together, or raise the same sentence."""

import logging
from collections.abc import Callable
from typing import TypeVar

from configs.storage_faults import first_line
from sharding.process_group import DistributedContext

_log = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used; one sentence, the same on every rank."""


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
            raise CheckpointError(failure)
        return value  # type: ignore[return-value]

    def on_every_rank(self, function: Callable[[], T]) -> T:
        """What `function` gives on this rank, if it succeeds on all."""
        value, failure = _attempt(function)
        self.raise_together(failure)
        return value  # type: ignore[return-value]

    def raise_together(self, failure: str | None) -> None:
        """Raise the first rank's failure on every rank."""
        failures = self._ctx.all_gather_object(failure)
        for rank, sentence in enumerate(failures):
            if sentence is not None:
                raise CheckpointError(f"rank {rank}: {sentence}" if len(failures) > 1 else sentence)


def _attempt(function: Callable[[], T]) -> tuple[T | None, str | None]:
    """The value, or a sentence on why there is none."""
    try:
        return function(), None
    except Exception as error:  # noqa: BLE001 - each storage back end raises its own kinds
        _log.debug("attempt failed", exc_info=True)
        return None, first_line(error)
