"""Rows of a grown data set, found in the one before by the log's own names."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_loaders.continued import continued_rows
from data_loaders.manifest import build_manifest, read_manifest, write_manifest
from data_loaders.shards import partition_of, write_table
from data_loaders.synthetic import write_synthetic

BEFORE = [f"film {number}" for number in range(30)]
AFTER = [f"film {number}" for number in range(3, 50)]  # three are gone, twenty are new


def rename_items(url: str, names: Sequence[str], parts: int) -> list[str]:
    """Give a synthetic data set's items these names, as `prepare` does; the names by id."""
    hashed = partition_of(pa.chunked_array([pa.array(names)]), parts)
    by_part = [[n for n, p in zip(names, hashed, strict=True) if p == at] for at in range(parts)]
    entries, first = [], 1
    for at, members in enumerate(by_part):
        columns = {
            "item_id": pa.array(np.arange(first, first + len(members))),
            "item": pa.array(members, pa.string()),
            "title": pa.array([""] * len(members), pa.string()),
            "train_count": pa.array(np.ones(len(members), np.int64)),
        }
        entries.append(write_table(url, f"items/named-{at:05d}.parquet", pa.table(columns)))
        first += len(members)
    content = read_manifest(url).model_dump(exclude={"fingerprint", "items"})
    write_manifest(url, build_manifest(**content, items=entries))
    return [name for members in by_part for name in members]


@pytest.mark.parametrize("parts", [(4, 4), (1, 1), (2, 5), (16, 16)])
def test_items_are_known_by_name_in_any_parts(parts: tuple[int, int], tmp_path: Path) -> None:
    earlier, later = str(tmp_path / "earlier"), str(tmp_path / "later")
    write_synthetic(earlier, 8, len(BEFORE), 5, 1)
    write_synthetic(later, 8, len(AFTER), 5, 1)
    then, now = (
        rename_items(earlier, BEFORE, parts[0]),
        rename_items(later, AFTER, parts[1]),
    )
    rows = continued_rows(later, earlier, ["item", "user_segment", "user_new"])
    assert set(rows) == {"item", "user_segment"}
    for first, count in ((0, len(now) + 1), (7, 9), (len(now), 1), (0, 1)):
        found = {
            int(a): int(b)
            for here, there in rows["item"](first, count)
            for a, b in zip(here, there, strict=True)
        }
        wanted = {
            at: then.index(name) + 1
            for at, name in enumerate(now, 1)
            if name in then and first <= at < first + count
        }
        assert found == wanted
    assert sum(rows["item"].count(rank, 3) for rank in range(3)) == len(set(BEFORE) & set(AFTER))
    [(here, there)] = rows["user_segment"](1, 2)
    assert torch.equal(here, there) and here.tolist() == [1, 2]
    assert rows["user_segment"].count(0, 2) == 4 and rows["user_segment"].count(1, 2) == 0
