"""The same recipe on two nodes: killed twice, a node replaced, submitted from outside."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.joining import cluster_lets_in
from launch.submit import server_lets_in
from tests.integration.jobs import (
    ROOT,
    checkpoints,
    finish,
    kill_everything,
    losses,
    measured,
    start,
    wait_for,
    write_recipe,
)
from tests.integration.nodes import Nodes, cluster, token_environment

CHECK = """
import json, sys, ray
from configs.load import load_recipe
from launch.shared_storage import check_inputs, check_output
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
for overrides in json.loads(sys.argv[2]):
    recipe = load_recipe(sys.argv[1], overrides).recipe
    try:
        check_output(recipe.output)
        check_inputs(recipe.data.source)
        print("seen")
    except ValueError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of whoever may use the cluster."""
    return token_environment(tmp_path_factory.mktemp("token"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the nodes stand."""
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def nodes(token: dict[str, str], place: Path) -> Iterator[Nodes]:
    """Two nodes of one CPU each on this host, so that two workers must spread."""
    with cluster(token, place) as held:
        held.add(place)
        yield held


def test_killed_twice_a_node_replaced_then_submitted(
    nodes: Nodes, place: Path, token: dict[str, str], calm: tuple[Path, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path, cluster={"num_workers": 2, "address": "auto"})
    arguments = [str(recipe), "cluster.placement_strategy=STRICT_SPREAD"]
    inside = {**token, "RAY_ADDRESS": nodes.address}

    job = start("run", *arguments, variables=inside)
    wait_for(lambda: checkpoints(run, "train"), job=job)
    kill_everything(job)
    wait_for(lambda: not nodes.workers())  # Ray ends them once it sees that their driver is dead

    before = checkpoints(run, "train")
    job = start("run", *arguments, variables=inside)
    wait_for(lambda: checkpoints(run, "train") - before, job=job)
    nodes.remove(0)
    nodes.add(place)
    wait_for(lambda: checkpoints(run, "align"), job=job)
    output = kill_everything(job)
    wait_for(lambda: not nodes.workers())
    _, died, restarted = output.partition("restarting from the newest checkpoint, attempt 2 of 4")
    assert died, output
    assert "resuming from step" in restarted and "2 workers on 2 nodes" in restarted, output

    assert not cluster_lets_in(nodes.address) and not server_lets_in(nodes.job_server)
    output = finish(start("submit", *arguments, "--address", nodes.job_server, variables=token))
    assert "[2/6] train: unchanged, skipped" in output
    assert "2 workers on 2 nodes" in output and "resuming from step" in output
    for stage in ("train", "align"):
        assert losses(run, stage) == losses(calm[0] / "run", stage)
    assert measured(run) == measured(calm[0] / "run")
    assert not (run / "ray").exists()


def test_what_one_node_does_not_see_is_refused(
    nodes: Nodes, place: Path, token: dict[str, str], tmp_path: Path
) -> None:
    # For each node /proc/self/cwd is another directory, as a path that is mounted nowhere else.
    here = "/proc/self/cwd"
    for directory in (place, tmp_path):
        (directory / "logs").mkdir()
        for name in ("logs/1.csv", "logs/2.csv", "users.csv", "titles.csv"):
            (directory / name).write_text("user,item,timestamp\n")
    (tmp_path / "titles.csv").write_text("item,title\n")
    (tmp_path / "logs" / "2.csv").unlink()
    (tmp_path / "users.csv").unlink()
    recipe = str(write_recipe(tmp_path))
    variables = {**os.environ, **token, "RAY_ADDRESS": nodes.address, "PYTHONPATH": str(ROOT)}

    def check(*cases: list[str]) -> list[str]:
        command = [sys.executable, "-c", CHECK, recipe, json.dumps(cases)]
        done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    users = f"data.source.user_table={{url: {here}/users.csv, format: csv, features: [item]}}"
    titles = f"data.source.item_text={{url: {here}/titles.csv, format: csv}}"
    logs = f"data.source.url={here}/logs/*.csv"
    assert check([logs, users, titles]) == ["seen"]  # the two nodes stand in one place
    blind = nodes.add(tmp_path)
    refused = {
        logs: ("data.source.url", r"2\.csv"),
        f"data.source.url={here}/logs": ("data.source.url", r"2\.csv"),
        titles: ("data.source.item_text.url", r"titles\.csv"),
        users: ("data.source.user_table.url", r"users\.csv"),
        f"output={here}/run": ("output", r"\.probe-\w+"),
    }
    answers = check([f"data.source.url={here}/logs/1*.csv"], *([case] for case in refused))
    nodes.remove(blind)
    assert answers[0] == "seen"
    for sentence, (key, file) in zip(answers[1:], refused.values(), strict=True):
        where = (
            rf"is not seen by node [\d.]+, where {file} is absent or another file \(1 of 3 nodes"
        )
        assert re.match(f"{key}='{here}/.*' {where}", sentence), sentence
    assert list((place / "run").iterdir()) == []  # the probe is gone


def test_a_node_that_will_be_taken_away_costs_no_step(
    nodes: Nodes, place: Path, token: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    training = {"epochs": 60, "log_every_steps": 1, "checkpoint": {"every_steps": 4}}
    training["validation"] = None
    cluster = {"num_workers": 2, "address": "auto", "placement_strategy": "STRICT_SPREAD"}
    recipe = write_recipe(tmp_path, cluster=cluster, training=training, alignment=None)
    inside = {**token, "RAY_ADDRESS": nodes.address}
    job = start("run", str(recipe), "--until", "train", variables=inside)
    wait_for(lambda: checkpoints(run, "train"), job=job)
    [other] = nodes.others
    nodes.drain(other, 120)
    nodes.add(place)
    output = finish(job)
    told = re.search(r"asked to end \(.* is saved at step (\d+); .* attempt 2 of 101", output)
    assert told is not None, output
    assert f"resuming from step {told[1]}" in output.split("attempt 2 of 101")[1]
