"""A small real policy, trained on batches that depend on the step alone, for checkpoint tests."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.models import InitConfig, SASRecConfig
from configs.objectives import FullSoftmaxConfig
from configs.recipe import Recipe
from models.base import CatalogueSizes
from models.batch import JaggedBatch
from models.build import build_model
from sharding import checkpoint_state
from sharding.parallelize import ParallelModel, parallelize
from sharding.process_group import DistributedContext
from trainer.objectives.next_item import NextItemInputs, NextItemLoss

SEQUENCES = 6
MAX_LENGTH = 5


@dataclass(frozen=True)
class Settings:
    """What may differ between two policies."""

    items: int = 37
    layers: int = 1
    zero_stage: int = 1
    placement: str = "row_wise"
    optimizer: str = "rowwise_adagrad"
    precision: str = "fp32"
    width: int = 6
    seed: int = 1


def make_policy(ctx: DistributedContext, settings: Settings) -> ParallelModel:
    """SASRec with a sharded item table and a replicated table of user ages."""
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "output": "unused",
            "seed": settings.seed,
            "data": {"source": {"kind": "public", "name": "ml-100k"}},
            "model": {"kind": "sasrec", "width": settings.width, "user_features": ["age"]}
            | {"num_layers": settings.layers, "feedforward_width": 7},
            "sharding": {
                "placement": {"item": settings.placement, "user_age": "replicated"},
                "optimizer": {"kind": settings.optimizer},
            },
            "training": {"zero_stage": settings.zero_stage, "precision": settings.precision},
            "cluster": {"num_workers": 1},
        }
    )
    torch.manual_seed(settings.seed)
    assert isinstance(recipe.model, SASRecConfig)
    sizes = CatalogueSizes(settings.items, 50, {"age": 4}, {})
    model = build_model(recipe.model, sizes, InitConfig(), MAX_LENGTH)
    return parallelize(
        NextItemLoss(model, FullSoftmaxConfig(), settings.items),
        model.table_specs(),
        recipe,
        ctx,
        total_steps=100,
        optimizer=recipe.training.optimizer,
        sparse_lr=0.05,
    )


def make_batch(step: int, ctx: DistributedContext, items: int = 37) -> JaggedBatch:
    """This rank's sequences of a step: every `world_size`-th of the global batch."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, MAX_LENGTH + 1, (SEQUENCES,), generator=generator)
    events = torch.randint(1, items + 1, (SEQUENCES, MAX_LENGTH + 1), generator=generator)
    ages = torch.randint(0, 5, (SEQUENCES,), generator=generator)
    rows = torch.arange(ctx.rank, SEQUENCES, ctx.world_size)
    kept = torch.arange(MAX_LENGTH) < lengths[rows, None]
    zero = torch.zeros(1, dtype=torch.int64)
    times = torch.arange(MAX_LENGTH).expand(len(rows), -1)
    return JaggedBatch(
        sample_ids=rows,
        user_ids=rows + 1,
        offsets=torch.cat([zero, lengths[rows].cumsum(0)]),
        item_ids=events[rows, :-1][kept],
        timestamps=times[kept],
        next_timestamps=times[kept] + 1,
        target_ids=events[rows, 1:][kept],
        user_features={"age": ages[rows]},
    )


def train(policy: ParallelModel, steps: int) -> list[float]:
    """The next `steps` losses."""
    losses = []
    for _ in range(steps):
        batch = make_batch(policy.step, policy.ctx)
        inputs = NextItemInputs(batch, None, None, step_seed=policy.step)
        losses.append(policy.train_step([inputs], batch.sample_ids.tolist()).loss)
    return losses


def whole_state(policy: ParallelModel) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, unsharded, on every rank."""
    state = checkpoint_state.training_state(policy)
    return {key: _whole(value, policy.ctx) for key, value in state.items()}


def _whole(value: Any, ctx: DistributedContext) -> Tensor:
    if not hasattr(value, "local_shards"):
        return value.clone()
    full = torch.zeros(value.metadata().size)
    for shard in value.local_shards():
        (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        full[row : row + rows, column : column + columns] = shard.tensor
    return ctx.all_reduce_sum(full)


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bit for bit alike."""
    keys = one.keys() | other.keys()
    return sorted(
        k for k in keys if k not in one or k not in other or not torch.equal(one[k], other[k])
    )
