"""The bench of checkpoints measures, through the command, and notices what is loaded wrong."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.cli import main
from tests.harness import run_ranks
from trainer.bench.checkpoint import Stalls


def bench(directory: str) -> str:
    arguments = ["bench", "checkpoint", "--output", directory, "--threads", "1", "--items", "500"]
    sizes = ["--width", "8", "--batch", "8", "--repeats", "2"]
    result = CliRunner().invoke(main, [*arguments, *sizes], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_bench_checkpoint_leaves_tables_and_json(tmp_path: Path) -> None:
    # A process of its own: the bench makes a process group, and DeepSpeed keeps it.
    [output] = run_ranks(1, bench, str(tmp_path))
    assert "plain GB/s" in output and "stall ms" in output
    found = json.loads((tmp_path / "checkpoint.json").read_text())
    assert all(value > 0 for value in found["speeds"].values())
    assert found["speeds"]["num_bytes"] > 500 * 8 * 4
    assert all(value > 0 for value in found["stalls"].values())


def test_a_share_is_of_the_steps_that_a_save_lasts() -> None:
    stalls = Stalls(step=0.1, step_beside_a_save=0.125, stall=0.05, written=1.0)
    assert stalls.steps_a_save == 8 and stalls.share == pytest.approx(0.05)


def test_what_is_loaded_wrong_is_noticed(tmp_path: Path) -> None:
    def lying(directory: str) -> str:
        from sharding import checkpoint_state

        honest = checkpoint_state.restore_training_state

        def skewed(model, state):  # type: ignore[no-untyped-def]
            for table in model.tables.state_dict().values():
                table.local_shards()[0].tensor.add_(1)
            restored = {k: v for k, v in state.items() if not k.startswith("tables/")}
            honest(model, restored)

        checkpoint_state.restore_training_state = skewed
        try:
            bench(directory)
        except Exception as error:  # noqa: BLE001 - whatever kind it is, it must be noticed
            return str(error) or type(error).__name__
        return "nothing"

    assert run_ranks(1, lying, str(tmp_path))[0] != "nothing"
