"""The policy that divergence is measured from: a second set of weights on the same workers.

It is sharded as the trained one is, has no optimizer state, and is never trained: it is the
starting policy, or one that follows the trained policy at a distance.
"""

from typing import Any

import torch

from configs import storage
from configs.layout import weights_hash
from configs.policy_gradient import ReferenceConfig
from sharding.checkpoint import CheckpointStore
from sharding.parallelize import ParallelModel, parallelize
from trainer.objectives.dpo import PreferenceLoss
from trainer.objectives.online import OnlineLoss
from trainer.policy import Worker, open_checkpoint
from trainer.scoring import Likelihood


class ReferencePolicy:
    """Holds, moves, saves and restores the reference."""

    def __init__(
        self,
        worker: Worker,
        config: ReferenceConfig,
        loss: OnlineLoss | PreferenceLoss,
        start: dict[str, Any],
    ) -> None:
        """Build it; `restore` fills it. Collective.

        Args:
            worker: of the stage.
            config: whether and how it moves.
            loss: with a new model; it is never called.
            start: reference of the checkpoint that alignment starts from.
        """
        recipe = worker.recipe
        assert recipe.alignment is not None, "the align stage exists only with an alignment block"
        sharding = recipe.sharding
        frozen = recipe.model_copy(
            update={
                # Neither copies of weights nor state of optimizers, which ZeRO 1 and 2 would keep.
                "training": recipe.training.model_copy(
                    update={"zero_stage": 3 if recipe.training.zero_stage == 3 else 0}
                ),
                "sharding": sharding.model_copy(
                    update={"optimizer": sharding.optimizer.model_copy(update={"kind": "sgd"})}
                ),
            }
        )
        self.policy = parallelize(
            loss,
            loss.model.table_specs(),
            frozen,
            worker.ctx,
            total_steps=1,
            optimizer=recipe.alignment.optimizer,
            sparse_lr=sharding.optimizer.lr,
        )
        self._worker, self._config, self._start = worker, config, start
        self._stores: dict[str, CheckpointStore] = {}
        self._likelihood: Likelihood | None = None

    def restore(self, beside: CheckpointStore, name: str | None) -> None:
        """As it was with the policy that `beside` has by that name, or at the start. Collective.

        Raises:
            ValueError: it was to be saved then, and is not there.
        """
        self._likelihood = None
        if name is None or self._config.sync_every_steps is None:
            store, start = open_checkpoint(self._worker, self._start)
            store.load_weights(self.policy, start)
            return
        store = self._store(beside)
        info = store.at(name)
        if info is None:
            why = f" ({'; '.join(store.skipped)})" if store.skipped else ""
            raise ValueError(
                f"{store.root} has no reference policy {name}{why}, which the checkpoint of that "
                f"name in {beside.root} was trained with: restore it, or remove that checkpoint "
                "and run the same command again, to go on from the one before"
            )
        store.load_weights(self.policy, info)

    def likelihood(self) -> Likelihood:
        """log π_ref. Collective."""
        if self._likelihood is None:
            self._likelihood = Likelihood.of(self._worker, self.policy)
        return self._likelihood

    def after(self, batches: int, policy: ParallelModel) -> bool:
        """Move towards the policy if that is due after so many batches of prompts; whether it did.

        Collective.
        """
        every = self._config.sync_every_steps
        if every is None or batches % every:
            return False
        mix(self.policy, policy, self._config.mixing)
        self._likelihood = None
        return True

    def save(self, beside: CheckpointStore, name: str, step: int) -> None:
        """Save what belongs to the policy's checkpoint of that name in `beside`. Collective."""
        if self._config.sync_every_steps is not None:
            start = {"start": weights_hash(self._start)}
            self._store(beside).save(self.policy, step, {}, {}, start, name)

    def _store(self, beside: CheckpointStore) -> CheckpointStore:
        """Where the reference lies of each policy in `beside`, and of the one that comes next."""
        if beside.root not in self._stores:
            url = storage.join(beside.root, "reference")
            store = CheckpointStore(url, 2, self._worker.ctx, beside.names)
            self._stores[beside.root] = store
        return self._stores[beside.root]


@torch.no_grad()
def mix(reference: ParallelModel, policy: ParallelModel, share: float) -> None:
    """reference ← share · policy + (1 - share) · reference, in float32. Collective."""
    weights, newer = reference.engine.full_weights(), policy.engine.full_weights()
    mixed = {name: {"weight": value.lerp(newer[name], share)} for name, value in weights.items()}
    reference.engine.load_full_state(mixed, 0)
    newest = dict(policy.engine.module.named_buffers())
    for name, buffer in reference.engine.module.named_buffers():
        buffer.copy_(newest[name])  # which expert is chosen is no mean of two choices
    state, theirs = reference.tables.state_dict(), policy.tables.state_dict()
    for key, table in state.items():
        ours, others = table.local_shards(), theirs[key].local_shards()
        for mine, other in zip(ours, others, strict=True):
            assert mine.metadata == other.metadata, "both policies are sharded alike"
            mine.tensor.lerp_(other.tensor.to(mine.tensor.dtype), share)
    reference.tables.load_state_dict(state)
