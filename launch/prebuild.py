"""What the first run would otherwise spend minutes on, done once at install time.

Builds the native kernels, and byte-compiles the modules that a run imports. Of the 14,000 files
that the locked packages bring a run imports a third; compiling all of them, as pip does by default,
takes longer than the rest of the installation.
"""

import compileall
import importlib
import os
import pkgutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models.ops import native

PACKAGES = ("configs", "models", "data_loaders", "sharding", "trainer", "launch")
IMPORTED_LATE = (
    "deepspeed",
    "matplotlib.pyplot",
    "ray.data",
    "ray.job_submission",
    "ray.train.torch",
)
"""Dependencies that our modules import inside functions."""
RAY_PROCESSES = ("_common", "_private", "autoscaler", "dashboard", "data", "train", "util")
"""Parts of Ray that its own processes import, below its package folder."""


def main() -> int:
    """Build, import, compile; 1 with one sentence when the kernels cannot be built."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with ThreadPoolExecutor(1) as background:
        built = background.submit(native.build)
        _import_all()
        try:
            built.result()
        except ValueError as error:
            print(f"prebuild: {error}", file=sys.stderr)
            return 1
    _compile_ray()
    return 0


def _import_all() -> None:
    """Importing a module leaves its compiled form in the cache, and that of all it imports."""
    names = [
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages(
            importlib.import_module(package).__path__, prefix=f"{package}."
        )
    ]
    for name in (*names, *IMPORTED_LATE):
        importlib.import_module(name)


def _compile_ray() -> None:
    ray_folder = Path(importlib.import_module("ray").__file__ or "").parent
    for part in RAY_PROCESSES:
        compileall.compile_dir(ray_folder / part, quiet=2, workers=0)


if __name__ == "__main__":
    sys.exit(main())
