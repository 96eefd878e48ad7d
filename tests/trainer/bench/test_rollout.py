"""The bench of rollouts measures both families, through the command, and keeps what it found."""

import json
from pathlib import Path

import torch
from click.testing import CliRunner

from launch.cli import main
from tests.harness import run_ranks
from trainer.bench.rollout import PARTS


def bench(directory: str) -> str:
    arguments = ["bench", "rollout", "--output", directory, "--threads", "1", "--items", "60"]
    sizes = ["--prompts", "6", "--group", "3", "--repeats", "1"]
    result = CliRunner().invoke(main, [*arguments, *sizes], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_bench_rollout_leaves_a_table_and_json(tmp_path: Path) -> None:
    # A process of its own: the bench makes a process group, and DeepSpeed keeps it.
    [output] = run_ranks(1, bench, str(tmp_path))
    assert "plain loop" in output and "items (hstu)" in output
    found = json.loads((tmp_path / "rollout.json").read_text())
    assert [row["family"] for row in found["rollout"]] == ["items (hstu)", "semantic ids (tiger)"]
    for row in found["rollout"]:
        assert row["groups_per_s"] > 0 and row["plain_groups_per_s"] > 0
        assert set(row["seconds"]) == set(PARTS)
        assert all(seconds > 0 for seconds in row["seconds"].values())
    assert found["setting"]["group"] == 3 and found["machine"]["threads"] == 1


def test_a_wrong_loop_is_noticed(tmp_path: Path) -> None:
    def lying(directory: str) -> str:
        from trainer.bench import rollout

        honest = rollout._draw_items

        def shifted(*args):  # type: ignore[no-untyped-def]
            items, log_probs = honest(*args)
            return items, log_probs + torch.tensor(0.1)

        rollout._draw_items = shifted
        try:
            bench(directory)
        except AssertionError as error:
            return str(error)
        return "nothing"

    [said] = run_ranks(1, lying, str(tmp_path))
    assert "log-probabilities are 0.1" in said
