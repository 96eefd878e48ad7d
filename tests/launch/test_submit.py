"""Submitting: what travels, what is refused, and a real job server that runs it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from ray._private.services import get_node_ip_address
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from configs.load import load_recipe
from launch import cli, submit
from launch.joining import check_door, cluster_lets_in
from tests.integration.jobs import ROOT, start, wait_for, write_recipe
from tests.integration.nodes import quiet_port


def test_what_travels_is_our_packages_and_the_resolved_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    overrides = ["output=here", "data.source.url=events.csv", "seed=8"]
    overrides.append("data.source.item_text={url: titles.csv, format: csv}")
    loaded = load_recipe(recipe, overrides)
    folder = tmp_path / "staged"
    submit.stage(loaded, folder)
    assert {path.name for path in folder.iterdir()} == {*submit.PACKAGES, submit.RECIPE_FILE}
    assert not list(folder.rglob("__pycache__"))
    assert list(folder.glob("configs/recipes/quickstart.yaml"))
    assert list(folder.glob("models/ops/csrc/*.cpp"))
    there = load_recipe(folder / submit.RECIPE_FILE).recipe
    assert there.seed == 8 and there.cluster.address == "auto"
    assert there.output == str(tmp_path / "here")
    assert there.data.source.kind == "csv" and there.data.source.item_text is not None
    assert there.data.source.url == str(tmp_path / "events.csv")
    assert there.data.source.item_text.url == str(tmp_path / "titles.csv")


def test_the_places_of_other_runs_and_files_travel_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vectors = "{kind: vectors, url: vectors.npy, format: npy, first_id: 1}"
    overrides = ["training.start={run: yesterday}", "tokenizer.frozen=earlier"]
    overrides += [f"tokenizer.embeddings=[{vectors}]"]
    rewards = "[{kind: model, run: judge, tasks: {p_score: 1.0}}]"
    overrides.append(f"alignment.rewards={rewards}")
    there = submit.on_cluster(load_recipe("beauty/hstu_grpo", overrides).recipe)
    assert there.training.start is not None and there.tokenizer is not None
    assert there.training.start.run == str(tmp_path / "yesterday")
    assert there.tokenizer.frozen == str(tmp_path / "earlier")
    (embedding,) = there.tokenizer.embeddings
    assert embedding.kind == "vectors" and embedding.url == str(tmp_path / "vectors.npy")
    assert there.alignment is not None and there.alignment.kind == "grpo"
    (reward,) = there.alignment.rewards
    assert reward.kind == "model" and reward.run == str(tmp_path / "judge")


def test_urls_travel_as_they_are() -> None:
    overrides = ["output=memory://bucket/run", "data.source.url=memory://bucket/raw"]
    there = submit.on_cluster(load_recipe("quickstart", overrides).recipe)
    assert (there.output, there.data.source.url) == ("memory://bucket/run", "memory://bucket/raw")


BAD = ["A", "1A=2", "=2", "AWS_SECRET_ACCESS_KEY=x", "MY_TOKEN=x", "STORE=s3://id:hush@b/x"]


@pytest.mark.parametrize("text", [*BAD, "OPTIONS=--password=hunter22"])
def test_bad_variables_and_credentials_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--env"):
        submit.start(load_recipe("quickstart"), "http://127.0.0.1:1", environment=[text])


def test_open_and_dead_addresses_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    loaded = load_recipe("quickstart")
    with pytest.raises(ValueError, match="RAY_AUTH_MODE=token"):
        submit.start(loaded, "http://192.0.2.1:8265")
    with pytest.raises(ValueError, match=r"must be the job server's http://HOST:8265"):
        submit.start(loaded, "ray://127.0.0.1:10001")
    with pytest.raises(ValueError, match=r"no Ray job server answers at http://127\.0\.0\.1:1 "):
        submit.start(loaded, "http://127.0.0.1:1")


def test_a_token_that_is_not_taken_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> None:
        raise AuthenticationError("Authentication failed: Invalid authentication token")

    monkeypatch.setattr(submit, "JobSubmissionClient", refuse)
    with pytest.raises(ValueError, match="does not take the token .* export RAY_AUTH_MODE=token"):
        submit._connect("http://127.0.0.1:8265")


FOLLOW = """
import sys
from ray.job_submission import JobInfo, JobStatus
from launch import submit
submit.LOST_AFTER_S = submit.RECONNECT_S = 0.0
class Server:
    asked = 0
    async def tail_job_logs(self, job):
        self.asked += 1
        for n in range(3): yield f"line {n}\\n"
    def get_job_status(self, job): return JobStatus.SUCCEEDED
    def get_job_info(self, job): return JobInfo(JobStatus.SUCCEEDED, entrypoint="x")
