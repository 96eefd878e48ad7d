"""The shape of the code: import rule, empty package files, names that resolve to us."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "configs": set[str](),
    "models": {"configs"},
    "data_loaders": {"models", "configs"},
    "sharding": {"models", "configs"},
    "trainer": {"sharding", "data_loaders", "models", "configs"},
    "launch": {"trainer", "sharding", "data_loaders", "models", "configs"},
}
DEPENDENCIES = {
    "click", "deepspeed", "fsspec", "logging", "matplotlib", "numpy", "pyarrow", "pydantic", "ray",
    "tensorboard", "torch", "torchrec", "typing", "yaml",
}  # fmt: skip
BANNED = {
    "configs": {"torch", "ray", "numpy", "pyarrow", "deepspeed", "torchrec"},
    "models": {"torch.distributed", "ray", "torchrec", "deepspeed"},
}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def begins_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_follow_the_arrows(package: str) -> None:
    forbidden = {*MAY_IMPORT, "tests"} - MAY_IMPORT[package] - {package}
    forbidden |= BANNED.get(package, set())
    broken = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] == package
        for name in sorted(imports(path))
        if any(begins_with(name, wrong) for wrong in forbidden)
    ]
    assert not broken


def test_package_files_are_empty() -> None:
    filled = [str(path) for path in SOURCES if path.name == "__init__.py" and path.read_text()]
    assert not filled


def test_no_file_is_named_after_a_dependency() -> None:
    assert not [str(path) for path in SOURCES if path.stem in DEPENDENCIES]


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in SOURCES:
        text = path.read_text()
        if text.count("\n") > 400:
            long.append(str(path.relative_to(ROOT)))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.name} has {lines} lines")
    assert not long


def test_pyproject_lists_every_package_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in SOURCES
        if path.name == "__init__.py"
    }
    assert set(project["tool"]["setuptools"]["packages"]) == on_disk
    unlisted = {path.parent for path in SOURCES} - {ROOT / p.replace(".", "/") for p in on_disk}
    assert not unlisted


def test_package_data_covers_recipes_and_kernels() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    shipped = {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    wanted = {
        path
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert wanted <= shipped


def test_generic_package_names_resolve_to_ours() -> None:
    for package in MAY_IMPORT:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin == str(ROOT / package / "__init__.py")


def test_configs_load_without_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, configs\n"
        "for module in pkgutil.walk_packages(configs.__path__, 'configs.'):\n"
        "    importlib.import_module(module.name)\n"
        "print([name for name in ('torch', 'ray', 'numpy', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
