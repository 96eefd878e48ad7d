"""The training step over both halves against plain PyTorch on one process."""

import itertools
import math
import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from configs.sharding import Placement, SparseOptimizerConfig
from configs.training import OptimizerConfig, ScheduleConfig
from sharding.loss_module import NonFiniteLossError
from sharding.parallelize import ParallelModel, learning_rate_factor
from tests.harness import run_ranks
from tests.sharding.toy import (
    NUM_ITEMS,
    SPECS,
    WIDTH,
    ToyReference,
    toy_inputs,
    toy_policy,
    toy_recipe,
)

SAMPLES = list(range(12))
ADAM = OptimizerConfig(lr=0.02, weight_decay=0.01)
SPARSE = SparseOptimizerConfig(lr=0.3, eps=1e-4)
STEPS = 3
POISONS = [(stage, poison) for stage in (0, 1, 2, 3) for poison in ("loss", "gradient")]


def micro_batches(rank: int, world_size: int, micro: int, deal: str, step: int) -> list:
    """This rank's share of a global batch: dealt out, or all of it to rank 0."""
    mine = SAMPLES[rank::world_size]
    if deal == "rank 0 only":
        mine = SAMPLES if rank == 0 else []
    return [toy_inputs(mine[at::micro], step) for at in range(micro)]


def snapshot(policy: ParallelModel) -> dict[str, Tensor]:
    """Every weight of both halves, whole."""
    ids = {spec.name: torch.arange(spec.num_rows) for spec in SPECS}
    tables = {f"table/{name}": rows for name, rows in policy.lookup(ids).items()}
    dense = policy.engine.full_weights()
    return tables | {name: value for name, value in dense.items() if "loss_module" in name}


@dataclass(frozen=True)
class Case:
    """A way to run three steps that must not matter."""

    placement: str
    world_size: int
    stage: int = 1
    micro: int = 1
    deal: str = "dealt"
    clip: float | None = None


CASES = [
    Case(placement, world_size)
    for placement in ("row_wise", "table_wise", "column_wise", "replicated")
    for world_size in (1, 2)
] + [
    Case(placement, 2, stage, micro, deal, clip)
    for placement in ("row_wise", "replicated")
    for stage in (0, 1, 2, 3)
    for micro, deal, clip in [(3, "dealt", None), (2, "rank 0 only", 0.05)]
]


def train_all(cases: list[Case]) -> list[tuple]:
    """Every case in turn, each with a policy of its own."""
    return [train(case.placement, case.stage, case.micro, case.deal, case.clip) for case in cases]


def train(placement, stage: int, micro: int, deal: str, clip: float | None = None) -> tuple:
    policy = toy_policy(toy_recipe(placement, stage), ADAM.model_copy(update={"clip_norm": clip}))
    rank, world_size = policy.ctx.rank, policy.ctx.world_size
    results = []
    for step in range(STEPS):
        result = policy.train_step(micro_batches(rank, world_size, micro, deal, step))
        results.append((result.loss, result.weight, result.metrics["hit"], result.step))
    return results, snapshot(policy)


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, list[tuple]]:
    """What every rank found in every case; one start of processes for each world size."""
    found: dict[Case, list[tuple]] = {}
    for world_size in (1, 2):
        cases = [case for case in CASES if case.world_size == world_size]
        ranks = run_ranks(world_size, train_all, cases, timeout=240)
        found |= {case: [rank[at] for rank in ranks] for at, case in enumerate(cases)}
    return found


def reference(placement, world_size: int, clip: float | None = None) -> tuple:
    replicated = tuple(spec.name for spec in SPECS if placement == "replicated")
    twin = ToyReference(
        ADAM.model_copy(update={"clip_norm": clip}),
        SPARSE,
        replicated,
        column_blocks=world_size if placement == "column_wise" else 1,
    )
    losses = [twin.step(SAMPLES, step, SPARSE.lr) for step in range(STEPS)]
    weights = {f"table/{spec.name}": twin.table(spec.name) for spec in SPECS}
    dense = {f"loss_module.{n}": p.detach() for n, p in twin.loss.named_parameters()}
    return losses, weights | dense


def check(found: list, placement, world_size: int, clip: float | None = None) -> None:
    losses, weights = reference(placement, world_size, clip)
    for results, state in found:
        assert [loss for loss, *_ in results] == pytest.approx(losses, rel=1e-5)
        assert [step for *_, step in results] == [1, 2, 3]
        assert state.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(state[name], value, rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_steps_equal_plain_pytorch(case: Case, outcomes: dict[Case, list[tuple]]) -> None:
    check(outcomes[case], case.placement, case.world_size, case.clip)


def test_placements_mix() -> None:
    placement = {"item": "row_wise", "user_age": "replicated"}
    found = run_ranks(2, train, placement, 2, 2, "dealt")
    twin = ToyReference(ADAM, SPARSE, ("user_age",))
    losses = [twin.step(SAMPLES, step, SPARSE.lr) for step in range(STEPS)]
    for results, state in found:
        assert [loss for loss, *_ in results] == pytest.approx(losses, rel=1e-5)
        for spec in SPECS:
            torch.testing.assert_close(state[f"table/{spec.name}"], twin.table(spec.name))


def train_on_nodes(ranks_per_node: list[int]) -> tuple:
    """Three steps where this rank's node has the given number of ranks."""
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node[int(os.environ["RANK"])])
    return train("table_wise", 1, 1, "dealt")


