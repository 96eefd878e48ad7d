"""One embedded Ray for the tests of distributed preparation; a data set for those that read one."""

from collections.abc import Iterator
from math import isnan
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from data_loaders.dataset import SequenceDataset
from data_loaders.synthetic import write_synthetic

USERS = 61
LENGTH = 10
"""max_length of the tests; many users are longer."""


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    """A Ray of this process alone; tests of this package share it, as starting takes seconds."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loader")
    more = {"num_shards": 3, "rows_per_group": 8, "empty_shards": 1}
    write_synthetic(
        str(path),
        USERS,
        40,
        9,
        2,
        **more,
        actions=True,
        labels=True,
        dwell_times=True,
        durations=True,
    )
    return path


@pytest.fixture(scope="module")
def users(directory: Path) -> list[dict]:
    files = sorted((directory / "sequences").iterdir())
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def dataset(directory: Path) -> SequenceDataset:
    return SequenceDataset(str(directory), cached_row_groups=16)


def known(seconds: list[float]) -> list[float | None]:
    """Dwell times; NaN, which equals nothing, becomes None."""
    return [None if isnan(value) else value for value in seconds]
