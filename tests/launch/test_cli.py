"""The command line: light to start, one sentence for mistakes, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from configs.load import load_recipe
from configs.recipe import STAGES
from launch import cli
from launch import run as stages
from launch.user_errors import BusyError, GaveUpError


def tandem(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def test_help_lists_commands_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom launch.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print('HEAVY', [m for m in ('torch', 'ray', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for command in ("run", *STAGES, "show-config", "plan", "data", "doctor", "submit"):
        assert f"\n  {command} " in done.stdout


def test_every_stage_has_a_command() -> None:
    assert set(STAGES) <= set(cli.main.commands)
    assert [name for name in cli.main.commands if name in STAGES] == list(STAGES)


def test_a_users_mistake_is_one_sentence_and_exit_2() -> None:
    result = tandem("run", "quickstart", "model.widht=3")
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith("error: model.widht=3 (override)")
    assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1


def test_debug_shows_the_traceback_of_a_mistake() -> None:
    result = tandem("run", "quickstart", "model.widht=3", "--debug")
    assert result.exit_code == 1 and isinstance(result.exception, ValueError)


def test_the_unexpected_is_a_traceback_and_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise RuntimeError("not the user's fault")

    monkeypatch.setattr(stages, "run", fail)
    result = tandem("run", "quickstart")
    assert result.exit_code == 1 and isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize(
    ("error", "status"), [(GaveUpError("it died 3 times"), 1), (BusyError("it is busy"), 75)]
)
def test_what_may_succeed_later_or_failed_too_often_is_a_sentence(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr(stages, "run", fail)
    result = tandem("run", "quickstart")
    assert result.exit_code == status and result.stderr == f"error: {error}\n"


def test_arguments_reach_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(stages, "run", lambda loaded, **settings: calls.append((loaded, settings)))
    arguments = ["run", "quickstart", "seed=9", "--until", "train", "--from", "prepare", "--force"]
    assert tandem(*arguments).exit_code == 0
    assert tandem("align", "quickstart", "seed=9").exit_code == 0
    (whole, settings), (_, alone) = calls
    assert whole.recipe == load_recipe("quickstart", ["seed=9"]).recipe
    assert settings == {"until": "train", "from_": "prepare", "force": True}
    assert alone == {"only": "align", "force": False}


def test_unknown_stage_is_a_usage_error() -> None:
    assert tandem("run", "quickstart", "--until", "tran").exit_code == 2


def test_show_config_prints_a_recipe_that_loads_equal(tmp_path: Path) -> None:
    result = tandem("show-config", "quickstart", "model.num_layers=5")
    assert result.exit_code == 0 and "# override" in result.stdout
    path = tmp_path / "shown.yaml"
    path.write_text(result.stdout)
    assert load_recipe(path).recipe == load_recipe("quickstart", ["model.num_layers=5"]).recipe


def test_plan_needs_no_data_when_rows_are_given(tmp_path: Path) -> None:
    output = f"output={tmp_path}"
    result = tandem("plan", "quickstart", output, "--rows", "item=1_000_001", "--world-size", "16")
    assert result.exit_code == 0
    assert "1,000,001" in result.stdout and "ranks 0-14: 62,501" in result.stdout
    result = tandem("plan", "quickstart", output)
    assert result.exit_code == 2 and "--rows item=N" in result.stderr
    result = tandem("plan", "quickstart", output, "--rows", "items=9")
    assert result.exit_code == 2 and "must read TABLE=N" in result.stderr


def test_plan_prints_the_plan_and_nothing_else(tmp_path: Path) -> None:
    command = ["plan", "quickstart", f"output={tmp_path}", "--rows", "item=1001"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *command], capture_output=True, text=True, check=True
    )
    assert done.stderr == "" and done.stdout.startswith("table ")


def test_data_list_shows_addresses_and_mirrors() -> None:
    result = tandem("data", "list")
    assert result.exit_code == 0
    assert "ml-100k" in result.stdout and "mirror: package recbole==1.2.1" in result.stdout


def test_data_get_refuses_unknown_names(tmp_path: Path) -> None:
    result = tandem("data", "get", "ml-2m", "--to", str(tmp_path))
    assert result.exit_code == 2 and "ml-100k" in result.stderr


def test_version() -> None:
    result = tandem("--version")
    assert result.exit_code == 0 and result.stdout.startswith("tandem, version ")