@pytest.mark.parametrize("ranks_per_node", [[2, 2, 2, 2], [3, 3, 3, 1]], ids=["even", "uneven"])
def test_nodes_of_any_size_train_alike(ranks_per_node: list[int]) -> None:
    check(run_ranks(4, train_on_nodes, ranks_per_node), "table_wise", 4)


WARM_UP = ScheduleConfig(warmup_steps=STEPS + 1)


def warm_up(placement: Placement) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, sparse learning rates and weights of three steps of a warm-up."""
    policy = toy_policy(
        toy_recipe(placement), ADAM.model_copy(update={"schedule": WARM_UP, "clip_norm": None})
    )
    rank, world_size = policy.ctx.rank, policy.ctx.world_size
    results = [
        policy.train_step(micro_batches(rank, world_size, 1, "dealt", step))
        for step in range(STEPS)
    ]
    return [r.loss for r in results], [r.sparse_lr for r in results], snapshot(policy)


@pytest.mark.parametrize("placement", ["row_wise", "replicated"])
def test_every_step_of_a_warm_up_uses_its_own_rate(placement: Placement) -> None:
    replicated = tuple(spec.name for spec in SPECS if placement == "replicated")
    twin = ToyReference(ADAM.model_copy(update={"clip_norm": None}), SPARSE, replicated)
    rates, losses = [SPARSE.lr * (step + 1) / (STEPS + 1) for step in range(STEPS)], []
    for step, rate in enumerate(rates):
        twin.adam.param_groups[0]["lr"] = ADAM.lr * rate / SPARSE.lr
        losses.append(twin.step(SAMPLES, step, rate))
    for found, told, state in run_ranks(2, warm_up, placement):
        assert found == pytest.approx(losses, rel=1e-5) and told == pytest.approx(rates)
        for spec in SPECS:
            expected = twin.table(spec.name)
            torch.testing.assert_close(state[f"table/{spec.name}"], expected, rtol=2e-5, atol=2e-6)


def metrics_of(world_size_free: bool) -> list:
    policy = toy_policy(toy_recipe("row_wise", 1), ADAM)
    found = []
    for step in range(STEPS):
        result = policy.train_step(
            micro_batches(policy.ctx.rank, policy.ctx.world_size, 1, "dealt", step)
        )
        found.append((result.weight, result.metrics["hit"], result.dense_grad_norm, result.lr))
    return found


def test_results_are_those_of_the_global_batch() -> None:
    one, two = run_ranks(1, metrics_of, True)[0], run_ranks(2, metrics_of, True)
    weight = sum(int((toy_inputs([s], 0).batch.target_ids > 0).sum()) for s in SAMPLES)
    assert one[0][0] == weight
    for found in two:
        for left, right in zip(found, one, strict=True):
            assert left == pytest.approx(right, rel=1e-5)


def poisoned_all() -> list[tuple[str, bool, bool]]:
    return [poisoned(stage, poison) for stage, poison in POISONS]


def poisoned(stage: int, poison: str) -> tuple[str, bool, bool]:
    """A sample of rank 1 is not finite in its second step."""
    policy = toy_policy(toy_recipe("row_wise", stage), ADAM, poisoned=1, poison=poison)
    rank, world_size = policy.ctx.rank, policy.ctx.world_size
    clean = [[s for s in SAMPLES if s != 1][rank::world_size], SAMPLES[rank::world_size]]
    policy.train_step([toy_inputs(clean[0], 0)], clean[0])
    before = snapshot(policy)
    with pytest.raises(NonFiniteLossError) as error:
        policy.train_step([toy_inputs(clean[1], 1)], clean[1])
    after = snapshot(policy)
    same = all(torch.equal(before[name], after[name]) for name in before)
    return str(error.value), same, policy.step == 1


def test_what_is_not_finite_stops_before_any_update() -> None:
    ranks = run_ranks(2, poisoned_all)
    for (_, poison), *found in zip(POISONS, *ranks, strict=True):
        messages = [message for message, _, _ in found]
        assert "step 2, rank 0" in messages[0] and "another rank" in messages[0]
        assert "step 2, rank 1 (samples 1, 3, 5, 7, 9, 11)" in messages[1]
        assert "nothing was updated" in messages[1]
        if poison == "loss":
            assert "another rank" not in messages[1]
        for _, same, step_kept in found:
            assert same, "weights changed"
            assert step_kept


def clipped() -> tuple[float, float, float]:
    """Norm of the change of the item table in one SGD step, and what clipping was told."""
    sparse = SparseOptimizerConfig(kind="sgd", lr=1.0, clip_norm=0.01)
    policy = toy_policy(toy_recipe("row_wise", 1, optimizer=sparse), ADAM)
    before = {name: policy.tables.gather(name) for name in policy.tables.names}
    inputs = toy_inputs(SAMPLES if policy.ctx.rank == 0 else [], 0)
    result = policy.train_step([inputs])
    change = math.sqrt(
        sum(float((policy.tables.gather(n) - before[n]).square().sum()) for n in before)
    )
    return change, result.sparse_grad_norm, result.sparse_lr


def test_sparse_clipping_bounds_the_update() -> None:
    for change, norm, lr in run_ranks(2, clipped):
        assert norm > 0.02
        assert change == pytest.approx(0.01 * lr, rel=1e-3)


def half_precision() -> tuple[list, torch.dtype]:
    policy = toy_policy(toy_recipe("row_wise", 2, precision="bf16"), ADAM, total_steps=30)
    inputs = micro_batches(policy.ctx.rank, policy.ctx.world_size, 2, "dealt", 0)
    losses = [policy.train_step(inputs).loss for _ in range(30)]
    return losses, policy.query(inputs[0].batch).dtype


def test_bf16_learns_and_differs_from_fp32() -> None:
    (losses, dtype), _ = run_ranks(2, half_precision)
    exact = run_ranks(2, train, "row_wise", 2, 2, "dealt")[0][0][0][0]
    assert losses[0] != exact
    assert losses[0] == pytest.approx(exact, rel=0.02)
    assert losses[-1] < 0.7 * losses[0]
    assert dtype == torch.float32


def evaluation(placement: str, stage: int) -> tuple:
    """Queries and keys before a step, after it, and on a rank that asks nothing."""
    policy = toy_policy(toy_recipe(placement, stage), ADAM)
    inputs = toy_inputs(SAMPLES if policy.ctx.rank == 0 else [], 0)
    queries = policy.query(inputs.batch)
    ids = torch.tensor([5, 0, 5, NUM_ITEMS]) if policy.ctx.rank == 0 else torch.zeros(0).long()
    keys = policy.item_keys(ids)
    rows = policy.lookup({"item": ids})["item"]
    policy.train_step([inputs])
    return queries, keys, rows, policy.query(inputs.batch)


@pytest.mark.parametrize(("placement", "stage"), [("row_wise", 1), ("replicated", 3)])
def test_queries_and_keys_are_those_of_the_model_in_eval_mode(placement, stage: int) -> None:
    (queries, keys, rows, later), (nothing, no_keys, no_rows, _) = run_ranks(
        2, evaluation, placement, stage
    )
    replicated = tuple(spec.name for spec in SPECS if placement == "replicated")
    twin = ToyReference(ADAM, SPARSE, replicated)
    inputs = toy_inputs(SAMPLES, 0)
    model = twin.loss.model.eval()

    def expected() -> Tensor:
        ids = model.input_ids(inputs.batch)
        with torch.no_grad():
            rows_of = {name: twin.table(name)[values] for name, values in ids.items()}
            return model(inputs.batch, rows_of, 0)

    torch.testing.assert_close(queries, expected())
    item = twin.table("item")
    torch.testing.assert_close(rows, item[[5, 0, 5, NUM_ITEMS]])
    torch.testing.assert_close(keys, model.item_keys(item[[5, 0, 5, NUM_ITEMS]]))
    assert not rows[1].any()
    assert (
        nothing.shape == (0, WIDTH) and no_keys.shape == (0, WIDTH) and no_rows.shape == (0, WIDTH)
    )
    model.train()
    twin.step(SAMPLES, 0, SPARSE.lr)
    model.eval()
    torch.testing.assert_close(later, expected(), rtol=2e-5, atol=2e-6)


def outside() -> str:
    policy = toy_policy(toy_recipe("row_wise", 1), ADAM)
    inputs = toy_inputs(SAMPLES, 0)
    broken = replace(inputs, negative_ids=inputs.negative_ids + NUM_ITEMS)
    with pytest.raises(ValueError) as error:
        policy.train_step([broken])
    return str(error.value)


def test_an_id_beyond_the_table_is_named() -> None:
    message = run_ranks(1, outside)[0]
    assert "table 'item' has rows 0 to 40" in message and "80" in message


def test_schedule_warms_up_and_falls() -> None:
    cosine = ScheduleConfig(kind="cosine", warmup_steps=4, final_ratio=0.1)
    factors = [learning_rate_factor(cosine, step, 24) for step in range(30)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[4:25]))
    assert factors[24:] == pytest.approx([0.1] * 6)
    constant = ScheduleConfig(warmup_steps=0)
    assert learning_rate_factor(constant, 0, 5) == learning_rate_factor(constant, 99, 5) == 1.0
