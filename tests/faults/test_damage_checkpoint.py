"""Damage to every file of a checkpoint: all ranks take the one before it, and say so alike.

Two ranks wrote; three find and load, so that the files of other ranks and re-cut tables are read.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from configs import storage
from launch.checkpoints import render_inspection, verify
from sharding.checkpoint import CheckpointStore
from sharding.checkpoint_export import export_safetensors
from sharding.checkpoint_manifest import MANIFEST
from sharding.process_group import current_context
from tests.faults.damages import DAMAGES, Damage, link_out, name_of
from tests.harness import run_ranks
from tests.sharding.policies import Settings, differing, make_policy, train, whole_state

FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "state.json", "recipe.json", MANIFEST)
CASES = [(file, damage) for file in FILES for damage in (*DAMAGES, link_out)]
IDS = [f"{file}-{name_of(damage)}" for file, damage in CASES]
Answer = dict[str, Any]


def save_two(root: str) -> dict[int, dict[str, Tensor]]:
    """Steps 1 and 2, with recipes and states that differ; what the model held at each."""
    policy = make_policy(current_context("cpu"), Settings())
    store = CheckpointStore(root, 2, policy.ctx)
    states = {}
    for step in (1, 2):
        train(policy, 1)
        store.save(policy, step, {"step": step}, {"name": f"recipe {step}"}, {})
        states[step] = whole_state(policy)
    return states


def look_at_each(roots: list[str], states: dict[int, dict[str, Tensor]]) -> list[Answer]:
    """What is found in each, and which of the tensors that are loaded are not that step's."""
    policy = make_policy(current_context("cpu"), Settings())
    answers = []
    for root in roots:
        store = CheckpointStore(root, 2, policy.ctx)
        info = store.newest()
        assert info is not None
        answer = {"step": info.step, "said": store.skipped, "recipe": store.recipe(info)}
        answer["state"] = store.load(policy, info)
        answers.append(answer | {"wrong": differing(whole_state(policy), states[info.step])})
    return answers


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Answer]]]:
    saved = tmp_path_factory.mktemp("saved") / "store"
    states = run_ranks(2, save_two, str(saved))[0]
    roots = []
    for file, damage in CASES:
        root = tmp_path_factory.mktemp("damaged") / "a" / "store"
        shutil.copytree(saved, root)
        older, newest = sorted(root.iterdir())
        damage(newest / file, older / file)
        roots.append(root)
    said = run_ranks(3, look_at_each, [str(root) for root in roots], states, timeout=300)
    by_case = zip(*said, strict=True)
    return {name: (root, list(s)) for name, root, s in zip(IDS, roots, by_case, strict=True)}


HARMLESS = {f"{MANIFEST}-truncate", ".metadata-swap"}
"""It ends with a line's end; both steps lie alike in their files."""


@pytest.mark.parametrize(("file", "damage"), CASES, ids=IDS)
def test_the_checkpoint_before_it_is_taken(
    file: str, damage: Damage, looked: dict[str, tuple[Path, list[Answer]]]
) -> None:
    case = f"{file}-{name_of(damage)}"
    root, answers = looked[case]
    answer = answers[0]
    assert all(other == answer for other in answers), "ranks disagree"
    step = 2 if case in HARMLESS else 1
    assert answer["step"] == step and answer["state"] == {"step": step}
    assert answer["recipe"] == {"name": f"recipe {step}"} and answer["wrong"] == []
    newest = max(root.iterdir())
    if step == 2:
        assert answer["said"] == ()
        return
    if case == f"{MANIFEST}-remove":  # as a save that was killed leaves it
        assert answer["said"] == ()
        return
    [sentence] = answer["said"]
    assert newest.name in sentence and "\n" not in sentence
    assert file in sentence or file == MANIFEST
    refuse_by_tools(root, newest)


def refuse_by_tools(root: Path, newest: Path) -> None:
    """`tandem checkpoint verify`, `export`, and `inspect` where it reads what is damaged."""
    lines: list[str] = []
    with pytest.raises(ValueError, match="1 of 2 checkpoints are damaged"):
        verify(str(root), lines.append)
    assert any(newest.name in line and "DAMAGED" in line for line in lines)
    target = storage.join(str(root.parent), "exported")
    with pytest.raises(ValueError, match=r"is |has |damaged|does not match"):
        export_safetensors(
            str(newest), target, max_file_bytes=1 << 30, progress=lambda done, total: None
        )
    assert not storage.exists(target)
    try:
        shown = render_inspection(str(newest))
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert "step 2" in shown
