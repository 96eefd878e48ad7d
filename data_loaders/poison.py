"""Samples that cannot be read or trained on: named when they raise, and left out where the recipe
says so, by whatever the stage does with them.

Training leaves them out of what the fixed order of samples gives, so every world size leaves out
the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from configs import storage
from configs.memory_faults import is_of_memory

Unit = Literal["user", "pair"]
"""What a sample is: a user's sequence, or a preference pair. A stage may read both."""
_LEFT_OUT = "left_out"
NAMED = 20
"""Sample ids in a sentence."""
NOT_THE_SAMPLES = (ValueError, OSError, MemoryError)
"""Errors of collation that name what is wrong already (a file, or a sample), or that storage or the
machine caused: whoever was read by then is not to blame."""


class PoisonedSampleError(ValueError):
    """Samples raise in collation or in the forward pass: so they would again."""

    def __init__(
        self, sample_ids: Sequence[int], where: str, reason: str, unit: Unit = "user"
    ) -> None:
        super().__init__(list(sample_ids), where, reason, unit)
        self.sample_ids = list(sample_ids)
        self.where = where
        self.reason = reason
        self.unit = unit

    def __str__(self) -> str:
        ids = self.sample_ids
        named = ", ".join(map(str, ids[:NAMED])) + (" …" if len(ids) > NAMED else "")
        name = "sample" if self.unit == "user" else "pair"
        which = name if len(ids) == 1 else f"one of the {name}s"
        return f"{which} {named} cannot be used: {self.where} met {self.reason}"


def find_poisoned(
    collate: Callable[[np.ndarray], Any],
    sample_ids: np.ndarray,
    error: Exception,
    unit: Unit = "user",
) -> PoisonedSampleError | None:
    """Who of `sample_ids` makes `collate` raise; None if nobody does alone.

    Raises:
        ValueError, OSError, MemoryError: one of `NOT_THE_SAMPLES` came between.
    """
    guilty = []
    for sample in sample_ids:  # once in the life of a worker group
        try:
            collate(np.array([sample]))
        except NOT_THE_SAMPLES:
            raise
        except Exception as met:  # whatever else it raises, it is not to be trained on
            if is_of_memory(met):
                raise
            guilty.append(int(sample))
    if not guilty:
        return None
    return PoisonedSampleError(guilty, "collating it", reason_of(error), unit)


def check_values(
    columns: Mapping[str, np.ndarray],
    sample_ids: np.ndarray,
    limits: Mapping[str, int],
    unit: Unit = "user",
) -> None:
    """Refuse ids outside of 0 … limit and infinite floats (NaN is "none"); all are [n].

    Raises:
        PoisonedSampleError: names the samples and the column.
    """
    for name, values in columns.items():
        if values.dtype.kind == "f":
            wrong, what = np.isinf(values), "infinite"
        elif name in limits:
            limit = limits[name]
            wrong, what = (values < 0) | (values > limit), f"not in 0 … {limit:,}"
        else:
            continue
        if wrong.any():
            guilty = np.unique(sample_ids[wrong]).tolist()
            found = values[wrong][0]
            reason = f"a value of {name}, {found}, which is {what}"
            raise PoisonedSampleError(guilty, "collating it", reason, unit)


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def read_quarantined(url: str, unit: Unit = "user") -> np.ndarray:
    """Sample ids int64 that a stage leaves out; none where nothing was written."""
    entries = [entry for entry in _entries(url) if entry.get("unit", "user") == unit]
    ids = [sample for entry in entries for sample in entry["samples"]]
    return np.unique(np.array(ids, dtype=np.int64))


def _entries(url: str) -> list[dict[str, Any]]:
    """What `quarantine` was given; lists of before there were seals are taken as they are."""
    if not storage.exists(url):
        return []
    written = storage.read_json(url)
    if isinstance(written, dict):
        if storage.SEAL not in written:
            raise ValueError(f"{url} is damaged (it has no seal); delete it or restore it")
        written = storage.read_sealed(url).get(_LEFT_OUT)
    if not isinstance(written, list) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("samples"), list)
        and entry.get("unit", "user") in get_args(Unit)
        for entry in written
    ):
        raise ValueError(f"{url} is no list of samples that are left out; delete it or restore it")
    ids = [sample for entry in written for sample in entry["samples"]]
    if not all(type(sample) is int and 0 <= sample < 1 << 63 for sample in ids):
        raise ValueError(f"{url} names samples that are none; delete it or restore it")
    return written


def quarantine(url: str, error: PoisonedSampleError) -> int:
    """Add samples to those that a stage leaves out; how many of their unit there are now."""
    entry: dict[str, Any] = {"samples": error.sample_ids, "unit": error.unit}
    entry |= {"where": error.where, "reason": error.reason}
    storage.write_sealed(url, {_LEFT_OUT: [*_entries(url), entry]})
    return len(read_quarantined(url, error.unit))
