"""Building the kernels: cached, safe for many ranks at once, and replaceable by the reference."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from models.ops import native
from models.ops.dropout import keyed_dropout, keyed_dropout_reference


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tandem" / "kernels"


def test_ranks_may_build_at_once_and_the_result_is_kept(empty_cache: Path) -> None:
    code = "from models.ops import native; print(native.build())"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {rank.communicate(timeout=120)[0].strip() for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0]
    library = native.build()
    assert printed == {str(library)}
    assert [path.name for path in empty_cache.iterdir()] == [library.name]
    assert empty_cache.stat().st_mode & 0o777 == 0o700
    before = library.stat().st_mtime_ns
    assert native.build() == library
    assert library.stat().st_mtime_ns == before


def test_a_cache_that_others_can_write_is_refused(empty_cache: Path) -> None:
    empty_cache.mkdir(parents=True)
    empty_cache.chmod(0o777)
    with pytest.raises(ValueError, match="chmod 700"):
        native.build()


def test_without_a_compiler_one_warning_and_the_reference(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    native.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler found"):
            assert not native.native_available()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x, keys = torch.randn(5, 4), torch.arange(5)
            out = keyed_dropout(x, keys, 0.5, 1)
        assert torch.equal(out, keyed_dropout_reference(x, keys, 0.5, 1))
    finally:
        native.library.cache_clear()


def test_a_failing_compiler_is_reported_with_its_message(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-cxx"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho out of cheese >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(ValueError, match="out of cheese"):
        native.build()
    assert not list(empty_cache.iterdir())
