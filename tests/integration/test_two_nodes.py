"""The same recipe on a two-node Ray cluster: pretrain, die, resume, align."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.integration.jobs import finish, kill_everything, results, start, wait_for, write_recipe


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two nodes of one CPU each on this host, so that two workers must spread."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


def test_pretrain_align_resume_over_two_nodes(two_nodes: Cluster, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, cluster={"num_workers": 2, "address": "auto"})
    spread = "cluster.placement_strategy=STRICT_SPREAD"
    job = start("run", str(recipe), spread)
    wait_for(lambda: list(tmp_path.glob("run/checkpoints/train-*/newest/*/MANIFEST.json")))
    kill_everything(job)
    output = finish(start("run", str(recipe), spread))
    assert "2 workers on 2 nodes" in output
    assert "resuming from step" in output
    assert set(results(tmp_path / "run")["models"]) == {"popularity", "pretrained", "aligned"}
