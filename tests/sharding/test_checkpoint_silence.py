"""Storage that refuses or does not answer says nothing of a checkpoint: none is lost."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from configs import storage, storage_faults
from launch import cli
from sharding import block_file, checkpoint_manifest
from sharding.agreement import UnreadableError
from sharding.checkpoint import CheckpointStore
from sharding.checkpoint_manifest import MANIFEST
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, make_policy, train


class Sick:
    """Has looks at some paths fail, a number of times."""

    def __init__(self, error: Exception, ending: str, times: int) -> None:
        self._error, self._ending, self.left = error, ending, times
        self._stat, self._open = os.stat, storage.open_to_read

    def _fail(self, path: Any) -> None:
        if str(path).endswith(self._ending) and self.left:
            self.left -= 1
            raise self._error

    def stat(self, path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        self._fail(path)
        return self._stat(path, *args, **kwargs)

    def __enter__(self) -> "Sick":
        os.stat = self.stat
        return self

    def __exit__(self, *exception: object) -> None:
        os.stat = self._stat


STALE = OSError(errno.ESTALE, "Stale file handle")
NO_HANDLES = OSError(errno.EMFILE, "Too many open files")
NO_MEMORY = OSError(errno.ENOMEM, "Cannot allocate memory")
NO_ANSWER = RuntimeError("An error occurred (Teapot) when calling the GetObject operation")
"""Of a driver that raises its own kinds."""


def steps(store: CheckpointStore) -> list[int]:
    return sorted(int(name.split("-")[1]) for name in store._directory.committed())


def save_beside_silence(root: str) -> tuple[list[list[int]], list[str]]:
    """Steps that are kept after a short silence and after a long one; what resuming then says of
    that and of other wants."""
    storage_faults.WAITS_S = (0.01,) * 3  # type: ignore[assignment]
    policy = make_policy(current_context("cpu"), Settings())
    store = CheckpointStore(root, 4, policy.ctx)
    for _ in range(2):
        train(policy, 1)
        store.save(policy, policy.step, {}, {}, {})
    kept = []
    for times in (1, 100):  # a retry is enough; and no answer at all
        train(policy, 1)
        with Sick(STALE, MANIFEST, times if policy.ctx.rank == 0 else 0) as sick:
            store.save(policy, policy.step, {}, {}, {})
        assert sick.left < times or policy.ctx.rank
        kept.append(steps(store))
    sentences = []
    for error in (STALE, NO_HANDLES, NO_ANSWER, NO_MEMORY):
        store = CheckpointStore(root, 4, policy.ctx)
        kind = MemoryError if error is NO_MEMORY else UnreadableError
        with (
            Sick(error, ".distcp", 100 if policy.ctx.rank == 1 else 0),
            pytest.raises(kind) as told,
        ):
            store.newest()
        newest = store.newest()
        assert newest is not None and newest.step == 4 and store.skipped == ()
        sentences.append(str(told.value))
    return kept, sentences


def test_silence_costs_no_checkpoint(tmp_path: Path) -> None:
    answers = run_ranks(2, save_beside_silence, str(tmp_path / "store"))
    assert answers[0] == answers[1]
    kept, sentences = answers[0]
    assert kept == [[1, 2, 3], [1, 2, 3, 4]]
    assert all("rank 1: " in sentence for sentence in sentences)
    assert all("is left as it is: " in sentence for sentence in sentences[:3])
    for sentence, said in zip(
        sentences, ("did not answer", "ulimit -n", "Teapot", "Cannot allocate memory"), strict=True
    ):
        assert said in sentence


def save_without_memory(root: str) -> str:
    """What every rank is told where one has no memory to write with."""
    policy = make_policy(current_context("cpu"), Settings())
    store = CheckpointStore(root, 2, policy.ctx)
    train(policy, 1)
    store.save(policy, 1, {}, {}, {})
    write = block_file.BlockWriter.write

    def starving(self: block_file.BlockWriter, data: Any) -> int:
        if policy.ctx.rank == 1:
            raise NO_MEMORY
        return write(self, data)

    block_file.BlockWriter.write = starving  # type: ignore[method-assign]
    with pytest.raises(MemoryError) as told:
        store.save(policy, 2, {}, {}, {})
    assert len(storage.list_names(root)) == 1, "nothing of the failed save is left"
    block_file.BlockWriter.write = write  # type: ignore[method-assign]
    assert store.save(policy, 2, {}, {}, {}) == store.newest()
    return str(told.value)


def test_a_save_without_memory_is_no_full_disk(tmp_path: Path) -> None:
    sentences = run_ranks(2, save_without_memory, str(tmp_path / "store"))
    assert sentences[0] == sentences[1]
    assert "rank 1: " in sentences[0] and "earlier ones are intact" in sentences[0]
    assert "Cannot allocate memory" in sentences[0] and "space" not in sentences[0]


def save_one(root: str) -> None:
    policy = make_policy(current_context("cpu"), Settings())
    train(policy, 1)
    CheckpointStore(root, 2, policy.ctx).save(policy, 1, {}, {}, {})


@pytest.mark.parametrize("refused", [MANIFEST, "__0_0.distcp"])
def test_what_may_not_be_read_is_not_called_damaged(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "store")
    run_ranks(1, save_one, root)
    denied = PermissionError(errno.EACCES, "Permission denied")
    with Sick(denied, refused, 1000):
        listed = CliRunner().invoke(cli.main, ["checkpoint", "list", root])
        verified = CliRunner().invoke(cli.main, ["checkpoint", "verify", root])
    assert listed.exit_code == 0 and verified.exit_code == 2
    if refused == MANIFEST:
        assert "  unknown: " in listed.stdout and "grant rights there" in listed.stdout
    assert "UNKNOWN: " in verified.stdout and "grant rights there" in verified.stdout
    assert "1 of 1 checkpoints cannot be read, and 0 are damaged" in verified.stderr
    assert "DAMAGED" not in verified.stdout
    assert CliRunner().invoke(cli.main, ["checkpoint", "verify", root]).exit_code == 0
    assert checkpoint_manifest.read_manifest(*_only(root)).step == 1


def _only(root: str) -> tuple[str, str]:
    [name] = storage.list_names(root)
    return storage.join(root, name), name
