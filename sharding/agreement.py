"""What one rank finds out, all ranks decide by: they go on together, or raise the same sentence."""

import logging
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar, assert_never

from configs.memory_faults import is_of_memory
from configs.storage_faults import first_line
from sharding.process_group import DistributedContext

_log = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used; one sentence, the same on every rank."""


class UnreadableError(CheckpointError):
    """Storage or driver refuses, or does not answer: whether the checkpoint is whole is unknown."""


class Failure(NamedTuple):
    """What went wrong on a rank."""

    sentence: str
    kind: Literal["memory", "unknown", "judged"]
    """Memory ran out; what lies there could not be judged; it was, and is wrong."""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Our readers judge by a ValueError; whatever else is raised says nothing of the content,
        and must cost no checkpoint that may be whole."""
        if is_of_memory(error):
            return cls(first_line(error), "memory")
        return cls(first_line(error), "judged" if isinstance(error, ValueError) else "unknown")

    def error(self, prefix: str = "") -> CheckpointError | MemoryError:
        """What all ranks raise."""
        sentence = prefix + self.sentence
        match self.kind:
            case "memory":
                return MemoryError(sentence)
            case "unknown":
                return UnreadableError(sentence)
            case "judged":
                return CheckpointError(sentence)
        assert_never(self.kind)


class Agreement:
    """Every method is collective: all ranks call it, and raise together: a CheckpointError, or the
    MemoryError of a rank whose memory ran out."""

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
        """Raise the first rank's failure on every rank; one that judges nothing before others."""
        failures = self._ctx.all_gather_object(failure)
        found = [(rank, each) for rank, each in enumerate(failures) if each is not None]
        for rank, each in sorted(found, key=lambda entry: entry[1].kind == "judged"):
            raise each.error(f"rank {rank}: " if len(failures) > 1 else "")


def _attempt(function: Callable[[], T]) -> tuple[T | None, Failure | None]:
    """The value, or why there is none."""
    try:
        return function(), None
    except Exception as error:  # noqa: BLE001 - each storage back end raises its own kinds
        _log.debug("attempt failed", exc_info=True)
        return None, Failure.of(error)
