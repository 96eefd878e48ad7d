"""What of a recipe's stages is run, skipped, refused, resumed or discarded; with real stages."""

import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from configs import storage
from configs.cluster import ClusterConfig
from configs.layout import RunLayout, read_record
from configs.load import load_recipe
from configs.recipe import Recipe
from launch import output_lock
from launch import run as run_module
from launch.cluster import connect
from launch.run import run
from launch.stage_inputs import prepare_settings
from launch.stages import GRAPH, StageContext
from launch.supervisor import SUPERVISED
from sharding.checkpoint_manifest import CheckpointFile, build_manifest, write_manifest
from tests.integration.jobs import write_recipe


class Job:
    """A recipe on disk, run in this process."""

    def __init__(self, directory: Path, output: pytest.CaptureFixture[str]) -> None:
        self.log = directory / "events.csv"
        self._recipe, self._output = write_recipe(directory), output
        self.layout = RunLayout(str(directory / "run"))
        self.record = Path(self.layout.stage_record("prepare"))

    def run(self, *overrides: str, **choice: Any) -> str:
        """What the run printed."""
        self._output.readouterr()
        run(load_recipe(self._recipe, overrides), **choice)
        return self._output.readouterr().out

    def mark(self) -> Path:
        """A checkpoint that an interrupted stage would go on from."""
        fingerprint = storage.read_json(str(self.record))["fingerprint"]
        mark = Path(self.layout.checkpoints("prepare", fingerprint)) / "mark"
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        return mark


@pytest.fixture(scope="module")
def embedded() -> Iterator[None]:
    """One Ray for all runs: each would start and end its own."""
    with connect(ClusterConfig()), mock.patch("launch.cluster.connect", lambda _: nullcontext()):
        yield


