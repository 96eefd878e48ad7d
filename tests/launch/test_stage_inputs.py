"""Which settings make a stage run anew."""

from pathlib import Path
from typing import Any

import pytest

from configs import storage
from configs.layout import RunLayout
from configs.load import load_recipe
from launch.stage_inputs import (
    align_inputs,
    measured_policies,
    note_start,
    tokenize_inputs,
    train_inputs,
    trained_checkpoint,
)

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


def test_a_run_does_not_go_on_from_what_it_replaces(tmp_path: Path) -> None:
    own = f"output={tmp_path}"
    with pytest.raises(ValueError, match=r"training.start.run=.* is this recipe's own output"):
        inputs(own, f"training.start.run={tmp_path}")
    recipe = load_recipe("beauty/tiger", [own, f"tokenizer.frozen={tmp_path}"]).recipe
    with pytest.raises(ValueError, match=r"tokenizer.frozen=.* is this recipe's own output"):
        tokenize_inputs(recipe, DONE)
    (tmp_path / "link").symlink_to(".")
    with pytest.raises(ValueError, match=r"training.start.run=.* is this recipe's own output"):
        inputs(own, f"training.start.run={tmp_path}/link")


def test_a_training_that_began_with_a_run_goes_on_when_that_run_is_gone(tmp_path: Path) -> None:
    start, moved = tmp_path / "start", tmp_path / "moved"
    recipe = [f"output={tmp_path / 'own'}", f"training.start.run={start}"]
    with pytest.raises(ValueError, match="holds no finished training"):
        inputs(*recipe)
    record = RunLayout(str(start)).stage_record("train")
    there = {"url": "u", "hash": "h"}
    storage.write_sealed(record, {"outputs": {"checkpoint": there}})
    began = inputs(*recipe)
    assert began["start"] == "h"
    note_start(load_recipe("quickstart", recipe).recipe, there)
    start.rename(moved)
    assert inputs(*recipe) == began
    with pytest.raises(ValueError, match="holds no finished training"):  # of another run no word
        inputs(recipe[0], f"training.start.run={tmp_path / 'other'}")
    storage.write_sealed(record, {"outputs": {"checkpoint": there | {"hash": "i"}}})
    assert inputs(*recipe)["start"] == "i"  # another training lies there now


def test_alignment_goes_on_from_any_whole_copy_of_the_weights() -> None:
    recipe = load_recipe("quickstart", ["alignment={kind: dpo}"]).recipe
    before = {"url": "best", "hash": "h"}  # a record of before does not tell the weights
    saved = before | {"weights": "w"}

    def begun(checkpoint: dict[str, str]) -> dict[str, Any]:
        return align_inputs(recipe, DONE | {"train": {"checkpoint": checkpoint}})

    assert begun(saved | {"url": "newest", "hash": "i"}) == begun(saved)
    assert begun(saved | {"weights": "v"}) != begun(saved)
    assert begun(before)["start"] == "h"


def test_what_guardrails_kept_back_is_measured_beside_what_is_handed_on() -> None:
    def measured(selected: int, last: int, *alarms: dict[str, Any]) -> list[str]:
        ends = {"checkpoint": {"step": selected}, "last_checkpoint": {"step": last}}
        ends["alarms"] = list(alarms)  # type: ignore[assignment]
        return list(measured_policies({"train": {"checkpoint": {}}, "align": ends}))

    assert measured(0, 7) == ["pretrained", "aligned", "not handed on"]
    back = {"action": "roll_back", "step": 4}
    assert measured(0, 7, back) == ["pretrained", "aligned", "not handed on"]
    assert measured(0, 4, back) == ["pretrained", "aligned"]
    assert measured(3, 7) == measured(7, 7) == measured(0, 0) == ["pretrained", "aligned"]
    assert list(measured_policies({"train": {"checkpoint": {}}})) == ["pretrained"]


def test_another_runs_training_is_named_by_a_whole_record_alone(tmp_path: Path) -> None:
    record, there = RunLayout(str(tmp_path)).stage_record("train"), {"url": "u", "hash": "h"}
    with pytest.raises(ValueError, match="holds no finished training"):
        trained_checkpoint(str(tmp_path), "training.start.run")
    storage.write_sealed(record, {"outputs": {"checkpoint": there | {"step": 3}}})
    assert trained_checkpoint(str(tmp_path), "training.start.run") == there | {"step": 3}
    storage.write_bytes(record, storage.read_bytes(record).replace(b'"h"', b'"i"'))
    with pytest.raises(ValueError, match="damaged .it was changed since"):
        trained_checkpoint(str(tmp_path), "training.start.run")
    odd: list[Any] = [[], {}, {"outputs": 3}, {"outputs": {}}, {"outputs": {"checkpoint": "c"}}]
    odd += [{"outputs": {"checkpoint": there | {"url": 3}}}, {"outputs": {"checkpoint": {}}}]
    for value in odd:
        storage.write_json(record, value)
        with pytest.raises(ValueError, match=r"train\.json .*delete it"):
            trained_checkpoint(str(tmp_path), "training.start.run")
