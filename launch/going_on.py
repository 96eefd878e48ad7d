"""What an interrupted run goes on with although the recipe would name something else today.

A log that has grown, or is gone, is no reason to lose a training on what was prepared of it; nor is
another placement of its tables, or precision, which a checkpoint is converted to as it is loaded.
"""

from collections.abc import Callable
from typing import Any

from configs import storage
from configs.layout import RunLayout, read_record
from configs.recipe import Recipe, StageName
from configs.sharding import ShardingConfig
from configs.training import TrainingConfig
from launch.other_trainings import trainings_of
from launch.stage_inputs import Outputs, prepare_settings

Done = dict[str, Outputs]
"""What stages left, by name."""


def prepared_before(layout: RunLayout, recipe: Recipe) -> dict[str, Any] | None:
    """Record of the data set of this output, if it was prepared by the recipe's settings, of
    whatever its source held then."""
    url = layout.stage_record("prepare")
    if not storage.exists(url):
        return None
    record = read_record(url)
    return record if record["outputs"].get("settings") == prepare_settings(recipe) else None


def meant(layout: RunLayout, stage: StageName, fingerprint: str) -> str:
    """Fingerprint of the training that a stage of this one has gone on with; else its own."""
    url = layout.goes_on_record(stage, fingerprint)
    return str(read_record(url)["outputs"]["training"]) if storage.exists(url) else fingerprint


def note(layout: RunLayout, stage: StageName, fingerprint: str, training: str) -> None:
    """Keep that a stage of this fingerprint goes on with another's training: whose checkpoints say
    so no longer, once the stage has saved its own there."""
    record = {"outputs": {"training": training}}
    storage.write_sealed(layout.goes_on_record(stage, fingerprint), record)


def forget(layout: RunLayout, stage: StageName, fingerprint: str) -> list[str]:
    """Drop what a stage of this fingerprint goes on with, and what goes on with its training, which
    is discarded; the records of the latter."""
    storage.remove(layout.goes_on_record(stage, fingerprint))
    place, first = layout.goes_on_record(stage, fingerprint).rsplit("/", 1)
    prefix = first.removesuffix(f"{fingerprint[:12]}.json")
    others = []
    for name in storage.list_names(place):
        url = storage.join(place, name)
        if name.startswith(prefix) and read_record(url)["outputs"]["training"] == fingerprint:
            storage.remove(url)
            others.append(name)
    return others


def unfinished(
    layout: RunLayout, stage: StageName, recipe: Recipe, fingerprint_of: Callable[[Recipe], str]
) -> tuple[str, str] | None:
    """Fingerprint of the interrupted training of this output that differs from the recipe's in the
    placement of tables and precision alone, and a sentence on it; None where there is none.

    A finished one is left alone: the recipe may be another experiment.

    Args:
        layout: of the output.
        stage: that trains.
        recipe: what is run.
        fingerprint_of: of the stage, were this the recipe.
    """
    own = layout.checkpoints(stage, fingerprint_of(recipe))
    if storage.exists(layout.stage_record(stage)) or storage.list_names(own):
        return None
    for training in trainings_of(layout, stage):
        other = _placed_as(recipe, training.recipe)
        if other is None:
            continue
        fingerprint = meant(layout, stage, fingerprint_of(other))
        if training.recipe.startswith(f"{layout.checkpoints(stage, fingerprint)}/"):
            return fingerprint, (
                f"{stage}: goes on with {training.name} of this output, which was interrupted "
                f"under {_changed(recipe, other)}; --force trains anew"
            )
    return None


def pretrained(
    layout: RunLayout, recipe: Recipe, fingerprint_of: Callable[[StageName, Recipe, Done], str]
) -> tuple[dict[str, Any], str] | None:
    """Record of the finished training that an interrupted alignment of this output goes on from,
    if both differ from the recipe's in the placement of tables and precision alone, and a sentence
    on it; None where there is none.

    Args:
        layout: of the output.
        recipe: what is run.
        fingerprint_of: of a stage, were this the recipe, after what these stages left.
    """
    url = layout.stage_record("train")
    if not storage.exists(url) or storage.exists(layout.stage_record("align")):
        return None
    record = read_record(url)
    after = {"train": record["outputs"]}
    for alignment in trainings_of(layout, "align"):
        other = _placed_as(recipe, alignment.recipe)
        if other is None:
            continue
        trained = fingerprint_of("train", other, {})
        aligned = meant(layout, "align", fingerprint_of("align", other, after))
        if record["fingerprint"] in (trained, meant(layout, "train", trained)) and (
            alignment.recipe.startswith(f"{layout.checkpoints('align', aligned)}/")
        ):
            return record, (
                f"unchanged but for {_changed(recipe, other)}: skipped, as {alignment.name} of "
                "this output, which was interrupted, goes on from it (--from train trains anew)"
            )
    return None


def _placed_as(recipe: Recipe, url: str) -> Recipe | None:
    """The recipe with placement and precision of a checkpoint's; None where that has none."""
    try:
        other: Any = storage.read_json(url)
        theirs = ShardingConfig.model_validate(
            {"default": other["sharding"]["default"], "placement": other["sharding"]["placement"]}
        )
        trained = TrainingConfig.model_validate({"precision": other["training"]["precision"]})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    placed = {"default": theirs.default, "placement": theirs.placement}
    return recipe.model_copy(
        update={
            "sharding": recipe.sharding.model_copy(update=placed),
            "training": recipe.training.model_copy(update={"precision": trained.precision}),
        }
    )


def _changed(now: Recipe, before: Recipe) -> str:
    facts = {
        "sharding.default": (before.sharding.default, now.sharding.default),
        "sharding.placement": (before.sharding.placement, now.sharding.placement),
        "training.precision": (before.training.precision, now.training.precision),
    }
    return ", ".join(f"{key}={old} (now {new})" for key, (old, new) in facts.items() if old != new)
