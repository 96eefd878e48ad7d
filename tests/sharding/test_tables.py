"""Sharded tables against an unsharded reference: lookup, updates, initial values, state."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from configs.sharding import Placement, SparseOptimizerConfig
from models.base import TableSpec
from sharding.embedding_plan import Shard
from sharding.embedding_shard import initialize_rows
from tests.harness import run_ranks
from tests.sharding.reference import ReferenceTable, make_tables

SPECS = (
    TableSpec("item", 23, 10, 0.5),  # a width that the kernels must pad
    TableSpec("user_age", 3, 10, 0.5),  # fewer rows than some worlds have ranks
    TableSpec("side_kind", 9, 16, 0.5),
)
PLACEMENTS: list[Placement] = ["row_wise", "table_wise", "column_wise"]
KINDS = ["rowwise_adagrad", "adagrad", "sgd"]


def rank_ids(rank: int, step: int, empty_rank: int) -> dict[str, torch.Tensor]:
    """Distinct ids of a rank, id 0 among them; `empty_rank` looks nothing up."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {
        spec.name: torch.randperm(spec.num_rows, generator=generator)[
            : 0 if rank == empty_rank else 2 + rank + step
        ]
        for spec in SPECS
    }


def rank_grads(ids: dict[str, torch.Tensor], rank: int, step: int) -> dict[str, torch.Tensor]:
    """The gradient that reaches the looked-up rows of a rank."""
    generator = torch.Generator().manual_seed(7000 + 100 * step + rank)
    widths = {spec.name: spec.width for spec in SPECS}
    return {
        name: torch.randn(len(values), widths[name], generator=generator)
        for name, values in ids.items()
    }


def three_updates(placement: Placement, kind: str, empty_rank: int) -> dict[str, list]:
    """Lookups of three steps and the tables after them, with a learning rate that changes."""
    optimizer = SparseOptimizerConfig(kind=kind, lr=0.5, eps=1e-3)
    tables = make_tables(SPECS, placement, optimizer)
    rank, world_size = tables._ctx.rank, tables._ctx.world_size
    seen: list[dict[str, torch.Tensor]] = []
    for step in range(3):
        tables.set_lr(0.5 / (step + 1))
        ids = rank_ids(rank, step, empty_rank)
        rows = tables.lookup(ids)
        seen.append({name: value.detach().clone() for name, value in rows.items()})
        grads = rank_grads(ids, rank, step)
        torch.autograd.backward(list(rows.values()), [grads[name] * world_size for name in rows])
    return {"rows": seen, "tables": {name: tables.gather(name) for name in tables.names}}


CASES = [
    *((w, placement, kind, -1) for w in (1, 2) for placement in PLACEMENTS for kind in KINDS),
    *((2, placement, "rowwise_adagrad", 1) for placement in PLACEMENTS),  # a rank without ids
    *((4, placement, "rowwise_adagrad", 2) for placement in PLACEMENTS),  # ranks without rows
]


def all_updates(cases: list[tuple]) -> list[dict[str, list]]:
    return [three_updates(placement, kind, empty) for _, placement, kind, empty in cases]


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple, list]:
    """What every rank found in every case; one start of processes for each world size."""
    found: dict[tuple, list] = {}
    for world_size in (1, 2, 4):
        cases = [case for case in CASES if case[0] == world_size]
        ranks = run_ranks(world_size, all_updates, cases)
        found |= {case: [rank[at] for rank in ranks] for at, case in enumerate(cases)}
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_updates_equal_the_unsharded_reference(case: tuple, outcomes: dict) -> None:
    check_three_updates(*case, outcomes[case])


