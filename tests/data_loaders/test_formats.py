"""One log means the same in every format."""

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from configs.data import (
    ColumnMap,
    CsvSource,
    DataConfig,
    JsonlSource,
    ParquetSource,
    ShardConfig,
    UserTable,
)
from data_loaders.sequences import prepare

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize("format_", ["csv", "jsonl", "parquet"])
def test_empty_features_are_unknown_in_every_format(tmp_path: Path, format_: str) -> None:
    times = [1_577_836_800 + n for n in range(4)]
    log = pd.DataFrame({"user": list("aaba"), "item": list("xyxx"), "timestamp": times})
    log = log.assign(action=["click", "", "like", "like"], tab=["", "t", "", "t"], rating=1.0)
    users = pd.DataFrame({"user": ["a", "b"], "age": ["", "30"]})
    for name, frame in (("log", log), ("users", users)):
        path = tmp_path / f"{name}.{format_}"
        if format_ == "csv":
            frame.to_csv(path, index=False)
        elif format_ == "jsonl":
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_parquet(path)
    table = UserTable(url=f"{tmp_path}/users.{format_}", format=format_, features=("age",))
    columns = ColumnMap(rating="rating", action="action", side_features=("tab",))
    kind = {"csv": CsvSource, "jsonl": JsonlSource, "parquet": ParquetSource}[format_]
    source = kind(url=f"{tmp_path}/log.{format_}", columns=columns, user_table=table)
    config = DataConfig(source=source, shards=ShardConfig(num_shards=1))
    manifest = prepare(config, "toy", str(tmp_path / "data"), "")
    assert (manifest.actions, manifest.side_features) == (2, {"tab": 1})
    assert manifest.user_features == {"age": 1}
    [shard] = manifest.shards
    table = pq.read_table(tmp_path / "data" / shard.path)
    rows = {row["user"]: row for row in table.to_pylist()}
    assert rows["a"]["side_tab"] == [0, 1, 1] and rows["b"]["side_tab"] == [0]
    assert rows["a"]["action_ids"] == [1, 0, 2] and rows["a"]["user_age"] == 0