@pytest.fixture
def job(embedded: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Job:
    return Job(tmp_path, capfd)


def test_a_stage_runs_once_until_something_it_depends_on_changes(job: Job) -> None:
    wrong = "data.source.columns.item=itm"
    with pytest.raises(ValueError, match="'itm' is not a column"):
        job.run(wrong, until="prepare")
    assert not job.record.exists()  # a stage that failed has not run

    assert "[1/6] prepare: done in" in job.run(until="prepare")
    first = job.record.read_bytes()
    assert "[1/6] prepare: unchanged, skipped" in job.run(until="prepare")
    # Settings that it does not read do not matter to it.
    assert "skipped" in job.run("model.num_layers=3", "training.epochs=1", only="prepare")
    assert job.record.read_bytes() == first

    stale = r"stage 'train' needs 'prepare', which has not run with these settings: run `tandem run"
    for override in ("data.shards.num_shards=3", "data.cleaning.item_core=2", wrong):
        with pytest.raises(ValueError, match=stale):
            job.run(override, only="train")
    manifest = Path(job.layout.data) / "manifest.json"
    manifest.rename(manifest.with_suffix(".away"))
    with pytest.raises(ValueError, match=stale):  # what it left behind is gone
        job.run(only="train")
    manifest.with_suffix(".away").rename(manifest)
    with pytest.raises(ValueError, match=r"stage 'evaluate' needs 'train', which has not run"):
        job.run(only="evaluate")
    job.log.write_text(job.log.read_text() + "u1,i1,1700000000,5\n")
    with pytest.raises(ValueError, match=stale):  # the log has grown
        job.run(only="train")


def test_a_prepare_that_fails_costs_nothing_of_the_one_before(job: Job) -> None:
    job.run(until="prepare")
    record = job.record.read_bytes()
    strict = "data.cleaning.min_rating=9"
    with pytest.raises(ValueError, match="relax data.cleaning"):
        job.run(strict, until="prepare")
    with pytest.raises(ValueError, match="stage 'train' needs 'prepare'"):
        job.run(strict, only="train")
    assert job.record.read_bytes() == record
    assert "prepare: unchanged, skipped" in job.run(until="prepare")
    # As a kill between new data and their record leaves it: the record is not of what lies there.
    other = storage.read_sealed(str(job.record))
    other["outputs"]["data"] = "0" * 64
    storage.write_sealed(str(job.record), other)
    with pytest.raises(ValueError, match="stage 'train' needs 'prepare'"):
        job.run(only="train")


def test_interrupted_goes_on_from_and_force_begin_anew(job: Job) -> None:
    job.run(until="prepare")
    mark = job.mark()
    job.record.unlink()  # as a kill leaves it: work done, no record
    assert "[1/6] prepare: done in" in job.run(until="prepare", from_="prepare")
    assert mark.exists()  # --from resumes what had not finished
    assert "done in" in job.run(until="prepare", from_="prepare")
    assert not mark.exists()  # … and begins anew what had
    job.mark()
    job.record.unlink()
    assert "done in" in job.run(only="prepare", force=True)
    assert not mark.exists() and job.record.exists()


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"until": "tokenize"}, "recipe 'tiny' has no stage 'tokenize': its stages are"),
        ({"until": "train", "from_": "evaluate"}, "--from evaluate comes after --until train"),
    ],
)
def test_choices_that_make_no_sense(job: Job, choice: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        job.run(**choice)


def test_a_recipe_without_alignment_has_no_align(job: Job) -> None:
    with pytest.raises(ValueError, match="has no stage 'align'"):
        job.run("alignment=null", only="align")


def stages_run(printed: str) -> list[str]:
    """Names of the stages that did not skip."""
    lines = [line for line in printed.splitlines() if ": done in" in line]
    return [line.split("] ")[1].split(":")[0] for line in lines]


def write_checkpoint(store: str, recipe: Recipe) -> dict[str, Any]:
    """A checkpoint of two files, the same whenever it is written."""
    name, files = f"step-{1:08d}-{1:016x}", []
    storage.write_json(storage.join(store, name, "recipe.json"), recipe.model_dump(mode="json"))
    url = storage.join(store, name)
    for path in ("state.json", "__0_0.distcp"):
        storage.write_bytes(storage.join(url, path), data := path.encode())
        digest = storage.sha256_bytes(data)
        files.append(CheckpointFile(path=path, bytes=len(data), sha256=digest))
    content = {"name": name, "step": 1, "created": 0.0, "world_size": 1, "files": tuple(files)}
    manifest = build_manifest(**content, versions={}, fingerprints={})
    write_manifest(url, manifest)
    return {"url": url, "hash": manifest.fingerprint, "step": 1}


@pytest.fixture
def stubbed(job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The graph with stages that only leave files: what runs when is the same, and quick."""
    graph = dict(GRAPH)

    def leave(context: StageContext) -> dict[str, Any]:
        done, layout = context.done, context.layout
        if "train" in done or "prepare" not in done:
            for url in (layout.results, layout.recommendations, f"{layout.data}/manifest.json"):
                storage.write_json(url, {})
        aligned = context.name == "align"
        store = layout.checkpoints("align" if aligned else "train", context.fingerprint)
        checkpoint = write_checkpoint(store, context.recipe) if "prepare" in done else {}
        return {
            "data": "d",
            "settings": prepare_settings(context.recipe),
            "url": layout.data,
            "checkpoint": checkpoint,
            "metrics": layout.metrics("train", "x"),
            "pairs": None,
            "alarms": [],
            "results": layout.results,
            "recommendations": layout.recommendations,
            "report": layout.results,
        }

    for name, stage in graph.items():
        check = None if name == "prepare" else stage.check
        graph[name] = replace(stage, run=leave, needs_ray=False, check=check)
    monkeypatch.setattr(run_module, "GRAPH", graph)
    monkeypatch.setattr(run_module._Run, "_show", lambda self: None)
    return job


def test_settings_that_change_no_number_train_nothing_anew(stubbed: Job) -> None:
    assert stages_run(stubbed.run())[:3] == ["prepare", "train", "align"]
    for override in (
        "evaluation.ks=[1,5,10,20]",
        "evaluation.head_share=0.3",
        "evaluation.users_per_batch=64",
        "data.loader.prefetch=4",
        "training.log_every_steps=50",
        "alignment.log_every_steps=50",
        "training.checkpoint.keep=5",
    ):
        assert not {"prepare", "train", "align"} & set(stages_run(stubbed.run(override))), override
    guarded = "alignment.guardrails.limits=[{metric: hr@20, max_drop: 0.1}]"
    ran = stages_run(stubbed.run("evaluation.ks=[1,5,10,20]", guarded))
    assert "align" in ran and "train" not in ran
    assert "train" in stages_run(stubbed.run("evaluation.filter_seen=false"))
    assert "train" in stages_run(stubbed.run("training.epochs=3"))


def test_a_training_whose_checkpoint_is_not_whole_runs_again(stubbed: Job) -> None:
    stubbed.run()
    train = read_record(stubbed.layout.stage_record("train"))
    place = Path(train["outputs"]["checkpoint"]["url"])
    kept = place.parent / "mark"  # as an earlier checkpoint, which is whole
    for name, damage, told in (
        ("__0_0.distcp", b"short", "__0_0.distcp has 5 bytes instead of 12"),
        ("state.json", None, "state.json is missing"),
        ("MANIFEST.json", None, "MANIFEST.json is missing"),
        ("MANIFEST.json", b"{}", "its MANIFEST.json is wrong at"),
    ):
        assert not stages_run(stubbed.run())
        kept.touch()
        file = place / name
        file.unlink() if damage is None else file.write_bytes(damage)
        with pytest.raises(ValueError, match="stage 'evaluate' needs 'train'"):
            stubbed.run(only="evaluate")
        printed = stubbed.run()
        assert stages_run(printed)[0] == "train" and told in printed, printed
        assert kept.exists()  # it goes on; nothing is discarded


def test_a_run_that_was_moved_or_copied_is_its_own(stubbed: Job, tmp_path: Path) -> None:
    stubbed.run()
    moved, copied = tmp_path / "moved", tmp_path / "copied"
    Path(stubbed.layout.root).rename(moved)
    assert not set(stages_run(stubbed.run(f"output={moved}"))) - {"report"}
    shutil.copytree(moved, copied)
    shutil.rmtree(moved / "checkpoints")  # the copy needs nothing of it
    assert not set(stages_run(stubbed.run(f"output={copied}"))) - {"report"}
    for stage in ("train", "align"):
        outputs = read_record(RunLayout(str(copied)).stage_record(stage))["outputs"]
        assert outputs["checkpoint"]["url"].startswith(f"{copied}/checkpoints/{stage}-")


def test_an_alignment_whose_pairs_were_deleted_writes_them_again(stubbed: Job) -> None:
    stubbed.run()
    url = stubbed.layout.stage_record("align")
    record = storage.read_sealed(url)
    record["outputs"]["pairs"] = {"url": stubbed.layout.pairs("gone")}
    storage.write_sealed(url, record)
    assert stages_run(stubbed.run())[0] == "align"


def test_force_reaches_no_further_back_than_from(stubbed: Job) -> None:
    stubbed.run()
    ran = stages_run(stubbed.run(from_="evaluate", force=True))
    assert ran == ["evaluate", "recommend", "report"]
    assert stages_run(stubbed.run(force=True))[:2] == ["prepare", "train"]


def grow(job: Job) -> None:
    job.log.write_text(job.log.read_text() + "u1,i1,1700000000,5\n")


def interrupt(job: Job, *stages: str) -> None:
    """As a kill leaves them: checkpoints, and no record."""
    for name in stages:
        Path(job.layout.stage_record(name)).unlink()


def test_an_interrupted_training_keeps_its_data_though_the_log_grows(stubbed: Job) -> None:
    stubbed.run()
    interrupt(stubbed, "train", "align")
    grow(stubbed)
    with pytest.raises(ValueError, match="stage 'train' needs 'prepare'"):
        stubbed.run("data.shards.num_shards=3", only="train")  # other settings are other data
    printed = stubbed.run()
    assert "prepare: data.source has changed; goes on with the data that were prepared" in printed
    assert "prepare" not in stages_run(printed) and "train" in stages_run(printed)
    assert stages_run(stubbed.run()) == ["prepare"]  # nothing is interrupted now
    interrupt(stubbed, "train")
    grow(stubbed)
    assert stages_run(stubbed.run("training.epochs=4"))[0] == "prepare"  # has not begun with them
    interrupt(stubbed, "train")
    grow(stubbed)
    assert stages_run(stubbed.run("training.epochs=4", from_="prepare"))[0] == "prepare"


def test_a_driver_that_dies_goes_on_with_the_data_that_its_command_prepared(
    stubbed: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first checkpoint, and after the training, too."""
    stubbed.run()
    for died_before in (["train", "align"], ["evaluate"]):
        grow(stubbed)
        monkeypatch.setenv(SUPERVISED, str(tmp_path / "-".join(died_before)))
        assert stages_run(stubbed.run())[0] == "prepare"
        interrupt(stubbed, *died_before)
        for name in ("train", "align") if "train" in died_before else ():
            storage.remove(f"{stubbed.layout.root}/checkpoints/{name}")
        grow(stubbed)
        assert stages_run(stubbed.run())[0] == died_before[0]
    monkeypatch.delenv(SUPERVISED)
    assert stages_run(stubbed.run())[0] == "prepare"


def test_what_was_prepared_outlives_its_log(stubbed: Job) -> None:
    stubbed.run()
    stubbed.log.rename(stubbed.log.with_suffix(".away"))
    printed = stubbed.run()
    assert not stages_run(printed)
    assert "names no file; check the path; goes on with the data that were prepared" in printed
    assert stages_run(stubbed.run("training.epochs=4"))[0] == "train"
    for settings, choice in (([], {"from_": "prepare"}), (["data.shards.num_shards=3"], {})):
        with pytest.raises(ValueError, match="names no file"):
            stubbed.run(*settings, **choice)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (
            ["sharding.default=row_wise"],
            ["sharding.default=column_wise"],
            "interrupted under sharding.default=row_wise (now column_wise); --force trains anew",
        ),
        (
            ["sharding.default=column_wise", "training.precision=bf16"],
            ["sharding.default=auto", "sharding.placement={item: replicated}"],
            "interrupted under sharding.default=column_wise (now auto), sharding.placement={} (now "
            "{'item': 'replicated'}), training.precision=bf16 (now fp32); --force trains anew",
        ),
    ],
)
def test_an_interrupted_training_goes_on_under_another_placement(
    stubbed: Job, before: list[str], now: list[str], told: str
) -> None:
    stubbed.run(*before)
    first = read_record(stubbed.layout.stage_record("train"))["outputs"]["checkpoint"]
    interrupt(stubbed, "train", "align")
    assert "begins at its first step" in stubbed.run(*now, "seed=99", until="train")
    interrupt(stubbed, "train")
    printed = stubbed.run(*now, until="train")
    assert told in printed and "begins at its first step" not in printed
    # Interrupted again, its newest checkpoint is of this placement, and then of a third.
    for settings in (now, ["sharding.placement={item: table_wise}"], now):
        assert read_record(stubbed.layout.stage_record("train"))["outputs"]["checkpoint"] == first
        interrupt(stubbed, "train")
        assert "begins at its first step" not in stubbed.run(*settings, until="train")
    assert read_record(stubbed.layout.stage_record("train"))["outputs"]["checkpoint"] == first
    assert not stages_run(stubbed.run(*now, until="train"))  # it is this recipe's now


