"""Plans of tables: what goes where, in worlds that do not exist here."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.sharding import Placement, ShardingConfig, SparseOptimizerConfig
from models.base import TableSpec
from sharding.embedding_plan import TablePlan, agree_on_plan, plan_tables
from sharding.process_group import current_context
from tests.harness import run_ranks

ITEM = TableSpec("item", 3_500_000, 50, 0.02)
AGE = TableSpec("user_age", 8, 50, 0.02)


def cells(table: TablePlan) -> int:
    return sum(shard.rows * shard.columns for shard in table.shards)


@given(
    rows=st.integers(1, 200),
    width=st.integers(4, 70),
    world_size=st.integers(1, 17),
    placement=st.sampled_from(["row_wise", "table_wise", "column_wise"]),
)
def test_shards_tile_the_table_and_what_is_stored(
    rows: int, width: int, world_size: int, placement: Placement
) -> None:
    spec = TableSpec("item", rows, width, 0.02)
    plan = plan_tables([spec], ShardingConfig(default=placement), world_size, "cpu")
    (table,) = plan.tables
    covered = set()
    for shard in table.shards:
        assert 0 <= shard.rank < world_size
        for row in range(shard.row, shard.row + shard.rows):
            covered |= {
                (row, column) for column in range(shard.column, shard.column + shard.columns)
            }
    assert len(covered) == cells(table) == rows * width
    boxes = [table.stored(shard) for shard in table.shards]
    for shard, box in zip(table.shards, boxes, strict=True):
        assert box.rows >= max(shard.rows, 1), "no rank holds an empty shard in memory"
        assert box.columns >= shard.columns and box.columns % 4 == 0
        if shard.rows:
            assert box.row == shard.row, "padding rows lie behind the table's"
    assert sum(box.rows * box.columns for box in boxes) == (
        table.stored_rows * table.stored_width * table.column_blocks
    )


def test_auto_takes_what_the_planner_says_for_worlds_that_do_not_exist() -> None:
    plan = plan_tables([ITEM, AGE], ShardingConfig(), 64, "cuda")
    assert {table.placement for table in plan.tables} <= {"row_wise", "table_wise"}
    assert plan.tables[0].placement == "row_wise"
    assert len({shard.rank for shard in plan.tables[0].shards}) == 64


def test_table_wise_tables_are_spread_over_ranks() -> None:
    specs = [TableSpec(f"side_{at}", 1000, 16, 0.02) for at in range(4)]
    plan = plan_tables(specs, ShardingConfig(default="table_wise"), 4, "cpu")
    assert {table.shards[0].rank for table in plan.tables} == {0, 1, 2, 3}


def test_render_names_every_table_and_counts_bytes() -> None:
    config = ShardingConfig.model_construct(
        default="row_wise",
        placement={"user_age": "replicated"},
        optimizer=SparseOptimizerConfig(),
        max_replicated_rows=100,
        hbm_gb=None,
    )
    text = plan_tables([ITEM, AGE], config, 2, "cpu").render()
    assert "3,500,000" in text and "row_wise" in text and "replicated" in text
    assert "ranks 0-1: 1,750,000 × 50" in text
    weights = (1_750_000 * 50 + 8 * 50) * 4
    assert f"ranks 0-1: weights {weights / 2**20:.1f} MiB, optimizer 6.7 MiB" in text


@pytest.mark.parametrize(
    ("kind", "elements"), [("rowwise_adagrad", 500), ("adagrad", 8000), ("sgd", 0)]
)
def test_optimizer_bytes_follow_its_kind(kind: str, elements: int) -> None:
    optimizer = SparseOptimizerConfig(kind=kind)  # type: ignore[arg-type]
    spec = TableSpec("item", 1000, 16, 0.02)
    plan = plan_tables([spec], ShardingConfig(default="row_wise", optimizer=optimizer), 2, "cpu")
    assert plan.bytes_of_rank(1) == (500 * 16 * 4, elements * 4)


def test_tables_that_do_not_fit_are_refused_with_a_mend() -> None:
    for placement in ("auto", "row_wise"):
        config = ShardingConfig(default=placement, hbm_gb=0.01)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="add workers, or raise sharding.hbm_gb"):
            plan_tables([ITEM], config, 2, "cuda")


def test_a_large_table_is_not_replicated() -> None:
    config = ShardingConfig(default="replicated", max_replicated_rows=1000)
    with pytest.raises(ValueError, match="3,500,000 rows, too many to be replicated"):
        plan_tables([ITEM], config, 2, "cpu")


def owners_on_uneven_nodes(world_size: int, ranks_per_node: list[int]) -> list[int]:
    """Owners of table-wise tables as this rank knows them."""
    ctx = current_context("cpu")
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node[ctx.rank])
    specs = [TableSpec(f"side_{at}", 1000, 16, 0.02) for at in range(world_size - 1)]
    plan = agree_on_plan(specs, ShardingConfig(default="table_wise"), ctx)
    return [table.shards[0].rank for table in plan.tables]


def test_ranks_on_uneven_nodes_have_one_plan() -> None:
    assert (
        len({tuple(owners) for owners in run_ranks(4, owners_on_uneven_nodes, 4, [3, 3, 3, 1])})
        == 1
    )


def refused_by_one_machine() -> str:
    """What this rank says where rank 1 alone is too small for the table."""
    ctx = current_context("cpu")
    config = ShardingConfig(default="row_wise", hbm_gb=0.01 if ctx.rank == 1 else None)
    with pytest.raises(ValueError) as error:
        agree_on_plan([ITEM], config, ctx)
    return str(error.value)


def test_a_machine_that_is_too_small_is_refused_by_all_ranks_alike() -> None:
    sentences = run_ranks(2, refused_by_one_machine)
    assert sentences[0] == sentences[1]
    assert "more than 10.2 MiB" in sentences[0] and "add workers" in sentences[0]
