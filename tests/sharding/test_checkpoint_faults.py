"""What goes wrong with checkpoints: damage, full disks, killed ranks, crafted files."""

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import storage
from sharding import block_file, checkpoint_manifest
from sharding.checkpoint import CheckpointError, CheckpointInfo, CheckpointStore
from sharding.checkpoint_manifest import MANIFEST, build_manifest, read_manifest, write_manifest
from sharding.process_group import DistributedContext, current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, differing, make_policy, train, whole_state

Answer = tuple[CheckpointInfo | None, tuple[str, ...]]


def save_steps(root: str, steps: int, keep: int) -> list[CheckpointInfo]:
    """One checkpoint a step."""
    policy = make_policy(current_context("cpu"), Settings())
    store = CheckpointStore(root, keep, policy.ctx)
    infos = []
    for _ in range(steps):
        train(policy, 1)
        infos.append(store.save(policy, policy.step, {"step": policy.step}, {}, {}))
    return infos


def find_newest(root: str) -> Answer:
    store = CheckpointStore(root, 2, current_context("cpu"))
    return store.newest(), store.skipped


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[CheckpointInfo]]:
    """Checkpoints of steps 1 and 2, written by two ranks."""
    root = tmp_path_factory.mktemp("saved") / "checkpoints"
    return root, run_ranks(2, save_steps, str(root), 2, 2)[0]


@pytest.fixture
def copy(two_saves: tuple[Path, list[CheckpointInfo]], tmp_path: Path) -> Path:
    """A copy of them to damage."""
    return Path(shutil.copytree(two_saves[0], tmp_path / "checkpoints"))


def newest_directory(root: Path) -> Path:
    return max(root.glob("step-00000002-*"))


def flip_a_bit(directory: Path) -> None:
    shard = max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)


def truncate(directory: Path) -> None:
    shard = directory / "__1_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)


def remove_a_shard(directory: Path) -> None:
    (directory / "__0_0.distcp").unlink()


def change_the_state(directory: Path) -> None:
    (directory / "state.json").write_text(json.dumps({"step": 7}))


def damage_the_manifest(directory: Path) -> None:
    text = (directory / MANIFEST).read_text()
    (directory / MANIFEST).write_text(text.replace('"step": 2', '"step": 3'))


def cut_the_manifest(directory: Path) -> None:
    os.truncate(directory / MANIFEST, 40)


def lose_the_manifest(directory: Path) -> None:
    (directory / MANIFEST).unlink()


def mix_two_saves(directory: Path) -> None:
    older = min(directory.parent.glob("step-00000001-*"))
    shutil.copy(older / "__1_0.distcp", directory / "__1_0.distcp")


def damage_everything(directory: Path) -> None:
    for other in directory.parent.iterdir():
        flip_a_bit(other)


def finish_no_save(directory: Path) -> None:
    for other in directory.parent.iterdir():
        lose_the_manifest(other)


def craft_metadata(directory: Path) -> None:
    """A `.metadata` that runs a command, in a checkpoint whose hashes are right."""

    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {directory.parent.parent / 'executed'}",)

    data = pickle.dumps(Attack())
    (directory / ".metadata").write_bytes(data)
    manifest = read_manifest(str(directory), directory.name)
    crafted = {"bytes": len(data), "sha256": storage.sha256_bytes(data)}
    files = [f.model_copy(update=crafted if f.path == ".metadata" else {}) for f in manifest.files]
    content = manifest.model_dump(exclude={"fingerprint", "files"})
    write_manifest(str(directory), build_manifest(**content, files=files))


def climb_out(directory: Path) -> None:
    """A manifest that names a file outside, in order and with the right hash."""
    outside = directory.parent / "outside"
    outside.write_bytes(b"secret")
    content = json.loads((directory / MANIFEST).read_text())
    digest = storage.sha256_bytes(b"secret")
    content["files"].append({"path": "../outside", "bytes": 6, "sha256": digest})
    del content["fingerprint"]
    content["fingerprint"] = storage.fingerprint(content)
    (directory / MANIFEST).write_text(json.dumps(content))


DAMAGES: dict[Callable[[Path], None], str] = {
    flip_a_bit: "damaged: its sha256 differs",
    truncate: "bytes instead of",
    remove_a_shard: "__0_0.distcp is missing",
    change_the_state: "state.json",
    damage_the_manifest: "does not match its own fingerprint",
    cut_the_manifest: "not valid JSON",
    mix_two_saves: "__1_0.distcp is damaged",
    craft_metadata: "posix.system",
    climb_out: "path",
}


def find_each(roots: list[str]) -> list[Answer]:
    return [find_newest(root) for root in roots]


