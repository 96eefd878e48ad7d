"""The main job as a user runs it: two workers, every stage, killed and resumed."""

import json
from pathlib import Path

import pytest

from configs import storage
from configs.load import load_recipe
from configs.recipe import STAGES, StageName
from launch.run import run
from tests.integration.jobs import (
    checkpoints,
    finish,
    kill_everything,
    kill_one_worker,
    losses,
    measured,
    results,
    start,
    wait_for,
    write_recipe,
)


def test_all_stages_leave_their_results(calm: tuple[Path, str]) -> None:
    directory, output = calm
    done = directory / "run"
    models = results(done)["models"]
    assert set(models) == {"popularity", "pretrained", "aligned"}
    # Users walk in steps of one or two: the model must see it, popularity cannot.
    assert models["pretrained"]["test"]["hr@5"] > 2 * models["popularity"]["test"]["hr@5"]
    assert models["aligned"]["preference_accuracy"] >= models["pretrained"]["preference_accuracy"]
    assert (done / "recommendations.json").exists()
    assert list(done.glob("report*.html")), output
    assert "ndcg@10" in output.lower()


def test_a_second_run_skips_everything(calm: tuple[Path, str]) -> None:
    directory, _ = calm
    output = finish(start("run", str(directory / "tiny.yaml")))
    assert output.count("unchanged, skipped") == 6


@pytest.mark.parametrize("stage", STAGES[:1] + STAGES[2:])
def test_each_stage_alone_finds_what_it_needs(
    calm: tuple[Path, str], stage: StageName, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_recipe(calm[0] / "tiny.yaml", [])
    run(loaded, only=stage)
    assert f"{stage}: unchanged, skipped" in capfd.readouterr().out


def test_the_report_alone_is_written_anew(
    calm: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    [report] = (calm[0] / "run").glob("report*.html")
    before = report.stat().st_mtime_ns
    run(load_recipe(calm[0] / "tiny.yaml", []), only="report", force=True)
    assert "report: done in" in capfd.readouterr().out
    assert report.stat().st_mtime_ns > before


def test_a_changed_setting_reruns_only_what_depends_on_it(calm: tuple[Path, str]) -> None:
    directory, _ = calm
    output = finish(start("run", str(directory / "tiny.yaml"), "recommend.top_k=3"))
    assert output.count("unchanged, skipped") == 4  # recommend and report ran again


def test_users_get_what_their_own_lists_allow(calm: tuple[Path, str]) -> None:
    directory, _ = calm
    fresh = {"feature": "released", "since": "2020-01-11"}
    asked = {
        "users": ["u3", "u1", "u2", "u0"],
        "num_users": 3,  # as by default, in place of the recipe's
        "top_k": 9,
        "allow": [{"feature": "kind", "values": ["even"]}, fresh],
        "allow_for": {"u1": fresh, "u2": []},
    }
    finish(start("run", str(directory / "tiny.yaml"), f"recommend={json.dumps(asked)}"))
    users = storage.read_sealed(str(directory / "run" / "recommendations.json"))["users"]
    found = {user["user"]: [int(item[1:]) for item in user["items"]] for user in users}
    assert list(found) == ["u3", "u1", "u2", "u0"]
    assert all(item % 2 == 0 and item >= 20 for user in ("u0", "u3") for item in found[user])
    assert all(item >= 20 for item in found["u1"]) and {item % 2 for item in found["u1"]} == {0, 1}
    assert min(found["u2"]) < 20 and len(found["u2"]) == 9
    assert all(len(set(items)) == len(items) > 2 for items in found.values())


def test_kill_9_of_the_whole_job_then_the_same_command(
    calm: tuple[Path, str], tmp_path: Path
) -> None:
    recipe = str(write_recipe(tmp_path))
    job = start("run", recipe)
    # Killed when the second checkpoint of the training stage has been committed.
    wait_for(lambda: len(checkpoints(tmp_path / "run", "train")) > 1, job=job)
    kill_everything(job)
    output = finish(start("run", recipe))
    assert "resuming from step" in output
    for stage in ("train", "align"):
        assert losses(tmp_path / "run", stage) == losses(calm[0] / "run", stage)
    assert measured(tmp_path / "run") == measured(calm[0] / "run")


def test_kill_9_of_one_worker_restarts_the_group(calm: tuple[Path, str], tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    job = start("run", recipe, "--until", "train")
    wait_for(lambda: checkpoints(tmp_path / "run", "train"), job=job)
    kill_one_worker(job)
    output = finish(job)
    assert "restarting from the newest checkpoint, attempt 2 of 4" in output
    assert losses(tmp_path / "run", "train") == losses(calm[0] / "run", "train")
