"""`tandem checkpoint`: lists, verifies, inspects and exports what real ranks saved."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from launch import cli
from sharding.checkpoint import CheckpointStore
from sharding.checkpoint_tensors import CheckpointTensors
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, make_policy, train


def tandem(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["checkpoint", *arguments])


def save_two(root: str) -> None:
    policy = make_policy(current_context("cpu"), Settings())
    for store in ("newest", "best"):
        train(policy, 1)
        recipe = {"name": "small", "model": {"kind": "hstu"}, "seed": 4}
        checkpoints = CheckpointStore(f"{root}/checkpoints/train-abc/{store}", 2, policy.ctx)
        checkpoints.save(policy, policy.step, {}, recipe, {"data": "abc"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("run")
    run_ranks(2, save_two, str(root))
    unfinished = root / "checkpoints/train-abc/newest/step-00000009-0000000000000001"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half")
    return root


def test_a_run_lists_all_its_stores(run: Path) -> None:
    lines = tandem("list", str(run)).stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("checkpoints/train-abc/best/step-00000002-")
    assert "  step 2, 20" in lines[0] and "2 ranks" in lines[0]
    assert [line.split("  ")[1] for line in lines[1:]][1].startswith("unfinished")
    store = tandem("list", str(run / "checkpoints/train-abc/best")).stdout
    assert store.splitlines() == [lines[0].removeprefix("checkpoints/train-abc/best/")]


def test_what_is_not_there_is_said(run: Path, tmp_path: Path) -> None:
    for command in ("list", "verify", "inspect"):
        result = tandem(command, str(tmp_path))
        assert result.exit_code == 2 and "there is no checkpoint in or below" in result.stderr
    result = tandem("inspect", str(run))
    assert result.exit_code == 2 and "name one of them" in result.stderr


def test_a_checkpoint_is_described_and_exported(run: Path, tmp_path: Path) -> None:
    best = str(run / "checkpoints/train-abc/best")
    text = tandem("inspect", best).stdout
    assert "recipe small, model hstu, seed 4" in text and "data: abc" in text
    [line] = [line for line in text.splitlines() if " tables/item.weight  " in line]
    assert "float32" in line and line.split()[2] == "2"  # two ranks' pieces
    done = tandem("export", best, "--to", str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
    files = done.stdout.split()
    assert files[-3:] == [
        "model-00001-of-00001.safetensors",
        "recipe.json",
        "model.safetensors.index.json",
    ]
    assert "tables.item.weight" in load_file(tmp_path / "out" / files[-3])


def test_advice_can_be_followed_where_one_store_lies_below_another(
    run: Path, tmp_path: Path
) -> None:
    """As an aligned run's `newest` has the references that belong to its checkpoints."""
    stores = run / "checkpoints/train-abc"
    newest = Path(shutil.copytree(stores / "newest", tmp_path / "newest"))
    shutil.copytree(stores / "best", newest / "reference")
    refused = tandem("inspect", str(tmp_path)).stderr
    assert "the checkpoints of 2 stores; name one of them" in refused
    for place, step in ((refused.split("such as ")[1].strip(), 1), (f"{newest}/reference", 2)):
        shown = tandem("inspect", place)
        assert shown.exit_code == 0 and f"\nstep {step}, 20" in shown.stdout, shown.stderr


def test_what_a_file_says_commands_no_terminal(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "\x1b[2J\x1b]0;evil\x07"
    monkeypatch.setattr(CheckpointTensors, "recipe", lambda _: {"name": evil, "seed": 1})
    shown = tandem("inspect", str(run / "checkpoints/train-abc/best"))
    assert shown.exit_code == 0 and "\x1b" not in shown.stdout
    assert "'recipe \\x1b[2J\\x1b]0;evil\\x07, model None, seed 1'" in shown.stdout


def test_damage_is_found_and_exits_2(run: Path) -> None:
    good = tandem("verify", str(run))
    assert good.exit_code == 0 and good.stdout.count(": whole, ") == 2
    assert good.stdout.count(": unfinished, passed over") == 1
    file = next((run / "checkpoints/train-abc/best").glob("*/*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    bad = tandem("verify", str(run))
    assert bad.exit_code == 2 and bad.stdout.count(": DAMAGED: ") == 1
    assert f"{file.name} is damaged" in bad.stdout
    assert "1 of 2 checkpoints are damaged" in bad.stderr
    named = tandem("export", str(file.parent), "--to", str(run / "out"))
    assert named.exit_code == 2 and "is damaged" in named.stderr


def test_a_store_in_which_nothing_is_whole_is_not_fine(run: Path) -> None:
    for manifest in run.rglob("MANIFEST.json"):
        manifest.unlink()
    lost = tandem("verify", str(run))
    assert lost.exit_code == 2 and "holds no finished checkpoint" in lost.stderr


@pytest.mark.parametrize("size", ["inf", "nan", "1e300"])
def test_a_size_that_no_file_has_is_refused(size: str, run: Path) -> None:
    place = str(run / "checkpoints/train-abc/best")
    refused = tandem("export", place, "--to", str(run / "out"), "--max-file-gib", size)
    assert refused.exit_code == 2 and "is no size of a file" in refused.stderr
    assert not (run / "out").exists()