def test_an_interrupted_alignment_goes_on_under_another_placement(stubbed: Job) -> None:
    stubbed.run("sharding.default=row_wise")
    first = read_record(stubbed.layout.stage_record("align"))["outputs"]["checkpoint"]
    interrupt(stubbed, "align")
    moved = "sharding.default=column_wise"
    told = (
        "train: unchanged but for sharding.default=row_wise (now column_wise): skipped, as align-"
    )
    printed = stubbed.run(moved, only="align")
    assert told in printed and "align: goes on with align-" in printed
    # Interrupted again, its newest checkpoint is of this placement, and then of a third.
    for settings in (moved, "sharding.default=replicated", moved):
        assert read_record(stubbed.layout.stage_record("align"))["outputs"]["checkpoint"] == first
        interrupt(stubbed, "align")
        printed = stubbed.run(settings, until="align")
        assert stages_run(printed) == ["align"] and "begins at its first step" not in printed
    # Another seed's, a finished one's and one that is to be trained anew are other experiments.
    assert told not in stubbed.run(moved, "seed=99", until="train")


@pytest.mark.parametrize("stage", ["train", "align"])
def test_what_was_interrupted_goes_on_moved_and_with_its_data_after_the_log_grew(
    stage: str, stubbed: Job
) -> None:
    ended = ["train", "align"][["train", "align"].index(stage) :]
    stubbed.run("sharding.default=row_wise")
    for _ in range(2):  # and so again, when its newest checkpoint is of this placement
        interrupt(stubbed, *ended)
        grow(stubbed)
        assert stages_run(stubbed.run("sharding.default=column_wise"))[0] == stage


