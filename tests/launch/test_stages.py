"""What a stage asks of the cluster."""

from pathlib import Path
from typing import Any

import pytest

from configs.layout import RunLayout
from configs.load import load_recipe
from configs.recipe import StageName
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


def test_impressions_are_looked_at_before_a_worker_starts(tmp_path: Path) -> None:
    chosen = ["alignment={kind: gbpo, logged: {rule: {kind: rating}}}"]
    recipe = load_recipe("quickstart", chosen).recipe
    layout = RunLayout(str(tmp_path))
    done = {"prepare": {"data": "d"}, "train": {"checkpoint": {"url": "x", "hash": "y"}}}
    context = Context("align", recipe, layout, "0" * 12, done)
    write_synthetic(layout.data, 9, 9, 5, 0, ratings=False)
    with pytest.raises(ValueError, match=r"choose another alignment\.logged\.rule\.kind"):
        GRAPH["align"].run(context)
