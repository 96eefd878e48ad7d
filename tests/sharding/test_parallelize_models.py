"""The shipped models and objective on several ranks: stages, placements and empty ranks alike."""

from dataclasses import dataclass

import pytest
import torch

from configs.data import DataConfig, ParquetSource
from configs.models import HSTUConfig, InitConfig, SASRecConfig
from configs.objectives import FullSoftmaxConfig, SampledSoftmaxConfig
from configs.recipe import Recipe
from configs.sharding import ShardingConfig
from configs.training import OptimizerConfig, TrainingConfig
from models.base import CatalogueSizes
from models.batch import JaggedBatch
from models.build import build_model
from sharding.parallelize import parallelize
from sharding.process_group import current_context
from tests.harness import run_ranks
from trainer.objectives.negatives import draw_negatives
from trainer.objectives.next_item import NextItemLoss

NUM_ITEMS, SAMPLES, STEPS, MAX_LENGTH = 50, 10, 3, 12


@dataclass(frozen=True)
class Case:
    """A way to train a model that must not matter to its losses."""

    model: str
    world_size: int = 2
    stage: int = 1
    placement: str = "row_wise"
    one_rank_only: bool = False
    precision: str = "fp32"


CASES = [
    *(Case(model, 1, 0) for model in ("hstu", "sasrec")),
    *(Case(model, stage=stage) for model in ("hstu", "sasrec") for stage in (0, 1, 2, 3)),
    *(Case("hstu", stage=stage, one_rank_only=True) for stage in (0, 1, 2, 3)),
    Case("hstu", placement="table_wise"),
    Case("hstu", stage=3, precision="bf16"),
    Case("sasrec", stage=2, precision="bf16"),
]


def jagged(sample_ids: list[int], step: int) -> JaggedBatch:
    """Random sequences; sample 3 is empty."""
    lengths, items, targets, times = [], [], [], []
    for sample in sample_ids:
        generator = torch.Generator().manual_seed(100 * step + sample)
        length = 0 if sample == 3 else 2 + sample % 7
        ids = torch.randint(1, NUM_ITEMS + 1, (length + 1,), generator=generator)
        lengths.append(length)
        items.append(ids[:length])
        targets.append(ids[1:])
        times.append(torch.arange(length + 1) * (60 + sample))
    none = [torch.zeros(0, dtype=torch.int64)]
    return JaggedBatch(
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        user_ids=torch.tensor(sample_ids, dtype=torch.int64) + 1,
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        item_ids=torch.cat(items or none),
        timestamps=torch.cat([time[:-1] for time in times] or none),
        next_timestamps=torch.cat([time[1:] for time in times] or none),
        target_ids=torch.cat(targets or none),
    )


def losses(case: Case) -> list[float]:
    """Losses of three steps, two micro batches each, dropout on."""
    ctx = current_context("cpu")
    config = {
        "hstu": HSTUConfig(width=18, qk_width=8, v_width=8, num_heads=2, dropout=0.2),
        "sasrec": SASRecConfig(width=18, num_heads=2, feedforward_width=16, dropout=0.2),
    }[case.model]
    recipe = Recipe(
        name="case",
        output="memory://case",
        data=DataConfig(source=ParquetSource(url="memory://case")),
        model=config,
        sharding=ShardingConfig(default=case.placement),  # type: ignore[arg-type]
        training=TrainingConfig(zero_stage=case.stage, precision=case.precision),  # type: ignore[arg-type]
    )
    torch.manual_seed(2)
    model = build_model(
        config, CatalogueSizes(NUM_ITEMS, SAMPLES, {}, {}), InitConfig(), MAX_LENGTH
    )
    objective = {
        "hstu": SampledSoftmaxConfig(num_negatives=6, shared="position"),
        "sasrec": FullSoftmaxConfig(),
    }[case.model]
    policy = parallelize(
        NextItemLoss(model, objective, NUM_ITEMS),
        model.table_specs(),
        recipe,
        ctx,
        total_steps=STEPS,
        optimizer=OptimizerConfig(lr=0.01),
        sparse_lr=0.05,
    )
    mine = list(range(SAMPLES))[ctx.rank :: ctx.world_size]
    if case.one_rank_only:
        mine = list(range(SAMPLES)) if ctx.rank == 0 else []
    found = []
    for step in range(STEPS):
        batches = [jagged(mine[at::2], step) for at in (0, 1)]
        inputs = [draw_negatives(objective, b, NUM_ITEMS, seed=1, step=step) for b in batches]
        found.append(policy.train_step(inputs, mine).loss)
    queries = policy.query(jagged(mine, 0))
    assert queries.isfinite().all()
    return found


def all_losses(cases: list[Case]) -> list[list[float]]:
    return [losses(case) for case in cases]


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, list[list[float]]]:
    """Losses on every rank, by case."""
    found: dict[Case, list[list[float]]] = {}
    for world_size in (1, 2):
        cases = [case for case in CASES if case.world_size == world_size]
        ranks = run_ranks(world_size, all_losses, cases, timeout=240)
        found |= {case: [rank[at] for rank in ranks] for at, case in enumerate(cases)}
    return found


@pytest.mark.parametrize("case", CASES[2:], ids=str)
def test_losses_are_those_of_one_rank(case: Case, outcomes: dict) -> None:
    expected = outcomes[Case(case.model, 1, 0)][0]
    tolerance = 0.02 if case.precision == "bf16" else 2e-5
    for found in outcomes[case]:
        assert found == pytest.approx(expected, rel=tolerance)
    if case.precision == "bf16":
        assert outcomes[case][0] != expected