@pytest.mark.parametrize("stage", ["train", "align"])
def test_what_went_on_with_a_training_is_forgotten_with_it(stage: str, stubbed: Job) -> None:
    first, second = "sharding.default=row_wise", "sharding.default=column_wise"
    stubbed.run(first, until=stage)
    interrupt(stubbed, stage)
    stubbed.run(second, until=stage)
    printed = stubbed.run(first, until=stage, from_="train", force=True)
    assert "under another placement is discarded with it" in printed
    assert "train" in stages_run(stubbed.run(second, until=stage))  # nothing is left of it


def test_a_finished_alignment_under_another_placement_is_another_experiment(stubbed: Job) -> None:
    stubbed.run("sharding.default=row_wise")
    moved = "sharding.default=column_wise"
    assert "unchanged but for" not in stubbed.run(moved, until="train")
    stubbed.run("sharding.default=row_wise")
    interrupt(stubbed, "align")
    assert "unchanged but for" not in stubbed.run(moved, until="train", from_="train")


def test_force_goes_on_with_no_other_training(stubbed: Job) -> None:
    stubbed.run("sharding.default=row_wise")
    printed = stubbed.run("sharding.default=column_wise", until="train")
    assert "begins at its first step, beside" in printed  # a finished one: another experiment
    interrupt(stubbed, "train")
    printed = stubbed.run("sharding.default=replicated", until="train", from_="train", force=True)
    assert "goes on with" not in printed and "begins at its first step" in printed


