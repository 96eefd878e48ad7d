"""The locks are closed and agree; the installer chooses well and does nothing twice."""

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch import install
from launch.doctor import read_lock

PROJECT = tomllib.loads((install.ROOT / "pyproject.toml").read_text())
BASE, CPU, CUDA, DEV = (
    read_lock(install.LOCKS / f"{name}.lock.txt") for name in ("base", "cpu", "cuda", "dev")
)
NOT_NEEDED = {"cpu": {"fbgemm-gpu"}, "cuda": set[str]()}
"""torchrec demands the CUDA build by name; the CPU lock has fbgemm-gpu-cpu in its place."""


def unmet(lock: dict[str, str], device: str) -> list[str]:
    """Requirements of the locked (and here installed) packages that the lock does not meet."""
    problems = []
    for name in lock:
        for text in importlib.metadata.requires(name) or []:
            need = Requirement(text)
            wanted = canonicalize_name(need.name)
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            if wanted in NOT_NEEDED[device]:
                continue
            if wanted not in lock or not need.specifier.contains(lock[wanted], prereleases=True):
                problems.append(f"{name} needs {text}, locked: {lock.get(wanted)}")
    return problems


def test_the_cpu_lock_is_closed() -> None:
    assert not unmet(CPU, "cpu")


def test_dev_tools_need_nothing_beyond_the_locks() -> None:
    assert not [problem for problem in unmet(CPU | DEV, "cpu") if problem.split()[0] in DEV]


def test_ray_has_what_its_extras_need() -> None:
    for text in importlib.metadata.requires("ray") or []:
        need = Requirement(text)
        for extra in ("data", "default", "train"):
            if need.marker and need.marker.evaluate({"extra": extra}):
                assert need.specifier.contains(CPU[canonicalize_name(need.name)])


def test_both_devices_share_the_trio() -> None:
    assert CPU["torch"] == CUDA["torch"] + "+cpu"
    assert CPU["fbgemm-gpu-cpu"] == CUDA["fbgemm-gpu"]
    assert {"torchrec", "deepspeed", "ray"} <= set(BASE)
    assert "fbgemm-gpu" not in CPU and "fbgemm-gpu-cpu" not in CUDA


@pytest.mark.parametrize("lock", [CPU, CUDA])
def test_what_we_import_is_locked(lock: dict[str, str]) -> None:
    for text in PROJECT["project"]["dependencies"]:
        need = Requirement(text)
        assert need.specifier.contains(lock[canonicalize_name(need.name)])


def test_locks_are_exact_and_name_no_place() -> None:
    for path in install.LOCKS.glob("*.lock.txt"):
        for line in path.read_text().splitlines():
            assert re.fullmatch(r"#.*|-r base\.lock\.txt|[a-z0-9-]+==[0-9A-Za-z.+]+", line), line
    for path in (install.ROOT / "Makefile", Path(install.__file__)):
        assert "://" not in path.read_text()


def test_device_follows_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: something'\n")
    tool.chmod(0o755)
    assert install.choose_device("auto") == "cuda"
    tool.write_text("#!/bin/sh\necho no driver >&2\nexit 9\n")
    assert install.choose_device("auto") == "cpu"
    assert install.choose_device("cuda") == "cuda"
    with pytest.raises(install.InstallError, match="auto, cpu, cuda"):
        install.choose_device("gpu")


def test_other_pythons_and_missing_compilers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(install.InstallError, match=r"Python 3\.11 is needed, this is 3\.12"):
        install.check_python((3, 12))
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(install.InstallError, match="apt-get install g"):
        install.check_compiler()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands that the installer would run, on an environment of its own."""
    seen: list[str] = []
    monkeypatch.setattr(install, "VENV", tmp_path / "venv")
    monkeypatch.setattr(install, "make_venv", lambda path: path.mkdir(exist_ok=True))
    monkeypatch.setattr(install, "run", lambda command, what: seen.append(what))
    monkeypatch.setenv(install.DEVICE_VARIABLE, "cpu")
    monkeypatch.delenv(install.INDEX_VARIABLE, raising=False)
    return seen


def test_a_second_install_runs_nothing(commands: list[str]) -> None:
    install.install(dev=False)
    assert [c for c in commands if "torch==2.13.0+cpu" in c] and "preparing" in commands[-1]
    commands.clear()
    install.install(dev=False)
    assert not commands
    install.install(dev=True)
    assert len(commands) == 1 and "dev.lock.txt" in commands[0]
    commands.clear()
    install.install(dev=False)
    install.install(dev=True)
    assert not commands
    (install.VENV / install.STAMP).write_text('{"runtime"')
    install.install(dev=False)
    assert commands


def test_a_change_of_device_starts_from_nothing(
    commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install.install(dev=True)
    (install.VENV / "fbgemm of the other device").touch()
    commands.clear()
    monkeypatch.setenv(install.DEVICE_VARIABLE, "cuda")
    install.install(dev=True)
    assert any("cuda.lock.txt" in command for command in commands)
    assert any("dev.lock.txt" in command for command in commands)
    assert [path.name for path in install.VENV.iterdir()] == [install.STAMP]


def test_a_missing_build_of_torch_names_the_variable(
    commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], what: str) -> None:
        raise install.InstallError(what)

    monkeypatch.setattr(install, "run", fail)
    with pytest.raises(install.InstallError, match=install.INDEX_VARIABLE):
        install.install(dev=False)
    assert "runtime" not in install.read_stamp(install.VENV / install.STAMP)


def test_the_index_variable_reaches_pip(
    commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(install.INDEX_VARIABLE, "file:///somewhere")
    install.install(dev=False)
    assert "--index-url file:///somewhere torch==" in commands[0]
    assert "somewhere" not in commands[1]


def test_the_stamp_of_this_environment_is_valid_json_if_there() -> None:
    assert isinstance(install.read_stamp(install.VENV / install.STAMP), dict)
    assert install.read_stamp(Path("/nonexistent")) == {}
    assert json.dumps(install.fingerprint(["cpu.lock.txt"], "cpu"))
