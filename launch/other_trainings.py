"""What a user is told where a stage begins anew beside trainings of other settings."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from configs import storage
from configs.layout import RunLayout
from configs.locations import absolute_locations
from configs.recipe import Recipe, StageName
from configs.redaction import redacted

_NAMED = 4
"""Settings in a sentence."""
_ELSEWHERE = ("name", "output", "cluster", "failures", "evaluation", "recommend")
"""Blocks that decide nothing of a training."""


@dataclass(frozen=True)
class SavedTraining:
    """A training that has checkpoints."""

    name: str
    """Of its directory."""
    step: int
    """Of its newest checkpoint."""
    recipe: str
    """URL of that one's recipe."""


def trainings_of(layout: RunLayout, stage: StageName) -> list[SavedTraining]:
    """The trainings of a stage in this output that have checkpoints, the one saved last first."""
    place = layout.checkpoints(stage, "").rsplit("/", 2)[0]
    found: list[tuple[str, SavedTraining]] = []
    for name in storage.list_names(place):
        newest = storage.join(place, name, "newest")
        steps = [each for each in storage.list_names(newest) if each.startswith("step-")]
        if name.startswith(f"{stage}-") and steps:
            last = max(steps, key=_time)
            url = storage.join(newest, last, "recipe.json")
            found.append((_time(last), SavedTraining(name, int(last.split("-")[1]), url)))
    return [each for _, each in sorted(found, key=lambda entry: entry[0], reverse=True)]


def other_trainings(
    layout: RunLayout, stage: StageName, fingerprint: str, recipe: Recipe
) -> Iterator[str]:
    """A sentence on the stage's training in this output whose settings are nearest to these,
    where the recipe has none yet.

    A run goes on with what its settings name; whoever changed one to go on must know that it did
    not.
    """
    if storage.list_names(layout.checkpoints(stage, fingerprint)):
        return
    found: list[tuple[int, str]] = []
    for training in trainings_of(layout, stage):
        differs, how = _difference(training.recipe, recipe, stage)
        sentence = (
            f"{stage}: begins at its first step, beside {training.name} of this output, which is "
            f"at step {training.step:,} and was trained with {how}"
        )
        found.append((differs, sentence))
    if found:
        more = len(found) - 1
        yield min(found)[1] + (f" ({more} more differ as much or more)" if more else "")


def _time(checkpoint: str) -> str:
    """What the names of checkpoints are ordered by, within a training."""
    return checkpoint.rsplit("-", 1)[-1]


def _difference(url: str, recipe: Recipe, stage: StageName) -> tuple[int, str]:
    """How many settings are others, and which."""
    try:
        other = redacted(storage.read_json(url))
    except (OSError, ValueError):
        return sys.maxsize, "settings that cannot be read"
    elsewhere = {*_ELSEWHERE, "alignment"} if stage == "train" else {*_ELSEWHERE}
    blocks = redacted(recipe.model_dump(mode="json", exclude=elsewhere))
    there = redacted(absolute_locations(recipe).model_dump(mode="json", exclude=elsewhere))
    theirs = {k: v for k, v in other.items() if k in blocks} if isinstance(other, dict) else {}
    before, now, placed = dict(_flat(theirs)), dict(_flat(blocks)), dict(_flat(there))
    changed = [  # workers write down absolute locations, and of before, relative ones
        key for key in {**now, **before} if before.get(key) not in (now.get(key), placed.get(key))
    ]
    if not changed:
        return 0, "other data or another start"
    named = ", ".join(f"{key}={before.get(key)} (now {now.get(key)})" for key in changed[:_NAMED])
    more = len(changed) - _NAMED
    rest = f" and {more} more settings" if more > 0 else ""
    return len(changed), f"{named}{rest}: set that back to go on with it"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _flat(below, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