class DiedError(Exception):
    """The driver did."""


def test_what_begins_anew_does_so_once_however_often_the_driver_dies(
    stubbed: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubbed.run()
    monkeypatch.setenv(SUPERVISED, str(tmp_path / "begun"))
    train, kept = run_module.GRAPH["train"], list[Path]()

    def die(context: StageContext) -> dict[str, Any]:
        kept.append(Path(context.layout.checkpoints("train", context.fingerprint)) / "mark")
        assert not kept[-1].parent.exists()
        train.run(context)
        kept[-1].touch()
        raise DiedError

    monkeypatch.setitem(run_module.GRAPH, "train", replace(train, run=die))
    with pytest.raises(DiedError):
        stubbed.run(from_="train", force=True)
    monkeypatch.setitem(run_module.GRAPH, "train", train)
    rest = ["align", "evaluate", "recommend", "report"]
    assert stages_run(stubbed.run(from_="train", force=True)) == ["train", *rest]
    assert kept[0].exists()  # what the driver before did is not discarded
    assert stages_run(stubbed.run(from_="train", force=True)) == []
    # A driver that died while it discarded, its record gone and its checkpoints not yet.
    (tmp_path / "begun").write_text("discards train\n")
    Path(stubbed.layout.stage_record("train")).unlink()
    assert stages_run(stubbed.run(from_="train")) == ["train", *rest]
    assert not kept[0].exists()


def test_a_run_whose_output_another_took_ends_within_its_stage(
    stubbed: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_lock, "HEARTBEAT_S", 0.05)
    train = run_module.GRAPH["train"]

    def sleep(context: StageContext) -> dict[str, Any]:
        lock = storage.join(stubbed.layout.root, output_lock.FILE)
        rival = storage.read_json(lock) | {"token": "another", "host": "elsewhere"}
        began = time.monotonic()
        while time.monotonic() - began < 20:
            storage.write_json(lock, rival)  # again: a beat under way may have hidden it
            time.sleep(0.1)
        return train.run(context)

    monkeypatch.setitem(run_module.GRAPH, "train", replace(train, run=sleep))
    began = time.monotonic()
    with pytest.raises(ValueError, match="another run has taken over .*host elsewhere"):
        stubbed.run()
    assert time.monotonic() - began < 10
    assert not Path(stubbed.layout.stage_record("train")).exists()


def test_a_reward_that_cannot_be_imported_is_told_before_anything_runs(job: Job) -> None:
    online = "alignment={kind: grpo, rule: null, rewards: [{kind: function, path: 'no.such:one'}]}"
    with pytest.raises(ValueError, match=r"no\.such"):
        job.run(online)
    assert not job.record.exists()


def test_a_reward_model_that_is_not_there_is_told_before_anything_runs(job: Job) -> None:
    reward = "{kind: model, run: runs/nowhere, tasks: {like: 1.0}}"
    online = f"alignment={{kind: grpo, rule: null, rewards: [{{kind: hit}}, {reward}]}}"
    with pytest.raises(ValueError, match=r"alignment\.rewards\.1\.run='runs/nowhere' holds no"):
        job.run(online)
    assert not job.record.exists()


def test_a_reward_function_that_was_rewritten_is_another_alignment(
    stubbed: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "rewards_that_change.py"
    module.write_text("def mine(group):\n    return group.items\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = "{kind: function, path: 'rewards_that_change:mine'}"
    online = f"alignment={{kind: grpo, rule: null, rewards: [{reward}]}}"
    assert "align" in stages_run(stubbed.run(online))
    assert "align" not in stages_run(stubbed.run(online))
    module.write_text("def mine(group):\n    return -group.items\n")
    ran = stages_run(stubbed.run(online))
    assert "align" in ran and "train" not in ran