def check_three_updates(
    world_size: int, placement: Placement, kind: str, empty_rank: int, results: list
) -> None:
    optimizer = SparseOptimizerConfig(kind=kind, lr=0.5, eps=1e-3)
    for spec in SPECS:
        blocks = min(world_size, spec.width // 4) if placement == "column_wise" else 1
        twin = ReferenceTable(spec, optimizer, seed=7, column_blocks=blocks)
        for step in range(3):
            ids = [rank_ids(rank, step, empty_rank)[spec.name] for rank in range(world_size)]
            for rank, result in enumerate(results):
                torch.testing.assert_close(result["rows"][step][spec.name], twin.weight[ids[rank]])
            grads = [
                rank_grads(rank_ids(rank, step, empty_rank), rank, step)[spec.name]
                for rank in range(world_size)
            ]
            twin.update(torch.cat(ids), torch.cat(grads), 0.5 / (step + 1))
        for result in results:
            torch.testing.assert_close(
                result["tables"][spec.name], twin.weight, rtol=1e-5, atol=1e-6
            )
            assert not result["tables"][spec.name][0].any(), "the padding row stays zero"


def whole_tables(placement: Placement) -> dict[str, torch.Tensor]:
    tables = make_tables(SPECS, placement, SparseOptimizerConfig())
    return {name: tables.gather(name) for name in tables.names}


def test_initial_rows_depend_on_nothing_but_seed_table_row_and_column() -> None:
    one = run_ranks(1, whole_tables, "row_wise")[0]
    for world_size, placement in [(2, "row_wise"), (2, "column_wise"), (2, "table_wise")]:
        other = run_ranks(world_size, whole_tables, placement)[0]
        for name in one:
            assert torch.equal(one[name], other[name])


def test_initial_values_are_truncated_normal() -> None:
    spec = TableSpec("item", 4001, 50, 0.02)
    full = torch.empty(4001, 50)
    initialize_rows(full, spec, Shard(0, 0, 0, 4001, 50), seed=3)
    values = full[1:] / spec.init_std
    assert not full[0].any()
    assert values.abs().max() <= 2.0
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 0.8796) < 0.005  # of a normal cut at two standard deviations
    assert len(values.unique()) > 0.99 * values.numel()
    other = torch.empty(4001, 50)
    initialize_rows(other, spec, Shard(0, 0, 0, 4001, 50), seed=4)
    assert (other == full)[1:].float().mean() < 0.01


def save_state(placement: Placement, kind: str, path: str) -> dict[str, torch.Tensor]:
    tables = make_tables(SPECS, placement, SparseOptimizerConfig(kind=kind, lr=0.5), seed=7)
    update_once(tables, step=0)
    dcp.save(tables.state_dict(), checkpoint_id=path)
    update_once(tables, step=1)
    return {name: tables.gather(name) for name in tables.names}


def load_state(placement: Placement, kind: str, path: str) -> dict[str, torch.Tensor]:
    tables = make_tables(SPECS, placement, SparseOptimizerConfig(kind=kind, lr=0.5), seed=8)
    state = tables.state_dict()
    dcp.load(state, checkpoint_id=path)
    tables.load_state_dict(state)
    update_once(tables, step=1)
    return {name: tables.gather(name) for name in tables.names}


def update_once(tables, step: int) -> None:
    """A global batch that does not depend on the world size: rank 0 looks everything up."""
    rank = tables._ctx.rank
    ids = rank_ids(0, step, empty_rank=-1)
    if rank:
        ids = {name: values[:0] for name, values in ids.items()}
    rows = tables.lookup(ids)
    grads = rank_grads(ids, 0, step)
    torch.autograd.backward(
        list(rows.values()), [grads[name] * tables._ctx.world_size for name in rows]
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_checkpoint_holds_weights_and_optimizer_state_exactly(placement, tmp_path) -> None:
    saved = run_ranks(2, save_state, placement, "rowwise_adagrad", str(tmp_path))[0]
    loaded = run_ranks(2, load_state, placement, "rowwise_adagrad", str(tmp_path))[0]
    for name, table in saved.items():
        assert torch.equal(table, loaded[name])


@pytest.mark.parametrize(
    ("written", "read", "ranks"),
    [
        ("row_wise", "row_wise", (2, 1)),
        ("row_wise", "table_wise", (2, 2)),
        ("table_wise", "row_wise", (1, 2)),
    ],
)
def test_checkpoint_reshards_over_rows(written, read, ranks, tmp_path) -> None:
    saved = run_ranks(ranks[0], save_state, written, "rowwise_adagrad", str(tmp_path))[0]
    loaded = run_ranks(ranks[1], load_state, read, "rowwise_adagrad", str(tmp_path))[0]
    for name, table in saved.items():
        torch.testing.assert_close(table, loaded[name], rtol=1e-6, atol=1e-7)
