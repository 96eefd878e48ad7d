"""Pairs that the round's start generates: which they are, and the stage on real ranks."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from configs.alignment import SelfPlayConfig
from tests.models.sequences import make_batch
from tests.trainer import test_align_online as online
from tests.trainer.test_align_online import STEPS_PER_EPOCH, interrupting, run
from trainer.align_generated import extreme_pairs, self_play_pairs
from trainer.objectives.scoring import Candidates
from trainer.rewards.group import Group

root, started = online.root, online.started  # fixtures
ITEMS = 6


def group_of(items: Tensor, targets: Tensor) -> tuple[Candidates, Group]:
    """Groups with codes that say which item they are of; item 0 is no candidate."""
    batch = make_batch([2] * len(targets), ITEMS)
    codes = torch.stack([items, items * 10], dim=2)
    group = Group(
        items=items,
        codes=codes,
        valid=items > 0,
        log_probs=torch.zeros(items.shape),
        target_ids=targets,
        target_codes=torch.stack([targets, targets * 10], dim=1),
        contexts=batch,
    )
    return Candidates(batch, items, codes), group


groups = st.lists(st.lists(st.integers(0, ITEMS), min_size=4, max_size=4), min_size=1, max_size=4)


@given(groups, st.integers(0, 2**31))
@settings(deadline=None, max_examples=100)
def test_the_best_wins_over_the_worst(rows: list[list[int]], seed: int) -> None:
    items = torch.tensor(rows)
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 3, items.shape, generator=generator).float()
    candidates, group = group_of(items, torch.ones(len(rows), dtype=torch.int64))
    pairs, measures = extreme_pairs(candidates, group, rewards)
    for row, own in enumerate(rows):
        legal = [(rewards[row, at].item(), item) for at, item in enumerate(own) if item]
        worths = [worth for worth, _ in legal]
        winner, loser = pairs.items[row].tolist()
        best = [item for worth, item in legal if worth == max(worths)]
        others = [worth for worth, item in legal if item != (winner or best[0])]
        if not others or max(worths) == min(others):
            assert (winner, loser) == (0, 0) and measures["tied"][row] == 1
            continue
        assert winner in best and winner != loser and (min(others), loser) in legal
        assert measures["tied"][row] == 0
        assert measures["reward_best"][row] == max(worths)
        assert measures["reward_worst"][row] == min(worths)
        assert measures["reward"][row] == pytest.approx(sum(worths) / len(worths))
        assert pairs.codes is not None
        assert pairs.codes[row].tolist() == [[winner, 10 * winner], [loser, 10 * loser]]


@given(groups, st.integers(1, ITEMS), st.integers(1, 3))
@settings(deadline=None, max_examples=100)
def test_what_the_user_took_wins_over_other_offers(
    rows: list[list[int]], target: int, losers: int
) -> None:
    items = torch.tensor(rows)
    candidates, group = group_of(items, torch.full((len(rows),), target))
    pairs, measures = self_play_pairs(candidates, group, losers)
    for row, own in enumerate(rows):
        others = [item for item in dict.fromkeys(own) if item not in (0, target)][:losers]
        wanted = [target, *others, *([0] * (losers - len(others)))]
        assert pairs.items[row].tolist() == wanted
        there = sum(item > 0 for item in own)
        assert measures["reward"][row] == pytest.approx(own.count(target) / max(there, 1))
        assert pairs.codes is not None
        kept = pairs.codes[row, : 1 + len(others)].tolist()
        assert kept == [[item, 10 * item] for item in wanted[: 1 + len(others)]]


def test_an_item_of_the_same_semantic_id_is_no_loser() -> None:
    """Items 1 and 2 share an id: where 2 was taken, writing 1 is a hit."""
    candidates, group = group_of(torch.tensor([[1, 1, 3, 4]]), torch.tensor([2]))
    group = replace(group, target_codes=torch.tensor([[1, 10]]))
    pairs, measures = self_play_pairs(candidates, group, 2)
    assert pairs.items.tolist() == [[2, 3, 4]] and measures["reward"].tolist() == [0.5]
    assert measures["reward_std"].item() == pytest.approx(3**-0.5) and measures["zero_std"] == 0
    assert pairs.codes is not None and pairs.codes.tolist() == [[[1, 10], [3, 30], [4, 40]]]
    twice = replace(group, codes=torch.tensor([[[3, 30], [3, 30], [3, 30], [4, 40]]]))
    pairs, _ = self_play_pairs(candidates, twice, 2)  # as an id, 1 and 3 are one outcome here
    assert pairs.items.tolist() == [[2, 1, 4]]
    bare = replace(group, codes=None, target_codes=None)  # a model that scores items
    pairs, measures = self_play_pairs(replace(candidates, codes=None), bare, 2)
    assert pairs.items.tolist() == [[2, 1, 3]] and measures["zero_std"].tolist() == [1]


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"losers": 4}, {"losers": 2, "label_smoothing": 0.1}):
        with pytest.raises(ValidationError, match="losers="):
            SelfPlayConfig.model_validate(wrong)


PAIRS: dict[str, dict[str, Any]] = {
    "sprec": {"kind": "sprec", "losers": 2, "round_steps": 4, "beta": 1.0, "rewards": None},
    "ipa": {"kind": "ipa", "round_steps": 4, "generation": {"kind": "beam", "beams": 6}}
    | {"rewards": [{"kind": "hit"}], "beta": 1.0},
}


@pytest.mark.parametrize("kind", PAIRS)
def test_rounds_worlds_and_resume(
    root: Path, started: tuple[str, dict[str, Any]], kind: str
) -> None:
    config = PAIRS[kind]
    whole = run(root, f"1{kind}", started, 1, **config)
    assert len([step for step in whole if step]) == 2 * STEPS_PER_EPOCH == 6
    first = whole[1]
    assert first["train/margin"] == pytest.approx(0, abs=1e-5)
    assert first["train/accuracy"] == pytest.approx(0.5, abs=1e-6)
    per_pair = math.log(3) if kind == "sprec" else math.log(2)
    if kind == "ipa":  # prompts whose candidates are worth the same are no pairs
        assert first["train/preference_loss"] == pytest.approx(per_pair, abs=1e-5)
    assert 0 < first["train/preference_loss"] <= per_pair + 1e-5
    assert first["train/legality"] == 1 and 0 < first["train/unique"] <= 1
    assert first["train/reward_std"] >= 0 <= first["train/zero_std"]
    for name in ("rewards/chosen", "rewards/rejected", "kl"):
        assert first[f"train/{name}"] == pytest.approx(0, abs=1e-5), name
        assert abs(whole[4][f"train/{name}"]) > 1e-6, name
    assert first["train/entropy"] > 0
    # A new round begins after four steps: the policy is its own reference again.
    assert abs(whole[4]["train/margin"]) > 1e-4
    assert whole[5]["train/margin"] == pytest.approx(0, abs=1e-5)
    if kind == "ipa":
        assert whole[1]["train/reward_best"] >= whole[1]["train/reward"]

    shared = run(root, f"2{kind}", started, 2, **config)
    assert shared.keys() == whole.keys()
    for tag, value in first.items():
        assert shared[1][tag] == pytest.approx(value, rel=2e-3, abs=2e-5), tag

    cut = run(root, f"3{kind}", started, 1, say=interrupting, **config)
    assert 0 < max(cut) < max(whole)
    again = run(root, f"3{kind}", started, 1, **config)
    assert again == whole


def test_a_round_measures_the_policy_at_validated_steps(
    root: Path, started: tuple[str, dict[str, Any]]
) -> None:
    limit = {"metric": "entropy", "min": 0.0, "action": "warn"}
    more = {"guardrails": {"limits": [limit]}, "validation": {"every_steps": 2}}
    config = PAIRS["sprec"] | more | {"log_every_steps": 5, "epochs": 1}
    rows = run(root, "between", started, 1, **config)
    told = {step: row.keys() for step, row in rows.items() if "train/loss" in row}
    assert [*told] == [1, 2, 3]
    assert all({"train/entropy", "train/kl"} <= tags for tags in told.values())
