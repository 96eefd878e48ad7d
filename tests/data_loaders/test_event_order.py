"""A column of the log that orders events of equal time, through the whole preparation."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data import CleaningConfig, ColumnMap, DataConfig, ParquetSource, ShardConfig
from data_loaders.items import raw_items
from data_loaders.sequences import prepare

pytestmark = pytest.mark.usefixtures("local_ray")
DAY = 1_318_896_000


def test_ties_of_time_follow_the_order_column_and_not_the_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    wanted = {f"u{u}": [f"i{i}" for i in random.permutation(40)[: 3 + u]] for u in range(9)}
    rows = [
        # Two events a day: days are in order, the column decides within a day alone.
        {"user": user, "item": item, "timestamp": DAY + 86400 * (n // 2), "pos": n % 2 - 0.5}
        for user, items in wanted.items()
        for n, item in enumerate(items)
    ]
    rows = [rows[index] for index in random.permutation(len(rows))]
    rows += [rows[0], {"user": "u1", "item": "i1", "timestamp": DAY, "pos": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    config = DataConfig(
        source=ParquetSource(url=str(tmp_path / "log.parquet"), columns=ColumnMap(order="pos")),
        cleaning=CleaningConfig(max_bad_share=1.0),
        shards=ShardConfig(num_shards=3),
    )
    url = str(tmp_path / "data")
    manifest = prepare(config, "toy", url, url)
    assert manifest.counts.quarantined == {"duplicate": 1, "unparsable_order": 1}
    found = {
        row["user"]: raw_items(url, row["item_ids"])
        for path in sorted((tmp_path / "data" / "sequences").glob("*/*.parquet"))
        for row in pq.read_table(path).to_pylist()
    }
    assert found == wanted
    quarantine = [pq.read_table(p) for p in (tmp_path / "data" / "quarantine").glob("*/*.parquet")]
    assert quarantine and all("pos" in table.column_names for table in quarantine)
