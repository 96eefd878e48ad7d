"""Checkpoints on a store of objects: no rename, listings that come late, connections that break."""

from pathlib import Path

import pytest
from torch import Tensor

from configs import storage, storage_faults
from sharding.background_saves import BackgroundSaves
from sharding.checkpoint import CheckpointStore
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.object_store import BREAKS, bucket
from tests.sharding.policies import Settings, differing, make_policy, train, whole_state


def save_some(directory: str) -> dict[str, Tensor]:
    """Four steps, the last behind training; what the model held then."""
    storage_faults.WAITS_S = (0.01,) * 8  # type: ignore[assignment]
    policy = make_policy(current_context("cpu"), Settings())
    store = CheckpointStore(bucket(Path(directory)), 2, policy.ctx)
    for _ in range(3):
        train(policy, 1)
        store.save(policy, policy.step, {"step": policy.step}, {}, {})
    train(policy, 1)
    state = whole_state(policy)
    saves = BackgroundSaves(policy.ctx)
    saves.save(store, policy, {"step": policy.step}, {}, {})
    saves.wait()
    return state


def find_and_load(directory: str, state: dict[str, Tensor]) -> tuple[int, list[str], int]:
    """Step that is found at once, what differs from what was saved, and how many are kept."""
    storage_faults.WAITS_S = (0.01,) * 8  # type: ignore[assignment]
    policy = make_policy(current_context("cpu"), Settings())
    store = CheckpointStore(bucket(Path(directory)), 2, policy.ctx)
    info = store.newest()
    assert info is not None and store.at(info.name) == info
    assert store.load(policy, info) == {"step": info.step}
    whole = storage.exists(storage.join(info.url, "MANIFEST.json"))
    return info.step, differing(whole_state(policy), state), int(whole)


@pytest.mark.parametrize("breaks", ["0", "25"])
def test_what_was_committed_is_found_and_loaded(
    breaks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BREAKS, breaks)
    directory = str(tmp_path / "bucket")
    state = run_ranks(2, save_some, directory)[0]
    answers = run_ranks(1, find_and_load, directory, state)
    assert answers[0][0] == 4 and answers[0][1] == []
    assert not [name for name in (tmp_path / "bucket").iterdir() if ".tmp" in name.name]
