"""No command prints, records or ships credentials; the token of Ray is its user's alone."""

import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from configs import storage
from configs.cluster import ClusterConfig
from configs.load import load_recipe
from data_loaders.synthetic import write_synthetic
from launch import address, submit
from launch.cli import main
from launch.cluster import connect
from sharding.checkpoint import CheckpointStore
from sharding.process_group import current_context
from tests.faults.trainings import small_disk
from tests.harness import run_ranks
from tests.integration.jobs import ROOT
from tests.trainer.monitor import invented
from tests.trainer.runs import ITEMS, USERS, quiet, settings_of
from trainer.monitor.results import write_results

SECRET = "wJalrXUtnFEMIK7MDENG"
URL = f"s3://AKIAEXAMPLE:{SECRET}@bucket"


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output + result.stderr


def test_commands_do_not_print_them(tmp_path: Path) -> None:
    url = f"data.source.url={URL}/log.csv"
    recipe = tmp_path / "secret.yaml"
    source = {"kind": "csv", "url": "x", "columns": {"user": "u", "item": "i", "timestamp": "t"}}
    content = {"extends": "quickstart", "alignment": None, "data": {"source": source}}
    recipe.write_text(yaml.safe_dump(content))
    shown = invoke("show-config", str(recipe), url)
    assert "s3://***@bucket/log.csv" in shown and SECRET not in shown
    store = f"memory://AKIAEXAMPLE:{SECRET}@bucket/run"
    storage.write_bytes(f"{store}/newest/step-00000001-0000000000000001/x", b"")
    for command in (["checkpoint", "list", store], ["checkpoint", "verify", store]):
        told = invoke(*command)
        assert "unfinished" in told and SECRET not in told
    told = invoke("run", str(recipe), f"output={URL}/run")
    assert "holds credentials" in told and SECRET not in told
    told = invoke("show-config", str(recipe), f"seed={URL}")
    assert "error: " in told and SECRET not in told
    loaded = load_recipe(recipe, [url])
    with pytest.raises(ValueError, match=r"s3://\*\*\*@bucket/log.csv.*holds credentials") as error:
        submit.start(loaded, "http://127.0.0.1:1")
    assert SECRET not in str(error.value)


def test_a_traceback_does_not_print_them() -> None:
    code = f"import launch.cli\nraise RuntimeError('no connection to {URL}/x')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "RuntimeError" in done.stderr and SECRET not in done.stderr


def test_logs_do_not_hold_them() -> None:
    """Neither a library's lines, nor the traceback below one; nor what a restart is told."""
    code = f"""
import logging, launch.cli
from configs.failures import FailuresConfig
from launch.failures import Losses, Place, Restarts, diagnose
from configs.terminal import say
log = logging.getLogger("botocore")
log.warning("%s cannot be reached, try %d", "{URL}/x", 2)
try:
    raise OSError("{URL}/y")
except OSError:
    log.exception("lost %(url)s", {{"url": "{URL}/z"}})
error, place = RuntimeError("no connection to {URL}/x"), Place("/none", "/none", "/none")
failure = diagnose([error], place, 0, 1, losses=Losses)
Restarts(FailuresConfig(), place, say).decide(failure)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert "s3://***@bucket/x cannot be reached, try 2" in told and "OSError: s3://***" in told
    assert "no connection to s3://***@bucket/x" in told and SECRET not in told


def test_results_and_reports_do_not_hold_them(tmp_path: Path) -> None:
    table = {"url": f"{URL}/t.csv", "format": "csv", "item": "i", "title": "t"}
    source = {"kind": "csv", "url": f"{URL}/log.csv", "item_text": table}
    source["columns"] = {"user": "u", "item": "i", "timestamp": "t"}  # type: ignore[assignment]
    recipe = invented.recipe(data={"source": source}, alignment=None)
    old = invented.results().model_dump(mode="json")
    measured = {"protocol": old["protocol"], "models": old["models"], "semantic_ids": None}
    write_results(str(tmp_path / "results.json"), recipe, measured, None)
    text = (tmp_path / "results.json").read_text()
    assert "s3://***@bucket/log.csv" in text and SECRET not in text


def recipe_of_checkpoint(root: str) -> dict[str, Any]:
    from trainer.pretrain import train_worker

    blocks = {"data": {"source": {"kind": "public", "name": "ml-100k", "url": f"{URL}/copy"}}}
    train_worker(settings_of(Path(root), "f", {**blocks, "training": {"max_steps": 1}}), quiet)
    store = CheckpointStore(f"{root}/checkpoints/train-f/newest", 2, current_context("cpu"))
    info = store.newest()
    assert info is not None
    return store.recipe(info)


def test_checkpoints_do_not_hold_them(tmp_path: Path) -> None:
    write_synthetic(str(tmp_path / "data"), USERS, ITEMS, 9, 3, rows_per_group=16)
    [recipe] = run_ranks(1, recipe_of_checkpoint, str(tmp_path))
    assert recipe["data"]["source"]["url"] == "s3://***@bucket/copy"
    for file in (tmp_path / "checkpoints").rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_the_token_is_made_for_its_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "deep" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    address.make_token()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    content = token.read_text()
    assert len(content) == 64 and list(token.parent.iterdir()) == [token]
    address.make_token()
    assert token.read_text() == content, "a token that is there stays"


def test_a_token_that_cannot_be_protected_or_made_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with small_disk(tmp_path / "secrets", "64k") as mounted:  # as a cluster mounts a secret
        (mounted / "token").write_text("f" * 64)
        (mounted / "token").chmod(0o644)
        subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(mounted / "token"))
        joined = connect(ClusterConfig(address="local"))
        with pytest.raises(ValueError, match=r"token can be read by .*, or copy it to a file of"):
            joined.__enter__()
        for path in ("none", "deep/none"):
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(mounted / path))
            with pytest.raises(ValueError, match=f"no token for Ray can be made at .*{path} "):
                address.make_token()


def test_an_open_embedded_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    joined = connect(ClusterConfig(address="local"))
    with pytest.raises(ValueError, match="RAY_AUTH_MODE='disabled' would let anyone"):
        joined.__enter__()
