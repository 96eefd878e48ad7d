"""Decoders with experts on several ranks: losses, balance and generation of every ZeRO stage alike.

All settings of a world share one call of `run_ranks`: starting ranks costs more than what they do.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from configs.decoders import Decoder
from configs.objectives import NextCodeConfig
from configs.recipe import Recipe
from models.base import CatalogueSizes, CodeDecoder, TableModel
from models.batch import JaggedBatch
from models.build import build_decoder
from sharding.parallelize import ParallelModel, parallelize
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.models.code_reference import SIZES, coded
from tests.models.sequences import make_batch, take
from trainer.objectives.next_code import NextCodeInputs, NextCodeLoss

ITEMS, SAMPLES, STEPS, ACTIONS = 40, 6, 3, 2
EXPERTS = {"num_experts": 4, "top_k": 2, "expert_width": 6, "bias_rate": 0.05}
INPUTS = {"dropout": 0.2} | dict.fromkeys(("times", "actions", "dwell_times", "item_table"), True)
SIZED = {"width": 8, "num_heads": 2, "feedforward_width": 8, "experts": EXPERTS}
DECODER: TypeAdapter[Decoder] = TypeAdapter(Decoder)
MODELS: dict[str, dict[str, Any]] = {
    "onerec": SIZED
    | {
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "history": 5,
        "positive_history": 3,
        "lifelong": {"history": 7, "num_queries": 2, "num_layers": 1},
    },
    "lazy_decoder": SIZED | {"num_layers": 2, "dense_layers": 1, "kv_split": 2, "history": 7},
    "tiger": {
        "width": 8,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "head_width": 4,
        "feedforward_width": 8,
        "history": 7,
    },
    "hstu_decoder": {"width": 8, "qk_width": 4, "v_width": 4, "num_layers": 1},
}


@dataclass(frozen=True)
class Case:
    """A way to train that must not matter."""

    model: str
    stage: int
    one_rank_only: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of it, on one rank."""

    losses: list[float]
    balance: list[Tensor]
    """Of every mixture; none in models without."""
    logits: Tensor


def make_policy(case: Case) -> ParallelModel:
    # Of the recipe only sharding and training matter here; the decoder is built beside it.
    recipe = Recipe.model_validate(
        {
            "name": "case",
            "output": "memory://case",
            "data": {"source": {"kind": "public", "name": "ml-100k"}},
            "model": {"kind": "sasrec"},
            "training": {"zero_stage": case.stage},
        }
    )
    config = DECODER.validate_python({"kind": case.model} | INPUTS | MODELS[case.model])
    torch.manual_seed(5)
    sizes = CatalogueSizes(ITEMS, 9, {}, {}, SIZES, ACTIONS, (), True)
    model = build_decoder(config, sizes, recipe.tables, 7)
    return parallelize(
        NextCodeLoss(model, NextCodeConfig(normalization="codebook")),
        model.table_specs(),
        recipe,
        current_context("cpu"),
        total_steps=STEPS,
        optimizer=recipe.training.optimizer,
        sparse_lr=0.05,
    )


def requests(step: int, samples: list[int]) -> JaggedBatch:
    whole = make_batch([1 + (step + b) % 7 for b in range(SAMPLES)], ITEMS, seed=step)
    return coded(take(whole, samples), ACTIONS)


def inputs(model: TableModel, step: int, samples: list[int]) -> NextCodeInputs:
    assert isinstance(model, CodeDecoder)
    batch = requests(step, samples)
    targets = batch.sample_ids * 3 + 1
    if model.supervision == "every_position":
        targets = batch.target_ids
    codes = torch.stack([(targets * 5 + level) % size for level, size in enumerate(SIZES)], dim=1)
    return NextCodeInputs(batch, targets[:, None], codes[:, None], step_seed=step)


def outcome(case: Case) -> Outcome:
    """Train three steps of two micro batches, then score one request's codes by steps."""
    policy = make_policy(case)
    rank, world = policy.ctx.rank, policy.ctx.world_size
    own = list(range(rank, SAMPLES, world))
    if case.one_rank_only:
        own = [] if rank == 0 else list(range(SAMPLES))
    parts = own[: len(own) // 2], own[len(own) // 2 :]
    losses = [
        policy.train_step([inputs(policy.model, step, part) for part in parts]).loss
        for step in range(STEPS)
    ]
    model = policy.model
    balance = [buffer for name, buffer in model.named_buffers() if name.endswith("balance")]
    batch = requests(STEPS, [1, 4])

    def write(model: TableModel, embeddings: dict[str, Tensor]) -> Tensor:
        assert isinstance(model, CodeDecoder)
        context = model.encode(batch, embeddings, 0, "last")
        cache = model.new_cache(context)
        model.step(context, cache, 0, None)
        cache.select(torch.zeros(2, 2, dtype=torch.int64))
        return model.step(context, cache, 1, torch.tensor([[0, 3], [2, 6]]))

    return Outcome(losses, [b.clone() for b in balance], policy.infer(batch, write))


def outcomes(cases: list[Case]) -> list[Outcome]:
    return [outcome(case) for case in cases]


def test_stages_worlds_and_empty_ranks_are_alike() -> None:
    [alone] = run_ranks(1, outcomes, [Case(model, 0) for model in MODELS], timeout=240)
    cases = [Case(model, stage) for model in MODELS for stage in (0, 1, 2, 3)]
    cases += [Case(model, stage, one_rank_only=True) for model in MODELS for stage in (0, 3)]
    ranks = run_ranks(2, outcomes, cases, timeout=240)
    for expected, model in zip(alone, MODELS, strict=True):
        assert bool(expected.balance) == ("experts" in MODELS[model])
        assert all(b.any() for b in expected.balance), "experts were loaded unevenly"
        for found, case in ((x, c) for rank in ranks for x, c in zip(rank, cases, strict=True)):
            if case.model == model:
                assert_alike(found, expected, case)


def assert_alike(found: Outcome, expected: Outcome, case: Case) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-5), case
    assert len(found.balance) == len(expected.balance)
    assert all(map(torch.equal, found.balance, expected.balance)), case
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-3)
