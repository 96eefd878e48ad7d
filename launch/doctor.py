"""`tandem doctor`: what this machine has, what is wrong with it, and the command that mends it."""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from configs.terminal import say
from launch import address, install

GIB = 1 << 30
LEAST_DISK = 5 * GIB
LEAST_SHARED_MEMORY = 1 * GIB
STALE_LOCK_S = 600
DASHBOARD_PORT = 8265
PACKAGES = ("configs", "models", "data_loaders", "sharding", "trainer", "launch")
REINSTALL = f"rm -f .venv/{install.STAMP} && make install"


@dataclass(frozen=True)
class Finding:
    """One line of the report; a problem comes with the command that mends it."""

    name: str
    detail: str
    mend: str | None = None

    @property
    def is_problem(self) -> bool:
        """Whether something must be done."""
        return self.mend is not None


def examine() -> bool:
    """Print the report.

    Returns:
        whether all is well.
    """
    problems = 0
    for check in CHECKS:
        for finding in check():
            problems += finding.is_problem
            mark = "BAD" if finding.is_problem else "ok "
            line = f"{mark}  {finding.name:<12} {finding.detail}"
            say(line, style="red" if finding.is_problem else None)
            if finding.mend is not None:
                say(f"     {'':<12} mend: {finding.mend}", style="bold")
    say(f"{problems or 'no'} problem{'' if problems == 1 else 's'} found")
    return problems == 0


def check_python() -> Iterator[Finding]:
    """Interpreter and machine."""
    detail = f"{platform.python_version()} ({sys.executable})"
    wrong = sys.version_info[:2] != install.PYTHON_VERSION
    yield Finding("python", detail, "make PYTHON=python3.11 install" if wrong else None)
    memory = psutil.virtual_memory().total / GIB
    cores = len(os.sched_getaffinity(0))
    yield Finding("machine", f"{platform.machine()}, {cores} cores, {memory:.0f} GiB of memory")


