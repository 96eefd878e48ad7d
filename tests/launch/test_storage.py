"""A run's storage must be seen by every node."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from configs.cluster import ClusterConfig
from launch import cluster as launched
from launch.cluster import check_storage, connect

CLUSTER = ClusterConfig(num_workers=1, max_failures=1, data_cpus=2)
BLIND = {"NodeID": "ab" * 28, "Alive": True, "NodeManagerAddress": "10.9.8.7"}


@pytest.fixture(scope="module")
def embedded() -> Iterator[None]:
    with connect(CLUSTER):
        yield


class SeesUnless:
    """The real task, except that one node answers as if another directory were mounted there."""

    def __init__(self, blind: str) -> None:
        self._blind, self._real = blind, launched._sees

    def options(self, scheduling_strategy: Any) -> "SeesUnless":
        self._elsewhere = scheduling_strategy.node_id == self._blind
        return self

    def remote(self, url: str) -> Any:
        return self._real.remote(f"{url}-elsewhere" if self._elsewhere else url)


def test_storage_that_one_node_does_not_see_is_refused(
    embedded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "run")
    check_storage(url, CLUSTER)  # one node
    nodes = [*ray.nodes(), BLIND]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(launched, "_sees", SeesUnless(blind="nobody"))
    check_storage(url, CLUSTER)
    monkeypatch.undo()

    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(launched, "_sees", SeesUnless(blind=BLIND["NodeID"]))
    with pytest.raises(ValueError, match=r"not seen by node 10\.9\.8\.7 \(1 of 2 nodes") as error:
        check_storage(url, CLUSTER)
    assert url in str(error.value)
    assert list((tmp_path / "run").iterdir()) == []  # the probe is gone
    check_storage("memory://run", CLUSTER)  # what is not a local path, every node sees
