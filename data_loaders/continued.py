"""Which rows of this data set's tables an earlier data set had, by the log's own names.

Ids are dense and follow the whole data set, so that a grown log gives known items other ids.
Shape legend: n rows, V items.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data_loaders.items import ItemPart, item_parts, vocabulary
from data_loaders.manifest import read_manifest
from data_loaders.shards import lookup, partition_of

Rows = tuple[Tensor, Tensor]
"""Ids here, and the same names' ids in the earlier data set: int64 [n] each."""


class ContinuedItems:
    """Items that an earlier data set had, found part by part: memory is that of two parts."""

    def __init__(self, dataset_url: str, earlier_url: str) -> None:
        self._parts, self._earlier = item_parts(dataset_url), item_parts(earlier_url)

    def __call__(self, first: int, count: int) -> Iterator[Rows]:
        """Of the ids first … first + count - 1, those that the earlier data set had."""
        for part in self._parts:
            begin, end = max(first, part.first_id), min(first + count, part.first_id + part.rows)
            if begin < end:
                here, there = self._of_part(part)
                chosen = (here >= begin) & (here < end)
                yield here[chosen], there[chosen]

    def count(self, rank: int, world_size: int) -> int:
        """How many there are in this rank's share of the parts."""
        return sum(len(self._of_part(part)[0]) for part in self._parts[rank::world_size])

    def _of_part(self, part: ItemPart) -> Rows:
        if not part.rows:
            return _rows(np.zeros(0, np.int64), 0)
        names = part.column("item")
        found = np.zeros(part.rows, np.int64)
        for earlier in self._where(names, self._parts.index(part)):
            if earlier.rows:
                row = lookup(names, earlier.column("item").combine_chunks())
                found = np.where(row > 0, earlier.first_id + row - 1, found)
        return _rows(found, part.first_id)

    def _where(self, names: pa.ChunkedArray, number: int) -> list[ItemPart]:
        """Parts of the earlier data set that may have names of part `number`.

        `prepare` puts an item into the part of its name's hash, so that with equally many parts it
        lies in the one of the same number. Otherwise, and of other writers, it may lie in any.
        """
        count, there = len(self._parts), self._earlier[number : number + 1]
        alike = count == len(self._earlier) and _all_hash_to(number, count, names)
        if alike and there[0].rows:
            alike = _all_hash_to(number, count, there[0].column("item"))
        return there if alike else self._earlier


class ContinuedCategories:
    """Values of a categorical column that an earlier data set had."""

    def __init__(self, dataset_url: str, earlier_url: str, name: str) -> None:
        """`name` is `user_<feature>` or `side_<feature>`."""
        here, there = (pa.array(vocabulary(url, name)) for url in (dataset_url, earlier_url))
        known = lookup(pa.chunked_array([here]), there)
        self._here, self._there = _rows(known, 1)

    def __call__(self, first: int, count: int) -> Iterator[Rows]:
        """As of `ContinuedItems`."""
        chosen = (self._here >= first) & (self._here < first + count)
        yield self._here[chosen], self._there[chosen]

    def count(self, rank: int, world_size: int) -> int:
        """How many there are, for the first rank to say."""
        return len(self._here) if rank == 0 else 0


def continued_rows(
    dataset_url: str, earlier_url: str, tables: list[str]
) -> dict[str, ContinuedItems | ContinuedCategories]:
    """For each of a model's tables that both data sets have the rows of: where they lay.

    Raises:
        ValueError: a file of one of the data sets is missing or damaged.
    """
    manifest = read_manifest(earlier_url)
    known = {f"user_{name}" for name, size in manifest.user_features.items() if size}
    known |= {f"side_{name}" for name, size in manifest.side_features.items() if size}
    rows: dict[str, ContinuedItems | ContinuedCategories] = {}
    for name in tables:
        if name == "item":
            rows[name] = ContinuedItems(dataset_url, earlier_url)
        elif name in known:
            rows[name] = ContinuedCategories(dataset_url, earlier_url, name)
    return rows


def _rows(found: np.ndarray, first_id: int) -> Rows:
    """From the earlier id of each row, 0 where there was none."""
    here = np.flatnonzero(found)
    return torch.from_numpy(here + first_id), torch.from_numpy(found[here])


def _all_hash_to(number: int, parts: int, names: pa.ChunkedArray) -> bool:
    """Whether part `number` is that of all names."""
    return bool((partition_of(names, parts) == number).all())
