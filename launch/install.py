"""`make install`: a virtual environment with the locked versions that this machine can run.

Uses the standard library only, because it runs before anything is installed. A stamp in `.venv`
holds a hash of everything that decides what is installed; while it matches, nothing is done.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCKS = ROOT / "requirements"
STAMP = "tandem-install.json"
PYTHON_VERSION = (3, 11)
INDEX_VARIABLE = "TANDEM_TORCH_INDEX"
DEVICE_VARIABLE = "TANDEM_DEVICE"


class InstallError(Exception):
    """One sentence that says what the machine lacks and how to mend it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Install what is missing; 0 when the environment is ready, 1 with one sentence otherwise."""
    parser = argparse.ArgumentParser(prog="make install", description=__doc__)
    parser.add_argument("--dev", action="store_true", help="also linter, type checker and pytest")
    options = parser.parse_args(arguments)
    try:
        install(dev=options.dev)
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


def install(dev: bool) -> None:
    """Bring `.venv` to the locked versions; a second call finds the stamp and returns at once.

    Raises InstallError with one sentence when the machine lacks something.
    """
    check_python(sys.version_info[:2])
    device = choose_device(os.environ.get(DEVICE_VARIABLE, "auto"))
    wanted = {"runtime": fingerprint([f"{device}.lock.txt"], device)}
    if dev:
        wanted["dev"] = fingerprint(["dev.lock.txt"], device)
    done = read_stamp(VENV / STAMP)
    if wanted.items() <= done.items():
        return
    check_compiler()
    started = time.monotonic()
    if wanted["runtime"] != done.get("runtime"):
        print(
            f"install: locked versions for {device} into {VENV.name}/ (a minute or two)", flush=True
        )
        if done.get("device", device) != device:
            shutil.rmtree(VENV)  # builds for CPU and CUDA share file names and version numbers
            done = {}
        make_venv(VENV)
        done["device"] = device
        write_stamp(VENV / STAMP, done)
        install_runtime(device)
    if dev and wanted["dev"] != done.get("dev"):
        print("install: linter, type checker, pytest", flush=True)
        pip("--compile", "-r", str(LOCKS / "dev.lock.txt"))
    write_stamp(VENV / STAMP, {**done, **wanted})
    print(f"install: done in {time.monotonic() - started:.0f} s", flush=True)


def check_python(version: tuple[int, ...]) -> None:
    """Refuse an interpreter for which the locks hold no wheels."""
    if tuple(version) != PYTHON_VERSION:
        wanted = ".".join(map(str, PYTHON_VERSION))
        have = ".".join(map(str, version))
        raise InstallError(
            f"Python {wanted} is needed, this is {have}: install it "
            f"(for example `apt-get install python{wanted} python{wanted}-venv`) "
            f"and run `make PYTHON=python{wanted} …`"
        )


def check_compiler() -> None:
    """Refuse a machine that cannot build the native kernels."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise InstallError("no C++ compiler found: install one, e.g. `apt-get install g++`")


def choose_device(wish: str) -> str:
    """`cpu` or `cuda`: what `wish` says, or for `auto` whether nvidia-smi finds a GPU."""
    if wish not in ("auto", "cpu", "cuda"):
        raise InstallError(f"{DEVICE_VARIABLE}={wish!r} is not one of auto, cpu, cuda")
    if wish != "auto":
        return wish
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "cuda" if listing.returncode == 0 and "GPU" in listing.stdout else "cpu"


def fingerprint(locks: Sequence[str], device: str) -> str:
    """Hash of everything that decides what is installed and where from."""
    digest = hashlib.sha256()
    paths = [LOCKS / "base.lock.txt", *(LOCKS / name for name in locks), ROOT / "pyproject.toml"]
    for path in [*paths, *native_sources()]:
        digest.update(path.read_bytes())
    digest.update(repr((device, str(ROOT), sys.version_info[:3])).encode())
    return digest.hexdigest()


def native_sources() -> list[Path]:
    """Files whose change asks for a rebuild of the native kernels."""
    return sorted((ROOT / "models" / "ops").glob("csrc/*"))


def read_stamp(path: Path) -> dict[str, str]:
    """What an earlier install recorded; empty when there is none or it was cut short."""
    try:
        recorded = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def write_stamp(path: Path, content: dict[str, str]) -> None:
    """Record what is installed, only ever as a whole file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def make_venv(path: Path) -> None:
    """Create the environment unless a working one of the right Python is there."""
    python = path / "bin" / "python"
    probe = "import sys, pip; print(sys.version_info[:2])"
    if python.exists():
        found = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
        if found.stdout.strip() == str(PYTHON_VERSION):
            return
        shutil.rmtree(path)
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(path)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        shutil.rmtree(path, ignore_errors=True)
        raise InstallError(
            f"{sys.executable} cannot make a virtual environment: "
            "install its venv module, e.g. `apt-get install python3.11-venv`"
        )


def install_runtime(device: str) -> None:
    """Torch first, so that a missing build is known before anything else is downloaded."""
    lock = LOCKS / f"{device}.lock.txt"
    torch = next(line for line in lock.read_text().splitlines() if line.startswith("torch=="))
    index = os.environ.get(INDEX_VARIABLE)
    try:
        pip(*(["--index-url", index] if index else []), torch)
    except InstallError as error:
        raise InstallError(
            f"pip finds no {torch} (the {device} build) in the places it is configured to look; "
            f"set {INDEX_VARIABLE} to a package index that has it (README, Two commands) "
            f"and run make again"
        ) from error
    pip("-r", str(lock))
    pip("--no-build-isolation", "-e", str(ROOT))
    run([str(VENV / "bin" / "python"), "-m", "launch.prebuild"], "preparing the first run")


def pip(*arguments: str) -> None:
    """Install exactly what is named, quietly; pip's own error output is shown.

    Byte-compiling everything would double the time: launch.prebuild compiles what is used.
    """
    fixed = ["-qq", "--no-input", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", *fixed, *arguments]
    run(command, f"pip install {' '.join(arguments)}")


def run(command: list[str], what: str) -> None:
    """Run one step; its failure is one sentence below its own output."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
        raise InstallError(f"{what} failed; its message is above")


if __name__ == "__main__":
    sys.exit(main())