server = Server()
assert submit.Job(server, "job").follow("leave") == 0 and server.asked == 1
"""


def test_a_reader_of_the_log_that_left_is_no_lost_server() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, str]]:
    """The address of a Ray head that asks for no token, and of its job server."""
    from ray.cluster_utils import Cluster

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    agent_port = quiet_port()  # the default may belong to another Ray on this host
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # whatever this process did before
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "include_dashboard": True,
                "dashboard_port": 0,
                "dashboard_agent_listen_port": agent_port,
            },
        )
    try:
        yield cluster.address, f"http://{cluster.head_node.webui_url}"
    finally:
        cluster.shutdown()


@pytest.fixture
def job_server(head: tuple[str, str]) -> str:
    """That of the head."""
    return head[1]


@pytest.mark.slow
def test_what_asks_for_no_token_is_refused_although_one_is_set_here(
    head: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (address, server), port = head, head[0].rpartition(":")[2]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for here in (get_node_ip_address(), "127.0.0.1"):  # by which others do not come, but reach it
        with pytest.raises(ValueError, match="^cluster.address='.*' asks for no token, so anyone"):
            check_door(f"{here}:{port}")
    assert cluster_lets_in(address) and submit.server_lets_in(server)


@pytest.mark.slow
def test_a_submitted_job_runs_and_its_exit_code_comes_back(
    tmp_path: Path, job_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray prefers this to the address it is given; ours wins.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    recipe = str(write_recipe(tmp_path))
    good = ["submit", recipe, "--address", job_server, "--until", "prepare", "--env", "HELLO=1"]
    result = CliRunner().invoke(cli.main, good)
    assert result.exit_code == 0, result.output
    assert "prepare: done in" in result.stdout and "submitted raysubmit" in result.stderr
    assert (tmp_path / "run" / "data" / "manifest.json").exists()
    bad = [*good, "data.source.columns.item=itm", f"output={tmp_path / 'other'}"]
    result = CliRunner().invoke(cli.main, bad)
    assert result.exit_code == 2, result.output
    assert "error: " in result.stdout and "itm" in result.stdout
    assert not (tmp_path / "other" / "data" / "manifest.json").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_or_stops_it(tmp_path: Path, job_server: str) -> None:
    path = str(write_recipe(tmp_path))
    endless = "training.epochs=100000"
    following = start("submit", path, endless, "--address", job_server, "--on-interrupt", "leave")
    try:
        first = following.stdout.readline() if following.stdout else ""
        assert first.startswith("submitted raysubmit_")
        job = submit.Job(JobSubmissionClient(job_server), first.split()[1])
        wait_for(lambda: job.status().value == "RUNNING", timeout=300)
        following.send_signal(signal.SIGINT)
        rest, _ = following.communicate(timeout=300)
    finally:
        following.kill()
    assert following.returncode == submit.STOPPED_CODE, rest
    assert f"ray job stop {job.job_id}" in rest
    assert not job.status().is_terminal()
    assert job.interrupted("ask") == submit.STOPPED_CODE  # no terminal to ask on: stops it
    assert job.status().value == "STOPPED"
    assert job.follow() == submit.STOPPED_CODE
