"""Which settings make a stage run anew."""

import pytest

from configs.load import load_recipe
from launch.stage_inputs import train_inputs

DONE = {"prepare": {"data": "d"}}


def inputs(*overrides: str) -> object:
    return train_inputs(load_recipe("quickstart", list(overrides)).recipe, DONE)


@pytest.mark.parametrize(
    "override",
    [
        "training.zero_stage=3",
        "sharding.default=table_wise",
        "sharding.placement.item=auto",
        "sharding.hbm_gb=2",
        "sharding.max_replicated_rows=7",
        "cluster.num_workers=1",
        "data.loader.tokens_per_micro_batch=4096",
        "data.loader.accumulation=2",
    ],
)
def test_another_layout_of_the_same_training_goes_on(override: str) -> None:
    assert inputs(override) == inputs()


@pytest.mark.parametrize(
    "override",
    [
        "training.precision=bf16",
        "sharding.placement.item=replicated",
        "sharding.default=column_wise",  # row-wise Adagrad then keeps a sum per block
        "sharding.optimizer.lr=0.5",
    ],
)
def test_what_changes_numbers_is_another_training(override: str) -> None:
    assert inputs(override) != inputs()


def test_columns_do_not_count_where_every_weight_has_its_own_sum() -> None:
    adagrad = "sharding.optimizer.kind=adagrad"
    assert inputs(adagrad, "sharding.default=column_wise") == inputs(adagrad)
