"""An elastic group: two workers, one when a node dies, two again when one joins; one training."""

import json
from pathlib import Path

import pytest

from tests.integration.jobs import (
    checkpoints,
    finish,
    kill_everything,
    losses,
    start,
    wait_for,
    write_recipe,
)
from tests.integration.nodes import cluster, token_environment

TRAINING = {
    "epochs": 1000,
    "log_every_steps": 1,
    "validation": None,
    "optimizer": {"lr": 1e-4},
    # Each step waits for its checkpoint: there is time for a node to join before the end.
    "checkpoint": {"every_steps": 1, "every_epochs": None, "behind_training": False},
}


def newest(run: Path) -> tuple[int, int]:
    """Step and number of workers of the newest checkpoint; zeros where there is none."""
    found = (0, 0)
    for manifest in checkpoints(run, "train"):
        try:
            content = json.loads(manifest.read_text())
        except FileNotFoundError:  # pruned meanwhile
            continue
        found = max(found, (content["step"], content["world_size"]))
    return found


def test_nodes_leave_and_join_and_the_training_stays_the_same(tmp_path: Path) -> None:
    token = token_environment(tmp_path)
    run = tmp_path / "run"
    elastic = {"num_workers": 2, "min_workers": 1, "address": "auto", "resize_check_s": 1}
    elastic["start_timeout_s"] = 300  # a machine that tests something else as well is slow
    # A node that is lost is no worker's failure, although Ray lists it for a while.
    failures = {"worker": {"max_restarts": 0}, "node": {"max_restarts": 1}}
    recipe = write_recipe(
        tmp_path, cluster=elastic, training=TRAINING, alignment=None, failures=failures
    )
    with cluster(token, tmp_path) as nodes:
        first = nodes.add(tmp_path)
        inside = {**token, "RAY_ADDRESS": nodes.address}
        job = start("run", str(recipe), "--until", "train", variables=inside)
        wait_for(lambda: newest(run)[1] == 2, job=job)
        nodes.remove(first)
        wait_for(lambda: newest(run)[1] == 1, job=job)
        alone = newest(run)[0]
        nodes.add(tmp_path)
        wait_for(lambda: newest(run)[1] == 2, job=job)
        again = newest(run)[0]
        wait_for(lambda: newest(run)[0] > again + 3, job=job)
        output = kill_everything(job)
        wait_for(lambda: not nodes.workers())
    assert "a node was lost (node " in output, output
    assert "1 workers on 1 node" in output and output.count("2 workers on 2 nodes") == 2, output
    assert "there is room for 2 workers instead of 1" in output, output

    found = losses(run, "train")
    assert 1 < alone < again < max(found) and sorted(found) == list(range(1, max(found) + 1))
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    plain = TRAINING | {"max_steps": max(found), "checkpoint": {"every_steps": 1000}}
    finish(
        start("run", str(write_recipe(fixed, training=plain, alignment=None)), "--until", "train")
    )
    assert found == pytest.approx(losses(fixed / "run", "train"), rel=1e-4)
