"""What a stage asks of the cluster."""

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.layout import RunLayout
from configs.load import load_recipe
from configs.recipe import StageName
from data_loaders.manifest import build_manifest, write_manifest
from data_loaders.semantic_ids import write_semantic_ids
from data_loaders.synthetic import write_synthetic
from launch.stages import GRAPH, StageContext


class AskedError(Exception):
    """Says whether a group may be ended to grow."""


class Context(StageContext):
    """Runs nothing."""

    def _run(self, entry: str, grows: bool, more: dict[str, Any]) -> Any:
        raise AskedError(grows)


@pytest.mark.parametrize(
    ("stage", "grows"), [("train", True), ("evaluate", False), ("recommend", False)]
)
def test_only_what_saves_is_ended_to_grow(stage: StageName, grows: bool) -> None:
    recipe = load_recipe("quickstart", []).recipe
    done = {"train": {"checkpoint": {"url": "x", "hash": "y"}}}
    context = Context(stage, recipe, RunLayout("/nowhere"), "0" * 12, done)
    with pytest.raises(AskedError) as asked:
        GRAPH[stage].run(context)
    assert asked.value.args == (grows,)


@pytest.mark.parametrize(
    ("alignment", "told"),
    [
        ("{kind: dpo}", "finds no pair to train on"),
        ("{kind: grpo, rule: {kind: rating}}", "finds no pair to measure with"),
        ("{kind: sprec, rule: {kind: rating}}", "finds no pair to measure with"),
        ("{kind: gbpo, logged: {rule: {kind: rating}}}", "finds nothing to learn from"),
    ],
)
def test_rules_that_find_nothing_are_told_before_a_worker_starts(
    alignment: str, told: str, tmp_path: Path
) -> None:
    """Of a data set without a shard, which needs no Ray to be read; each kind by what it needs."""
    recipe = load_recipe("quickstart", [f"alignment={alignment}"]).recipe
    layout = RunLayout(str(tmp_path))
    content = write_synthetic(layout.data, 9, 9, 5, 0).model_dump(exclude={"fingerprint"})
    write_manifest(layout.data, build_manifest(**content | {"shards": ()}))
    done = {"prepare": {"data": "d"}, "train": {"checkpoint": {"url": "x", "hash": "y"}}}
    with pytest.raises(ValueError, match=told):
        GRAPH["align"].run(Context("align", recipe, layout, "0" * 12, done))


def test_a_table_of_semantic_ids_in_the_place_of_another_is_noticed(tmp_path: Path) -> None:
    data, ids = str(tmp_path / "data"), str(tmp_path / "ids")
    items = write_synthetic(data, 9, 9, 5, 0).num_items
    codes = torch.arange(items + 1).clamp(min=1)[:, None] - 1
    check, made = GRAPH["tokenize"].check, []
    assert check is not None
    for table in (codes, codes.flip(0)):
        manifest = write_semantic_ids(ids, data, table, (items,), tokenizer="made by hand")
        made.append({"url": ids, "semantic_ids": manifest.fingerprint})
    check(made[1])
    with pytest.raises(ValueError, match="ids holds other semantic ids now"):
        check(made[0])
