"""Alignment on pairs and on impressions of a small policy whose best distribution is known.

`test_online` has the kinds that learn from the rewards of groups.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from configs.alignment import (
    Alignment,
    GBPOConfig,
    GeneratedPairsBase,
    OfflineAlignment,
    SelfPlayConfig,
)
from models.batch import JaggedBatch
from tests.trainer.objectives.test_online import ITEMS, OBJECTIVE, USERS, Task, alignment
from trainer.align_generated import extreme_pairs, self_play_pairs
from trainer.objectives.dpo import PreferenceInputs, PreferenceLoss
from trainer.objectives.logged import LoggedInputs, LoggedLoss
from trainer.objectives.scoring import Candidates
from trainer.rewards.group import Group

STEPS, ROUND = 200, 8
WORTH = 1.5
"""By which the one item is preferred to any other, in nats of Plackett-Luce's model."""
WON = 1 / (1 + math.exp(-WORTH))
FARTHEST = (1 + 1 / (ITEMS - 1)) / OBJECTIVE.temperature
"""Largest gap between the one item's score and all others': unit vectors in a simplex."""
UNIFORM = -math.log(ITEMS)
Teach = Callable[[int], list[tuple[float, Any]]]
"""Step → inputs of the loss, and how likely each is."""


def others(wanted: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Different items that are not the wanted ones: [N, number]."""
    shifts = torch.rand(len(wanted), ITEMS - 1, generator=generator).argsort(1)[:, :number]
    return (wanted[:, None] + shifts) % ITEMS + 1


def logged_pairs(task: Task, config: OfflineAlignment) -> Teach:
    """The one item and some others, each of which wins as Plackett-Luce's model has it."""
    losers = config.rule.rejected_per_chosen

    def teach(step: int) -> list[tuple[float, PreferenceInputs]]:
        generator = torch.Generator().manual_seed(step)
        batch, wanted = task.contexts(step)
        items = torch.cat([wanted[:, None], others(wanted, losers, generator)], dim=1)
        reference = torch.full(items.shape, UNIFORM)
        outcomes = []
        for winner in range(1 + losers):
            odds = math.exp(WORTH) if winner == 0 else 1.0
            lists = Candidates(batch, items.roll(-winner, 1))
            outcomes.append(
                (odds / (math.exp(WORTH) + losers), PreferenceInputs(lists, reference, None))
            )
        return outcomes

    return teach


def generated_pairs(task: Task, config: GeneratedPairsBase) -> Teach:
    """Rounds as `GeneratedPairs` has them; the users take the one item."""
    start = copy.deepcopy(task)

    def teach(step: int) -> list[tuple[float, PreferenceInputs]]:
        nonlocal start
        if step % ROUND == 0:
            start = copy.deepcopy(task)
        rolled, rewards = start.roll(step)
        batch, wanted = start.contexts(step)
        items = rolled.candidates.items
        group = Group(items, None, items > 0, rolled.old.squeeze(-1), wanted, None, batch)
        if isinstance(config, SelfPlayConfig):
            pairs, measures = self_play_pairs(rolled.candidates, group, config.losers)
        else:
            pairs, measures = extreme_pairs(rolled.candidates, group, rewards)
        number = (pairs.items[:, 1:] > 0).any(1).sum()
        per_pair = (USERS / number.clamp(min=1) * (number > 0)).float()
        with torch.no_grad():
            reference = start.score(pairs).squeeze(-1)
        return [(1.0, PreferenceInputs(pairs, reference, None, measures, per_pair=per_pair))]

    return teach


def impressions(task: Task) -> Teach:
    """The one item, liked, or another, disliked."""

    def teach(step: int) -> list[tuple[float, LoggedInputs]]:
        generator = torch.Generator().manual_seed(step)
        batch, wanted = task.contexts(step)
        liked = torch.rand(USERS, generator=generator) < 0.5
        shown = wanted.where(liked, others(wanted, 1, generator).squeeze(1))
        return [(1.0, LoggedInputs(Candidates(batch, shown[:, None]), liked * 2.0 - 1.0, None))]

    return teach


def teacher(task: Task, config: Any) -> tuple[PreferenceLoss | LoggedLoss, Teach]:
    if isinstance(config, GBPOConfig):
        return LoggedLoss(task.scorer, config), impressions(task)
    loss = PreferenceLoss(task.scorer, config)
    if isinstance(config, GeneratedPairsBase):
        return loss, generated_pairs(task, config)
    return loss, logged_pairs(task, config)


@pytest.mark.parametrize(
    ("settings", "gap"),
    [
        ({"kind": "dpo", "beta": 0.5}, WORTH / 0.5),
        ({"kind": "ipo", "beta": 0.1}, (2 * WON - 1) / 0.2),
        ({"kind": "s_dpo", "beta": 0.5}, WORTH / 0.5),
        ({"kind": "sprec", "beta": 0.5}, FARTHEST),
        ({"kind": "sprec", "beta": 0.5, "losers": 3}, FARTHEST),
        ({"kind": "ipa", "beta": 0.5}, FARTHEST),
        ({"kind": "gbpo", "logged": {"rule": {"kind": "rating"}, "alone": True}}, FARTHEST),
    ],
    ids=["dpo", "ipo", "s_dpo", "sprec", "sprec_softmax", "ipa", "gbpo_alone"],
)
def test_reaches_the_known_distribution(settings: dict[str, Any], gap: float) -> None:
    """The log of the one item's odds against each other item ends at `gap`.

    Pairs of Plackett-Luce's model tilt the uniform reference by worth / β (DPO, S-DPO), or by the
    mean preference / 2β (IPO), and no further; the other kinds go as far as the model can.
    """
    config = TypeAdapter(Alignment).validate_python({"supervised_weight": 0} | settings)
    task = Task(alignment(kind="grpo"))
    loss, teach = teacher(task, config)
    for step in range(STEPS):
        task.adam.param_groups[0]["lr"] = 0.03 * (1 - step / STEPS)
        task.adam.zero_grad()
        for probability, inputs in teach(step):
            ids = loss.required_ids(inputs)
            output = loss.train()(inputs, {"item": task.table}, ids)
            (probability * output.loss_sum / loss.weight(inputs)).backward()
        task.adam.step()

    batch, wanted = task.contexts(9999)
    log_probs = log_probs_of(task, batch)
    assert torch.equal(log_probs.argmax(1) + 1, wanted)
    best = math.exp(gap) / (math.exp(gap) + ITEMS - 1)
    found = log_probs.exp().gather(1, wanted[:, None] - 1).mean()
    divergence = (log_probs.exp() * (log_probs - UNIFORM)).sum(1).mean()
    known = best * math.log(best) + (1 - best) * math.log((1 - best) / (ITEMS - 1)) - UNIFORM
    assert float(found) == pytest.approx(best, abs=0.08)
    assert float(divergence) == pytest.approx(known, rel=0.15)


@torch.no_grad()
def log_probs_of(task: Task, batch: JaggedBatch) -> Tensor:
    """log π of every item: [N, V]."""
    return task.score(task.every_item(batch)).squeeze(-1)
