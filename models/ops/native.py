"""Builds and loads the C++ kernels of `csrc/` for this machine; the reference runs without them.

The library is compiled once per (sources, flags, compiler, processor) into the user's cache folder
and renamed into place, so that any number of ranks may build at the same moment. It has a plain C
interface over raw pointers and includes no torch headers: it compiles in seconds and fits every
torch version.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

_SOURCE_DIR = Path(__file__).parent / "csrc"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    # Safe parts of -ffast-math: NaN must survive, because a NaN loss is what stops a bad step.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
_COMPILE_TIMEOUT_S = 300


def build() -> Path:
    """Compile the kernels unless this machine's library is cached; the library's path.

    Raises ValueError when there is no C++ compiler, it fails, or the cache is not safe to use.
    """
    compiler = _compiler()
    library = _cache_dir() / f"kernels-{_fingerprint(compiler)}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        sources = sorted(str(path) for path in _SOURCE_DIR.glob("*.cpp"))
        command = [compiler, *_FLAGS, *sources, "-o", str(built)]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S
        )
        if done.returncode != 0:
            raise ValueError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        os.replace(built, library)  # atomic: other ranks see all of it or none
    return library


def native_available() -> bool:
    """Whether the kernels can be used here; builds them on the first call."""
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None, with one warning, where they cannot be built."""
    try:
        return ctypes.CDLL(str(build()))
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            "the native kernels are not available, the plain PyTorch versions run instead and are "
            f"several times slower; install g++ or set CXX to a C++ compiler ({error})",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def call(function: str, *arguments: Tensor | float | None) -> None:
    """Call a kernel: tensors are passed as pointers (None as null), ints as 64, floats as 32 bit.

    Tensors must live on the CPU with the dtype and layout that the kernel states; the number of
    threads is the kernel's own argument (``torch.get_num_threads()``).
    """
    loaded = library()
    assert loaded is not None, "call native_available() first"
    entry = loaded[function]
    entry.restype = None
    entry(*(_as_c(argument) for argument in arguments))


def runs_native(*tensors: Tensor) -> bool:
    """Whether a kernel can take these floating tensors: on the CPU and float32 or bfloat16."""
    dtypes = (torch.float32, torch.bfloat16)
    return all(x.device.type == "cpu" and x.dtype in dtypes for x in tensors) and native_available()


def token_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` [T, ...] float32 with contiguous rows, and the stride of a token.

    A slice of a wider matrix (such as q out of the joint projection) is passed without a copy.
    """
    inner_is_contiguous = x.shape[0] == 0 or x[0].is_contiguous()
    x = x if inner_is_contiguous else x.contiguous()
    return x, x.stride(0)


def _as_c(argument: Tensor | float | None) -> object:
    if argument is None:
        return ctypes.c_void_p()
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    raise ValueError("no C++ compiler found")


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(_SOURCE_DIR.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, timeout=60
    ).stdout
    digest.update(version + " ".join(_FLAGS).encode() + _processor().encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on; a cache in a shared home serves unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return platform.machine() + "\n".join(sorted(kept))


def _cache_dir() -> Path:
    """Private folder for code that gets loaded: nobody else may be able to write into it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "tandem" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ValueError(
            f"{folder} must belong to you and be writable by nobody else: run chmod 700 {folder}"
        )
    return folder
