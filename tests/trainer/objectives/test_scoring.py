"""Scores of items on several ranks: what ranks share changes nothing that is learnt."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.alignment import GRPOConfig
from configs.generation import AncestralConfig
from configs.models import InitConfig, SASRecConfig
from configs.objectives import SampledSoftmaxConfig
from configs.recipe import Recipe
from models.base import CatalogueSizes
from models.build import build_model
from sharding.parallelize import ParallelModel, parallelize
from sharding.process_group import DistributedContext, current_context
from sharding.retrieval import Catalogue
from tests.harness import run_ranks
from tests.models.sequences import make_batch, take
from tests.sharding.policies import whole_state
from trainer.objectives.online import OnlineInputs, OnlineLoss
from trainer.objectives.scoring import Candidates, ItemScorer
from trainer.rollout import sample_items
from trainer.scoring import item_log_probs

ITEMS, WIDTH, GROUP, STEPS = 101, 6, 8, 3
LENGTHS = [3, 1, 5, 2, 4, 1]
OBJECTIVE = SampledSoftmaxConfig(temperature=0.5)


def policy_of(ctx: DistributedContext, zero_stage: int, placement: str) -> ParallelModel:
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "output": "unused",
            "data": {"source": {"kind": "public", "name": "ml-100k"}},
            "model": {"kind": "sasrec", "width": WIDTH, "num_layers": 1, "feedforward_width": 7},
            "sharding": {"placement": {"item": placement}, "optimizer": {"lr": 0.05}},
            "training": {"zero_stage": zero_stage, "optimizer": {"lr": 0.05}},
        }
    )
    torch.manual_seed(1)
    assert isinstance(recipe.model, SASRecConfig)
    model = build_model(recipe.model, CatalogueSizes(ITEMS, 50, {}, {}), InitConfig(), 9)
    scorer = ItemScorer(model, OBJECTIVE, ITEMS, ctx, normalised=True)
    config = GRPOConfig(supervised_weight=0.0, entropy_weight=0.01)
    return parallelize(
        OnlineLoss(scorer, config),
        model.table_specs(),
        recipe,
        ctx,
        total_steps=STEPS,
        optimizer=recipe.training.optimizer,
        sparse_lr=0.05,
    )


def roll(policy: ParallelModel, users: list[int]) -> OnlineInputs:
    """Groups of `users`, of whom there may be none; even items are liked."""
    catalogue = Catalogue(policy, ITEMS, 64)
    batch = take(make_batch(LENGTHS, ITEMS), users)
    queries = policy.query(batch)[batch.offsets[1:] - 1]
    keys = torch.tensor(users, dtype=torch.int64) + 1000 * policy.step
    temperature = OBJECTIVE.temperature
    items, _ = sample_items(catalogue, queries, keys, AncestralConfig(samples=GROUP), temperature)
    old = item_log_probs(policy, catalogue, queries, items, temperature)
    gain = 1.0 - 2.0 * (items % 2)
    everything = torch.ones(*items.shape, 1, dtype=torch.bool)
    return OnlineInputs(
        Candidates(batch, items), everything, old, old - 0.1, gain, None, {}, supervised=None
    )


def on_rank(zero_stage: int, placement: str) -> tuple[list[Any], dict[str, Tensor], list[int]]:
    """Metrics and groups of each step, the weights after them, and rows of the item table that a
    step looked up. In the last step all users are the first rank's."""
    ctx = current_context("cpu")
    policy = policy_of(ctx, zero_stage, placement)
    told: list[Any] = []
    wanted: list[int] = []
    for step in range(STEPS):
        users = list(range(ctx.rank, len(LENGTHS), ctx.world_size))
        if step == STEPS - 1:
            users = list(range(len(LENGTHS))) if ctx.rank == 0 else []
        inputs = roll(policy, users)
        loss = policy.engine.module.loss_module
        assert isinstance(loss, OnlineLoss)
        ids = [each.flatten() for each in loss.required_ids(inputs)["item"].values()]
        wanted.append(torch.cat(ids).unique().numel())
        result = policy.train_step([inputs])
        norm = {"grad_norm": result.dense_grad_norm}
        told.append(
            (result.metrics | norm, dict(zip(users, inputs.candidates.items.tolist(), strict=True)))
        )
    return told, whole_state(policy), wanted


@functools.cache
def alone(placement: str) -> Any:
    """What one rank finds; its ZeRO stage changes nothing."""
    return run_ranks(1, on_rank, 1, placement)[0]


@pytest.mark.parametrize(
    ("world_size", "zero_stage", "placement"),
    [(2, 2, "row_wise"), (3, 3, "row_wise"), (2, 1, "replicated")],
)
def test_worlds_learn_alike(world_size: int, zero_stage: int, placement: str) -> None:
    told, weights, _ = alone(placement)
    assert told[0][0]["ratio"] == pytest.approx(1.0, abs=1e-5)  # rollout and loss agree
    shared = run_ranks(world_size, on_rank, zero_stage, placement)
    for step, (metrics, groups) in enumerate(told):
        dealt: dict[int, list[int]] = {}
        for part, _, _ in shared:
            dealt |= part[step][1]
            assert part[step][0] == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        assert dealt == groups
    for _, found, _ in shared:
        for name, value in weights.items():
            if name.endswith("qkv.bias/weight"):
                continue  # attention ignores the keys' part: Adam enlarges what rounding leaves
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    share = -(-ITEMS // world_size)
    for rank, (_, _, wanted) in enumerate(shared):
        own = len(LENGTHS) * (GROUP + max(LENGTHS))
        assert max(wanted) <= share + own
        if rank > 0:
            assert wanted[-1] <= share  # without users: its share and nothing else
