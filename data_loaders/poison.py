"""Samples that cannot be trained on: named when they raise, and left out where the recipe says so.

They are left out of what the fixed order of samples gives, so every world size leaves out the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from configs import storage

_LEFT_OUT = "left_out"
NAMED = 20
"""Sample ids in a sentence."""
NOT_THE_SAMPLES = (ValueError, OSError, MemoryError)
"""Errors of collation that name what is wrong already (a file, or a sample), or that storage or the
machine caused: whoever was read by then is not to blame."""


class PoisonedSampleError(ValueError):
    """Samples raise in collation or in the forward pass: so they would again."""

    def __init__(self, sample_ids: Sequence[int], where: str, reason: str) -> None:
        super().__init__(list(sample_ids), where, reason)
        self.sample_ids = list(sample_ids)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        ids = self.sample_ids
        named = ", ".join(map(str, ids[:NAMED])) + (" …" if len(ids) > NAMED else "")
        which = "sample" if len(ids) == 1 else "one of the samples"
        return f"{which} {named} cannot be trained on: {self.where} met {self.reason}"


def find_poisoned(
    collate: Callable[[np.ndarray], Any], sample_ids: np.ndarray, error: Exception
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
        except Exception:  # noqa: BLE001 - whatever else it raises, it is not to be trained on
            guilty.append(int(sample))
    return PoisonedSampleError(guilty, "collating it", reason_of(error)) if guilty else None


def check_values(
    columns: Mapping[str, np.ndarray], sample_ids: np.ndarray, limits: Mapping[str, int]
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
            raise PoisonedSampleError(guilty, "collating it", reason)


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def read_quarantined(url: str) -> np.ndarray:
    """Sample ids int64 that a stage leaves out; none where nothing was written."""
    ids = [sample for entry in _entries(url) for sample in entry["samples"]]
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
        isinstance(entry, dict) and isinstance(entry.get("samples"), list) for entry in written
    ):
        raise ValueError(f"{url} is no list of samples that are left out; delete it or restore it")
    ids = [sample for entry in written for sample in entry["samples"]]
    if not all(type(sample) is int and 0 <= sample < 1 << 63 for sample in ids):
        raise ValueError(f"{url} names samples that are none; delete it or restore it")
    return written


def quarantine(url: str, error: PoisonedSampleError) -> int:
    """Add samples to those that a stage leaves out; how many there are now."""
    entry = {"samples": error.sample_ids, "where": error.where, "reason": error.reason}
    storage.write_sealed(url, {_LEFT_OUT: [*_entries(url), entry]})
    return len(read_quarantined(url))