def check_versions() -> Iterator[Finding]:
    """Installed versions against the lock of the device whose build of torch is installed."""
    device = installed_device()
    if not install.LOCKS.is_dir():
        yield Finding("versions", "not compared: no requirements/ folder beside the code")
        return
    locked = read_lock(install.LOCKS / f"{device}.lock.txt")
    wrong = [
        f"{name} {installed_version(name) or 'missing'} (locked {version})"
        for name, version in locked.items()
        if installed_version(name) != version
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if wrong[5:] else ""
        yield Finding("versions", f"{', '.join(wrong[:5])}{more}", REINSTALL)
        return
    shown = ", ".join(f"{n} {locked[n]}" for n in ("torch", "torchrec", "deepspeed", "ray"))
    yield Finding("versions", f"{len(locked)} packages as {device}.lock.txt has them ({shown})")


def installed_device() -> str:
    """`cpu` where torch is a CPU build or missing, else `cuda`."""
    version = installed_version("torch") or "+cpu"
    return "cpu" if version.endswith("+cpu") else "cuda"


def installed_version(package: str) -> str | None:
    """Version that is installed, None if the package is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_lock(path: Path) -> dict[str, str]:
    """Package → exact version of a lock file and of those it includes."""
    versions: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            versions |= read_lock(path.parent / line.removeprefix("-r ").strip())
        elif line and not line.startswith("#"):
            name, _, version = line.partition("==")
            versions[name] = version
    return versions


def check_imports() -> Iterator[Finding]:
    """Builds that do not fit each other fail when they are imported, so import them."""
    code = "import torch, fbgemm_gpu, torchrec, deepspeed, ray.data, pyarrow.parquet"
    environment = {"DS_ACCELERATOR": "cpu", **os.environ}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode == 0:
        yield Finding("imports", "torch, fbgemm, torchrec, deepspeed and ray load together")
        return
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    yield Finding("imports", lines[-1][:200], "rm -rf .venv && make install")


def check_packages() -> Iterator[Finding]:
    """Our generic package names, as a script outside the project's folder finds them."""
    found = resolve(PACKAGES)
    wrong = {name: where for name, where in found.items() if not _is_ours(name, where)}
    absent = [name for name, where in wrong.items() if where is None]
    if absent:
        yield Finding("packages", f"{', '.join(absent)} are not installed", REINSTALL)
    for name, where in wrong.items():
        if where is not None:
            yield Finding("packages", f"`import {name}` finds {where}", _mend(name, where))
    if not wrong:
        yield Finding("packages", f"{', '.join(PACKAGES)} resolve to {install.ROOT}")


def resolve(names: tuple[str, ...]) -> dict[str, str | None]:
    """Package → file that importing it would run, in a fresh interpreter in another folder."""
    code = (
        "import importlib.util as u, json, sys\n"
        "specs = {n: u.find_spec(n) for n in sys.argv[1:]}\n"
        "print(json.dumps({n: s and (s.origin or str(s.submodule_search_locations))"
        " for n, s in specs.items()}))"
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", code, *names],
            cwd=elsewhere,
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def _is_ours(name: str, where: str | None) -> bool:
    return where is not None and Path(where) == install.ROOT / name / "__init__.py"


def _mend(name: str, where: str) -> str:
    folder = Path(where).parent.parent
    if str(folder) in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        return "unset PYTHONPATH"
    owners = importlib.metadata.packages_distributions().get(name, [])
    foreign = [owner for owner in owners if owner != "tandem"]
    if foreign:
        return f"{sys.executable} -m pip uninstall {foreign[0]}"
    return f"mv {folder / name} {folder / name}.away"


def check_devices() -> Iterator[Finding]:
    """GPUs, and whether torch is the build for them."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("devices", f"{len(names)} GPUs: {', '.join(sorted(set(names)))}")
    elif torch.version.cuda is not None:
        detail = f"torch is built for CUDA {torch.version.cuda}, but sees no GPU"
        yield Finding("devices", detail, f"{install.DEVICE_VARIABLE}=cpu make install")
    elif install.choose_device("auto") == "cuda":
        yield Finding("devices", "a GPU is here, but torch is the CPU build", "make install")
    else:
        yield Finding("devices", "no GPU; CPU build of torch")


def check_native() -> Iterator[Finding]:
    """The compiler, and the kernels it builds."""
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "c++", "clang++") if _has(c)), None)
    if compiler is None:
        yield Finding("compiler", "no C++ compiler", "apt-get install g++")
        return
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    yield Finding("compiler", (version.stdout or compiler).splitlines()[0])
    from models.ops import native

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = native.native_available()
    if loaded:
        yield Finding("kernels", f"built: {native.build()}")
    else:
        reason = " ".join(str(caught[-1].message).split()) if caught else "they do not load"
        yield Finding("kernels", reason[:300], f"{sys.executable} -m launch.prebuild")


def _has(program: str | None) -> bool:
    return program is not None and shutil.which(program) is not None


def check_jit_cache() -> Iterator[Finding]:
    """Locks that a killed compilation left behind; whoever compiles next waits for them forever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    locks = stale_locks(root, time.time())
    if locks:
        names = " ".join(str(lock) for lock in locks)
        yield Finding("jit cache", f"{len(locks)} stale locks below {root}", f"rm {names}")
    else:
        yield Finding("jit cache", f"no stale locks below {root}")


def stale_locks(root: Path, now: float) -> list[Path]:
    """Lock files of torch's extension builder that are older than any compilation lasts."""
    return [p for p in sorted(root.rglob("lock")) if now - p.stat().st_mtime > STALE_LOCK_S]


def check_ray() -> Iterator[Finding]:
    """A session file that names a dead cluster, and a token that others can read."""
    session = (
        Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray/ray_current_cluster"
    )
    head = session.read_text().strip() if session.exists() else ""
    if head and not answers(head):
        yield Finding("ray", f"{session} names {head}, where nothing answers", f"rm {session}")
    else:
        yield Finding("ray", f"cluster at {head}" if head else "no cluster on this machine")
    if "RAY_ADDRESS" in os.environ:
        yield Finding(
            "ray", f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} is what cluster.address=auto joins"
        )
    if head and answers(head):
        yield from check_guard(head)
    host = head.rpartition(":")[0]
    if head and not address.is_loopback(head) and answers(f"{host}:{DASHBOARD_PORT}"):
        restart = "ray stop && RAY_AUTH_MODE=token ray start --head --dashboard-host=127.0.0.1"
        detail = f"the dashboard answers on {host}:{DASHBOARD_PORT}, beyond this machine"
        yield Finding("ray", detail, restart)
    if address.token_is_exposed():
        path = address.token_file()
        yield Finding("ray token", f"{path} can be read by other users", f"chmod 600 {path}")


def check_guard(head: str) -> Iterator[Finding]:
    """A head that does not ask for a token, or does not say."""
    from launch.joining import cluster_lets_in  # imports Ray, which may be what is wrong here

    restart = "ray stop && RAY_AUTH_MODE=token ray start --head"
    try:
        if cluster_lets_in(head):
            detail = "asks for no token: who reaches its machine runs code there"
            yield Finding("ray", f"the cluster at {head} {detail}", restart)
    except (ConnectionError, TimeoutError) as error:
        detail = f"does not say whether it asks for a token ({error})"
        yield Finding("ray", f"the cluster at {head} {detail}", restart)


def answers(head: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = head.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False


def check_space() -> Iterator[Finding]:
    """Room for checkpoints here and for Ray's object store in shared memory."""
    free = shutil.disk_usage(Path.cwd()).free
    disk = f"{free / GIB:.0f} GiB free in {Path.cwd()}"
    yield Finding("disk", disk, "df -h . # free some space" if free < LEAST_DISK else None)
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free if shared.is_dir() else 0
    mend = "mount -o remount,size=4G /dev/shm # a container: --shm-size=4g"
    detail = f"{room / GIB:.1f} GiB free in {shared}"
    yield Finding("shm", detail, mend if room < LEAST_SHARED_MEMORY else None)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_versions,
    check_imports,
    check_packages,
    check_devices,
    check_native,
    check_jit_cache,
    check_ray,
    check_space,
)
