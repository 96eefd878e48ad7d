"""Saves behind training: what is committed is the model at the copy, whatever comes next."""

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sharding import background_saves
from sharding.background_saves import BackgroundSaves
from sharding.checkpoint import CheckpointError, CheckpointStore
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, differing, make_policy, train, whole_state

VARIANTS = [
    Settings(),
    replace(Settings(), zero_stage=3, optimizer="adagrad"),
    replace(Settings(), width=8, placement="column_wise", zero_stage=0),
    replace(Settings(), placement="replicated", zero_stage=2),
]


class SlowStore(CheckpointStore):
    """Writes only when told to go on, so that training is surely ahead."""

    gate = threading.Event()

    def write(
        self,
        step: int,
        tensors: dict[str, Tensor],
        documents: Mapping[str, Mapping[str, Any]],
        fingerprints: Mapping[str, str],
        name: str | None = None,
    ) -> Any:
        assert self.gate.wait(120)
        return super().write(step, tensors, documents, fingerprints, name)

    def apart(self, ctx: Any) -> "SlowStore":
        return SlowStore(self.root, 2, ctx)


def save_and_go_on(root: str) -> None:
    for at, settings in enumerate(VARIANTS):
        policy = make_policy(current_context("cpu"), settings)
        saves = BackgroundSaves(policy.ctx)
        SlowStore.gate.clear()
        store = SlowStore(f"{root}/{at}", 2, policy.ctx)
        train(policy, 2)
        then = whole_state(policy)
        saves.save(store, policy, {"at": "then"}, {"name": "r"}, {"data": "abc"})
        losses = train(policy, 3)  # while the copy waits to be written
        assert store.newest() is None
        SlowStore.gate.set()
        later = whole_state(policy)
        saves.save(store, policy, {"at": "later"}, {}, {})  # waits for the first one
        saves.wait()
        info = store.newest()
        assert info is not None and info.step == 5 and saves.times.saves == 2
        other = make_policy(current_context("cpu"), replace(settings, seed=2))
        assert store.load(other, info) == {"at": "later"}
        assert differing(whole_state(other), later) == [], settings

        [first] = [
            name for name in store._directory.committed() if name.startswith("step-00000002-")
        ]
        again = CheckpointStore(f"{root}/{at}", 2, policy.ctx)
        agree, remove = again._agree, again._directory.remove
        assert agree.on_first_rank(lambda remove=remove, info=info: remove(info.name)) is None
        info = again.newest()
        assert info is not None and info.name == first and info.fingerprints == {"data": "abc"}
        other = make_policy(current_context("cpu"), replace(settings, seed=2))
        assert again.load(other, info) == {"at": "then"}
        assert differing(whole_state(other), then) == [], settings
        assert train(other, 3) == losses, settings


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_written_is_the_model_at_the_copy(tmp_path: Path, world: int) -> None:
    run_ranks(world, save_and_go_on, str(tmp_path), timeout=240)


def copy_late(root: str) -> tuple[list[str], float]:
    """What happens in which order where copying takes until a step waits for it."""
    policy = make_policy(current_context("cpu"), Settings())
    saves, store = BackgroundSaves(policy.ctx), CheckpointStore(root, 2, policy.ctx)
    train(policy, 2)
    then, happened, computed = whole_state(policy), [], threading.Event()
    copy, backward = background_saves._Copies.of, policy._backward

    def late(self: Any, name: str, value: Tensor) -> Tensor:
        assert computed.wait(60)  # the next step's gradient, which waits for no copy
        time.sleep(0.05)
        happened.append("copied")
        return copy(self, name, value)

    def computing(*args: Any) -> Any:
        result = backward(*args)
        happened.append("computed")
        computed.set()
        return result

    def changing(*args: Any) -> Any:
        happened.append("changed")
        return update(*args)

    update = policy._update_tables
    saves._copies.of = partial(late, saves._copies)  # type: ignore[method-assign]
    policy._backward = computing  # type: ignore[method-assign]
    policy._update_tables = changing  # type: ignore[method-assign]
    saves.save(store, policy, {}, {}, {})
    stalled = saves.times.stalled
    train(policy, 1)
    stalled = saves.times.stalled - stalled
    saves.wait()
    info = store.newest()
    other = make_policy(current_context("cpu"), replace(Settings(), seed=2))
    assert info is not None
    store.load(other, info)
    assert differing(whole_state(other), then) == []
    return list(dict.fromkeys(happened)), stalled


def test_the_copy_is_made_beside_the_next_gradient_and_before_its_update(
    tmp_path: Path,
) -> None:
    [(happened, stalled)] = run_ranks(1, copy_late, str(tmp_path))
    assert happened == ["computed", "copied", "changed"]
    assert stalled >= 0.05


def fail_to_copy(root: str) -> str:
    """A copy that fails must hold no step up."""
    policy = make_policy(current_context("cpu"), Settings())
    saves, store = BackgroundSaves(policy.ctx), CheckpointStore(root, 2, policy.ctx)

    def failing(name: str, value: Tensor) -> Tensor:
        raise MemoryError("no room for a copy")

    saves._copies.of = failing  # type: ignore[method-assign]
    saves.save(store, policy, {}, {}, {})
    train(policy, 1)
    with pytest.raises(MemoryError, match="no room"):
        saves.wait()
    return "went on"


def test_a_copy_that_fails_is_told_and_holds_no_step_up(tmp_path: Path) -> None:
    assert run_ranks(1, fail_to_copy, str(tmp_path)) == ["went on"]


def test_a_copy_shares_no_memory() -> None:
    value = torch.arange(3.0)
    copy = background_saves._Copies().of("any", value)
    value += 1
    assert copy.tolist() == [0.0, 1.0, 2.0]


def fill(root: str, quota: str) -> list[str]:
    """Save to a place that is full; ranks alike."""
    policy = make_policy(current_context("cpu"), Settings())
    saves = BackgroundSaves(policy.ctx)
    train(policy, 1)
    good, full = CheckpointStore(root, 2, policy.ctx), CheckpointStore(quota, 2, policy.ctx)
    saves.save(good, policy, {}, {}, {})
    sentences = []
    saves.save(full, policy, {}, {}, {})
    train(policy, 1)
    try:
        saves.wait()
    except CheckpointError as error:
        sentences.append(str(error))
    saves.save(good, policy, {}, {}, {})
    saves.wait()
    info = good.newest()
    assert info is not None and info.step == 2 and full.newest() is None
    return sentences


def test_a_save_that_fails_is_told_on_every_rank_and_costs_no_other(
    tmp_path: Path,
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the directory should be")
    found = run_ranks(2, fill, str(tmp_path / "good"), str(blocked / "store"))
    assert found[0] == found[1] and len(found[0]) == 1
    assert "checkpoint of step 1 could not be written" in found[0][0]
