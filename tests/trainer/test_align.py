"""The alignment worker: its reference, its first step, and going on from the middle."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from data_loaders.pairs import read_pairs
from data_loaders.preferences import read_reference
from tests.harness import run_ranks
from tests.trainer.runs import (
    ITEMS,
    Pretrained,
    all_keys,
    assert_named,
    logged,
    query_of,
    quiet,
    settings_of,
)
from trainer.align import align_worker
from trainer.evaluate import evaluation_policy, load_policy
from trainer.policy import start_worker


class InterruptedRunError(Exception):
    """The run's end, before its time."""


def interrupting(line: str) -> None:
    """A `say` that ends the run at the first validation of a step, before that step is saved."""
    if line.startswith("validation after epoch 1"):
        raise InterruptedRunError


def align(settings: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    try:
        return align_worker(settings, say)
    except InterruptedRunError:
        return None


def settings_for(pretrained: Pretrained, name: str, **more: Any) -> dict[str, Any]:
    reference = str(pretrained.root / f"reference-{more.pop('reference', 'shared')}")
    start = pretrained.outputs["checkpoint"]
    return settings_of(
        pretrained.root, name, more, start=start, pairs=pretrained.pairs, reference=reference
    )


def log_probs_plainly(settings: dict[str, Any], pairs: list[dict[str, Any]]) -> Any:
    """Log-probabilities of winners and losers, and accuracy on held-out pairs; one by one."""
    worker = start_worker(settings, quiet)
    policy = evaluation_policy(worker)
    load_policy(worker, policy, settings["start"])
    keys, temperature = all_keys(policy), worker.recipe.objective.temperature
    rows = []
    for pair in pairs:
        scores = keys @ query_of(policy, pair, slice(None), pair["request_timestamp"])
        log_probs = (scores / temperature).log_softmax(0)
        rows.append([log_probs[pair[name] - 1].item() for name in ("chosen_id", "rejected_1")])
    return torch.tensor(rows)


def read_all(directory: str, files: Any) -> list[dict[str, Any]]:
    return [row for f in files for row in pq.read_table(Path(directory) / f.path).to_pylist()]


def reference_of(settings: dict[str, Any]) -> Tensor:
    rows = read_all(settings["reference"], read_reference(settings["reference"]).parts)
    assert [row["pair_id"] for row in rows] == list(range(len(rows)))
    return torch.tensor([[row["chosen"], row["rejected_1"]] for row in rows])


@pytest.fixture(scope="module")
def whole(pretrained: Pretrained) -> dict[int, dict[str, float]]:
    """What an uninterrupted alignment on one rank measured."""
    settings = settings_for(pretrained, "whole")
    [outputs] = run_ranks(1, align_worker, settings, quiet)
    assert outputs["selected_on"] == "validation"
    rows = logged(pretrained.root, "align", "whole")
    assert_named(settings, rows)
    return rows


def test_the_reference_is_the_starting_policys_dense_log_softmax(
    pretrained: Pretrained, whole: dict[int, dict[str, float]]
) -> None:
    pairs = read_all(pretrained.pairs, read_pairs(pretrained.pairs).shards)
    settings = settings_for(pretrained, "whole")
    [dense] = run_ranks(1, log_probs_plainly, settings, pairs)
    torch.testing.assert_close(reference_of(settings), dense, rtol=1e-4, atol=1e-4)
    assert dense.std() > 0.1 and (dense < 0).all()

    # Validation before the first step is the starting policy's, on the held-out pairs alone.
    held_out = read_pairs(pretrained.pairs).num_validation_pairs
    right = (dense[:, 0] > dense[:, 1]).float()
    assert 0 < held_out < len(pairs)
    assert whole[0]["validation/preference_accuracy"] == pytest.approx(
        right[-held_out:].mean().item()
    )
    assert right[-held_out:].mean() != pytest.approx(right[:-held_out].mean().item(), abs=1e-4)


def test_the_first_step_starts_at_the_reference_in_every_world(
    pretrained: Pretrained, whole: dict[int, dict[str, float]]
) -> None:
    settings = settings_for(pretrained, "two", reference="of-two", cluster={"num_workers": 2})
    outputs = run_ranks(2, align_worker, settings, quiet)
    assert outputs[0] == outputs[1]
    alone = reference_of(settings_for(pretrained, "whole"))
    torch.testing.assert_close(reference_of(settings), alone, rtol=1e-4, atol=1e-4)
    shared = logged(pretrained.root, "align", "two")
    for rows in (whole, shared):
        assert rows[1]["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert rows[1]["train/margin"] == pytest.approx(0, abs=1e-5)
        assert abs(rows[max(rows)]["train/margin"]) > 1e-3
        for name in ("rewards/chosen", "rewards/rejected"):  # complete, though log Z cancels
            assert rows[1][f"train/{name}"] == pytest.approx(0, abs=1e-4)
        last = rows[max(step for step in rows if "train/loss" in rows[step])]
        apart = last["train/rewards/chosen"] - last["train/rewards/rejected"]
        assert apart == pytest.approx(last["train/margin"], abs=1e-5)
        assert 0 < rows[1]["train/entropy"] < 2 * math.log(ITEMS)
        assert abs(rows[1]["train/kl"]) < 1e-6 < last["train/kl"]
    assert shared.keys() == whole.keys()
    for step, row in whole.items():
        for tag in row.keys() & {"train/loss", "train/preference_loss", "train/supervised_loss"}:
            assert shared[step][tag] == pytest.approx(row[tag], rel=1e-3)
        if "train/kl" in row:
            assert shared[step]["train/kl"] == pytest.approx(row["train/kl"], rel=0.05, abs=1e-6)


def test_going_on_from_the_middle_of_an_epoch_changes_no_loss(
    pretrained: Pretrained, whole: dict[int, dict[str, float]]
) -> None:
    settings = settings_for(pretrained, "cut")
    assert run_ranks(1, align, settings, interrupting) == [None]
    cut = logged(pretrained.root, "align", "cut")
    saved = pretrained.root.glob("checkpoints/align-cut*/newest/*/MANIFEST.json")
    newest = max(int(path.parent.name.split("-")[1]) for path in saved)
    assert 0 < newest < max(cut) < max(whole)

    run_ranks(1, align, settings, quiet)
    again = logged(pretrained.root, "align", "cut")
    assert again.keys() == whole.keys()
    for step, row in whole.items():
        assert again[step] == row, f"step {step}"


def test_a_limit_on_training_alone_ends_with_the_policy_that_kept_it(
    pretrained: Pretrained,
) -> None:
    limit = {"metric": "loss", "max": 0.0, "action": "stop"}
    guarded = {"guardrails": {"limits": [limit], "window": 1}, "validation": None}
    settings = settings_for(pretrained, "guarded", alignment=guarded)
    [outputs] = run_ranks(1, align_worker, settings, quiet)
    assert (outputs["selected_on"], outputs["steps"]) == ("guardrails", 1)
    assert "/good/step-00000000-" in outputs["checkpoint"]["url"]


def test_whatever_a_limit_watches_is_measured_at_validated_steps(pretrained: Pretrained) -> None:
    """They are logged between those that are due, with all that any logged step tells."""
    limit = {"metric": "kl", "max": 5.0, "action": "roll_back"}
    more = {"guardrails": {"limits": [limit]}, "validation": {"every_steps": 2}}
    more |= {"log_every_steps": 5, "epochs": 1}
    settings = settings_for(pretrained, "between", alignment=more)
    run_ranks(1, align_worker, settings, quiet)
    rows = logged(pretrained.root, "align", "between")
    told = {step: row.keys() for step, row in rows.items() if "train/loss" in row}
    assert [*told] == [1, 2, 3] and all(tags >= told[1] for tags in told.values())
    assert "train/kl" in told[1] and "train/rewards/chosen" in told[1]