@pytest.fixture(scope="module")
def answers(
    two_saves: tuple[Path, list[CheckpointInfo]], tmp_path_factory: pytest.TempPathFactory
) -> dict[Callable[[Path], None], tuple[Path, list[Answer]]]:
    """What two ranks say of each damaged copy."""
    roots = {}
    for damage in (*DAMAGES, damage_everything, lose_the_manifest, finish_no_save):
        place = tmp_path_factory.mktemp("damaged") / "checkpoints"
        roots[damage] = Path(shutil.copytree(two_saves[0], place))
        damage(newest_directory(place))
    ranks = run_ranks(2, find_each, [str(root) for root in roots.values()])
    said = list(zip(*ranks, strict=True))
    return {damage: (roots[damage], list(said[at])) for at, damage in enumerate(roots)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped(
    damage: Callable[[Path], None],
    answers: dict[Callable[[Path], None], tuple[Path, list[Answer]]],
    two_saves: tuple[Path, list[CheckpointInfo]],
) -> None:
    root, said = answers[damage]
    info, skipped = said[0]
    assert said[0] == said[1]
    assert info is not None and info.hash == two_saves[1][0].hash and info.step == 1
    assert len(skipped) == 1 and newest_directory(root).name in skipped[0]
    assert DAMAGES[damage] in skipped[0] and "\n" not in skipped[0]
    assert not (root.parent / "executed").exists()


def test_all_damaged_gives_none_and_says_why(
    answers: dict[Callable[[Path], None], tuple[Path, list[Answer]]],
) -> None:
    for info, skipped in answers[damage_everything][1]:
        assert info is None and len(skipped) == 2


def test_an_unfinished_save_is_debris_and_no_damage(
    answers: dict[Callable[[Path], None], tuple[Path, list[Answer]]],
    two_saves: tuple[Path, list[CheckpointInfo]],
) -> None:
    for info, skipped in answers[lose_the_manifest][1]:
        assert info is not None and info.hash == two_saves[1][0].hash and skipped == ()
    assert answers[finish_no_save][1] == [(None, ())] * 2


def test_intact_checkpoints_are_found_and_nothing_is_skipped(
    two_saves: tuple[Path, list[CheckpointInfo]],
) -> None:
    root, saved = two_saves
    intact, absent = (saved[1], ()), (None, ())
    roots = [str(root), f"{root}/absent"]
    assert run_ranks(3, find_each, roots) == [[intact, absent]] * 3
    ctx = DistributedContext(0, 1, torch.device("cpu"))  # as a driver without a group asks
    assert CheckpointStore(str(root), 2, ctx).newest() == saved[1]


def unreadable_on_one_rank(root: str) -> Answer:
    """Storage fails one rank alone; all must decide alike."""
    ctx = current_context("cpu")
    newest = max(storage.list_names(root), key=lambda name: name.split("-")[1])
    block_digest = checkpoint_manifest.block_digest

    def failing(url: str, block_bytes: int) -> str:
        if ctx.rank == 1 and newest in url:
            raise OSError(5, "Input/output error")
        return block_digest(url, block_bytes)

    checkpoint_manifest.block_digest = failing
    return find_newest(root)


def test_ranks_agree_where_one_of_them_cannot_read(
    two_saves: tuple[Path, list[CheckpointInfo]],
) -> None:
    answers = run_ranks(2, unreadable_on_one_rank, str(two_saves[0]))
    assert answers[0] == answers[1]
    info, skipped = answers[0]
    assert info == two_saves[1][0] and "rank 1" in skipped[0] and "Input/output" in skipped[0]


def fail_to_save(root: str, limit: int | None, rank: int, state: dict[str, Any]) -> str:
    """Save where files of one rank may not grow beyond a limit; the sentence every rank gets.

    Then without the limit: training goes on, and so does saving.
    """
    policy = make_policy(current_context("cpu"), Settings())
    store = CheckpointStore(root, 2, policy.ctx)
    good = store.newest()
    assert good is not None
    store.load(policy, good)
    train(policy, 1)
    before, names = whole_state(policy), storage.list_names(root)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is not None and policy.ctx.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    with pytest.raises(CheckpointError) as error:
        store.save(policy, policy.step, state, {}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert storage.list_names(root) == names, "nothing of the failed save is left"
    assert store.newest() == good and store.skipped == ()
    assert differing(before, whole_state(policy)) == []
    if limit is not None:
        assert store.save(policy, policy.step, {}, {}, {}) == store.newest()
    return str(error.value)


LIMITS: dict[str, tuple[int | None, int, dict[str, Any]]] = {
    "rank 0": (1000, 0, {}),
    "rank 1": (1000, 1, {}),
    "File too large": (200_000, 0, {"state.json": "x" * 300_000}),
}
"""What the sentence says, the limit, which rank has it, and the state to save."""


def fail_to_save_each(roots: list[str]) -> list[str]:
    cases = zip(roots, LIMITS.values(), strict=True)
    return [fail_to_save(root, *limits) for root, limits in cases]


def test_a_write_error_is_one_sentence_on_all_ranks(
    two_saves: tuple[Path, list[CheckpointInfo]], tmp_path: Path
) -> None:
    roots = [shutil.copytree(two_saves[0], tmp_path / str(at)) for at in range(len(LIMITS))]
    ranks = run_ranks(2, fail_to_save_each, [str(root) for root in roots])
    assert ranks[0] == ranks[1]
    for root, said, sentence in zip(roots, LIMITS, ranks[0], strict=True):
        assert said in sentence and "File too large" in sentence and str(root) in sentence
        assert "earlier ones are intact" in sentence and "\n" not in sentence


@pytest.mark.parametrize("left", [8192, 20_000])
def test_a_full_disk_leaves_earlier_checkpoints_intact(
    small_disk: Path, copy: Path, left: int
) -> None:
    root = Path(shutil.copytree(copy, small_disk / "checkpoints"))
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(b"x" * (free - left))
    sentences = run_ranks(2, fail_to_save, str(root), None, 0, {})
    assert sentences[0] == sentences[1] and "No space left on device" in sentences[0]
    (small_disk / "filler").unlink()
    infos = run_ranks(2, save_steps, str(root), 1, 2)
    assert run_ranks(2, find_newest, str(root))[0][0] == infos[0][0]


def die_while_saving(root: str, rank: int, writes: int) -> None:
    """`kill -9` of a rank after some writes of its shard, or before the manifest."""
    ctx = current_context("cpu")
    write = block_file.BlockWriter.write
    done = 0

    def dying(self: Any, data: Any) -> None:
        nonlocal done
        done += 1
        if ctx.rank == rank and done > writes:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, data)

    block_file.BlockWriter.write = dying  # type: ignore[method-assign]
    save_steps(root, 1, 2)


KILLED = "exit code -9|Connection (reset|closed) by peer"
"""Which the killed rank shows, or the other one, whoever is heard first."""


def find_and_save(root: str) -> tuple[Answer, list[CheckpointInfo]]:
    return find_newest(root), save_steps(root, 1, 2)


@pytest.mark.parametrize(("rank", "writes"), [(0, 3), (1, 5)])
def test_a_rank_killed_while_saving_leaves_no_checkpoint(
    rank: int, writes: int, copy: Path, two_saves: tuple[Path, list[CheckpointInfo]]
) -> None:
    with pytest.raises(AssertionError, match=KILLED):
        run_ranks(2, die_while_saving, str(copy), rank, writes)
    names = storage.list_names(str(copy))
    assert len(names) == 3, "half a checkpoint is there"
    (info, skipped), saved = run_ranks(2, find_and_save, str(copy))[0]
    assert info is not None and info.hash == two_saves[1][1].hash
    assert skipped == ()
    left = storage.list_names(str(copy))
    assert saved[0].name in left and len(left) == 2, "the next save removed the half one"


def test_the_first_save_can_be_killed_and_training_begun_again(tmp_path: Path) -> None:
    root = str(tmp_path / "checkpoints")
    with pytest.raises(AssertionError, match=KILLED):
        run_ranks(2, die_while_saving, root, 0, 3)
    assert len(storage.list_names(root)) == 1, "half a checkpoint is there"
    answer, saved = run_ranks(2, find_and_save, root)[0]
    assert answer == (None, ())
    assert storage.list_names(root) == [saved[0].name]


def test_old_checkpoints_are_removed_and_two_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    saved = run_ranks(1, save_steps, str(tmp_path), 4, 2)[0]
    left = [name for name in storage.list_names(str(tmp_path)) if name != "notes"]
    assert left == [saved[2].name, saved[3].name]
    assert [info.step for info in saved] == [1, 2, 3, 4]
    assert len({info.hash for info in saved}) == 4
    with pytest.raises(ValueError, match="keep 2"):
        CheckpointStore(str(tmp_path), 1, DistributedContext(0, 1, torch.device("cpu")))


def save_after_damage(root: str) -> list[str]:
    ctx = current_context("cpu")
    policy = make_policy(ctx, Settings())
    store = CheckpointStore(root, 2, ctx)
    info = store.newest()
    assert info is not None and info.step == 1
    store.load(policy, info)
    train(policy, 1)
    store.save(policy, policy.step, {}, {}, {})
    return storage.list_names(root)


def test_damaged_checkpoints_do_not_count_as_kept(copy: Path) -> None:
    flip_a_bit(newest_directory(copy))
    before = storage.list_names(str(copy))
    left = run_ranks(2, save_after_damage, str(copy))[0]
    assert set(before) < set(left), "the good one of step 1 is kept although two are newer"
    assert run_ranks(2, find_newest, str(copy))[0][0].name not in before
