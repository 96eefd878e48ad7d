"""Whoever changed a setting to go on with a training is told that it is another one."""

from pathlib import Path

import pytest

from configs import storage
from configs.layout import RunLayout
from configs.load import load_recipe
from configs.recipe import Recipe
from configs.redaction import redacted
from configs.storage_faults import StorageError
from launch.other_trainings import other_trainings

THEIRS = "0123456789ab" + "0" * 52
OURS = "f" * 64


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe("quickstart", [f"output={tmp_path}"]).recipe


def saved(layout: RunLayout, recipe: Recipe, *steps: int) -> None:
    for at, step in enumerate(steps):
        url = storage.join(layout.checkpoints("train", THEIRS), f"step-{step:08d}-{at:016x}")
        storage.write_json(storage.join(url, "recipe.json"), recipe.model_dump(mode="json"))


def told(layout: RunLayout, recipe: Recipe) -> list[str]:
    return list(other_trainings(layout, "train", OURS, recipe))


def test_what_differs_is_named(tmp_path: Path, recipe: Recipe) -> None:
    layout = RunLayout(str(tmp_path))
    assert told(layout, recipe) == []
    saved(layout, recipe, 20, 1040)
    changed = load_recipe(
        "quickstart",
        [
            f"output={tmp_path}",
            "data.loader.max_length=21",
            "cluster.num_workers=1",
            "alignment=null",
        ],
    ).recipe
    before = recipe.data.loader.max_length
    assert told(layout, changed) == [
        "train: begins at its first step, beside train-0123456789ab of this output, which is at "
        f"step 1,040 and was trained with data.loader.max_length={before} (now 21): set that back "
        "to go on with it"
    ]
    assert "with other data or another start" in told(layout, recipe)[0]


def test_of_many_the_nearest_is_told(tmp_path: Path, recipe: Recipe) -> None:
    layout, output = RunLayout(str(tmp_path)), f"output={tmp_path}"
    far = ["data.loader.max_length=21", "model.num_layers=7"]
    for at, settings in enumerate([far, far[:1], [*far, "seed=18"]]):
        other = load_recipe("quickstart", [output, *settings]).recipe
        place = layout.checkpoints("train", f"{at}" * 64)
        url = storage.join(place, f"step-{20:08d}-{0:016x}", "recipe.json")
        storage.write_json(url, other.model_dump(mode="json"))
    [line] = told(layout, recipe)
    assert "beside train-111111111111 of" in line and "max_length=21 (now" in line
    assert "num_layers" not in line and line.endswith("(2 more differ as much or more)")


def test_a_hidden_credential_is_no_difference(tmp_path: Path, recipe: Recipe) -> None:
    url = "data.source.item_text={url: 's3://me:wJalrXUtnFEMI@bucket/t.csv', format: csv}"
    source = [
        "alignment=null",
        "data.source={kind: csv, url: x, columns: {user: u, item: i, timestamp: t}}",
        url,
    ]
    ours = load_recipe("quickstart", [f"output={tmp_path}", *source]).recipe
    layout = RunLayout(str(tmp_path))
    place = storage.join(layout.checkpoints("train", THEIRS), f"step-{20:08d}-{0:016x}")
    storage.write_json(storage.join(place, "recipe.json"), redacted(ours.model_dump(mode="json")))
    assert "with other data or another start" in told(layout, ours)[0]


def test_another_training_that_cannot_be_read_refuses_nothing(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = RunLayout(str(tmp_path))
    saved(layout, recipe, 20)

    def refused(url: str) -> None:
        raise StorageError(f"{url} cannot be read")

    monkeypatch.setattr(storage, "read_json", refused)
    [line] = told(layout, recipe)
    assert line.endswith("was trained with settings that cannot be read")


def test_a_training_that_goes_on_tells_nothing(tmp_path: Path, recipe: Recipe) -> None:
    layout = RunLayout(str(tmp_path))
    saved(layout, recipe, 20)
    storage.make_directory(storage.join(layout.checkpoints("train", OURS), "step-00000003-00"))
    assert told(layout, recipe) == []
    assert list(other_trainings(layout, "align", OURS, recipe)) == []


@pytest.mark.parametrize("content", ["[", "3", "{}"])
def test_a_recipe_that_is_none_stops_nothing(tmp_path: Path, recipe: Recipe, content: str) -> None:
    layout = RunLayout(str(tmp_path))
    saved(layout, recipe, 20)
    [file] = tmp_path.rglob("recipe.json")
    file.write_text(content)
    assert len(told(layout, recipe)) == 1
