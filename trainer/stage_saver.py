"""How a training stage writes its checkpoints, and what training waited for them."""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from sharding.background_saves import BackgroundSaves
from sharding.checkpoint import CheckpointStore
from sharding.parallelize import ParallelModel
from trainer.monitor.progress import duration


class StageSaver:
    """Writes into the stage's stores, behind training or at once."""

    def __init__(
        self,
        policy: ParallelModel,
        recipe_json: Mapping[str, Any],
        fingerprints: Mapping[str, str],
        returned_to: Collection[CheckpointStore],
        save_beside: Callable[[CheckpointStore, str], None],
        *,
        behind_training: bool,
    ) -> None:
        """`save_beside` saves what belongs to the next checkpoint, of the given name, of a store
        that training goes back to: when it is resumed, or rolls back. Collective."""
        self._policy = policy
        self._recipe_json = recipe_json
        self._fingerprints = fingerprints
        self._returned_to = returned_to
        self._save_beside = save_beside
        self._background = BackgroundSaves(policy.ctx) if behind_training else None
        self._started = time.monotonic()

    def save(self, store: CheckpointStore, state: dict[str, Any]) -> str:
        """Save the policy and the given state; the checkpoint's name. Collective."""
        name = store.next_name(self._policy.step)
        if store in self._returned_to:
            self._save_beside(store, name)
        travelling = (state, self._recipe_json, self._fingerprints, name)
        if self._background is None:
            store.save(self._policy, self._policy.step, *travelling)
        else:
            self._background.save(store, self._policy, *travelling)
        return name

    def wait(self) -> None:
        """Until all saves are committed. Collective."""
        if self._background is not None:
            self._background.wait()

    def close(self) -> None:
        """After a failure: let what is in flight end."""
        if self._background is not None:
            self._background.close()

    def sentence(self) -> str | None:
        """What saving behind training cost so far; None where that is not done."""
        if self._background is None or not self._background.times.saves:
            return None
        times, elapsed = self._background.times, time.monotonic() - self._started
        waited = f"{times.stalled:.1f} s ({times.stalled / elapsed:.1%} of its time)"
        return (
            f"{times.saves} checkpoints written in {duration(times.written)} behind training, "
            f"which waited {waited} for them"
        )
