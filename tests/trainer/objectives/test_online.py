"""Online alignment of a small policy whose best answer is known, and the weighing of its terms."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from configs.alignment import Alignment, GBPOConfig, OnlineAlignment, OnlineBase
from configs.generation import AncestralConfig
from configs.models import InitConfig, SASRecConfig
from configs.objectives import FullSoftmaxConfig
from models.base import CatalogueSizes, SequenceModel
from models.batch import JaggedBatch
from models.build import build_model
from sharding.process_group import DistributedContext
from sharding.retrieval import Catalogue
from trainer.objectives import policy_gradient as pg
from trainer.objectives.logged import LoggedInputs, LoggedLoss
from trainer.objectives.next_item import NextItemInputs
from trainer.objectives.online import OnlineInputs, OnlineLoss
from trainer.objectives.scoring import Candidates, ItemScorer
from trainer.rollout import sample_items

ALONE = DistributedContext(0, 1, torch.device("cpu"))
ITEMS, WIDTH, GROUP, USERS = 12, 16, 16, 24
OBJECTIVE = FullSoftmaxConfig(temperature=0.2)


def alignment(**settings: Any) -> OnlineAlignment:
    block = {"supervised_weight": 0, "rule": None} | settings
    config = TypeAdapter(Alignment).validate_python(block)
    assert isinstance(config, OnlineBase)
    return config


class Task:
    """Users whose last item names the one item that is worth 1: the next one."""

    def __init__(self, config: OnlineAlignment) -> None:
        torch.manual_seed(4)
        sizes = CatalogueSizes(ITEMS, 50, {}, {})
        model = build_model(SASRecConfig(width=WIDTH, num_layers=1), sizes, InitConfig(), 4)
        assert isinstance(model, SequenceModel)
        self.table = torch.nn.Parameter(0.3 * torch.randn(ITEMS + 1, WIDTH))
        self.scorer = ItemScorer(model, OBJECTIVE, ITEMS, ALONE, normalised=True)
        self.config, self.loss = config, OnlineLoss(self.scorer, config)
        self.adam = torch.optim.Adam([self.table, *self.loss.parameters()], lr=0.02)
        self.start: Tensor | None = None

    def contexts(self, step: int) -> tuple[JaggedBatch, Tensor]:
        generator = torch.Generator().manual_seed(step)
        items = torch.randint(1, ITEMS + 1, (USERS, 2), generator=generator)
        times = torch.arange(2 * USERS)
        batch = JaggedBatch(
            sample_ids=torch.arange(USERS),
            user_ids=torch.arange(USERS) + 1,
            offsets=torch.arange(USERS + 1) * 2,
            item_ids=items.flatten(),
            timestamps=times,
            next_timestamps=times + 1,
            target_ids=torch.zeros(2 * USERS, dtype=torch.int64),
        )
        return batch, items[:, 1] % ITEMS + 1

    def score(self, candidates: Candidates) -> Tensor:
        """log π of candidates, [N, G, L]."""
        ids = self.scorer.required_ids(candidates, None)
        return self.scorer(candidates, None, {"item": self.table}, ids).log_probs

    def every_item(self, batch: JaggedBatch) -> Candidates:
        return Candidates(batch, torch.arange(1, ITEMS + 1).expand(USERS, -1))

    @torch.no_grad()
    def roll(self, step: int) -> tuple[OnlineInputs, Tensor]:
        """Inputs of a step, and its rewards."""
        batch, wanted = self.contexts(step)
        model = self.scorer.model.eval()
        rows = {"item": self.table[batch.item_ids]}
        queries = model(batch, rows, 0)[batch.offsets[1:] - 1]
        keys = Catalogue.from_keys(ALONE, lambda ids: model.item_keys(self.table[ids]), ITEMS)
        streams = torch.arange(USERS) + 1000 * step
        items, _ = sample_items(
            keys, queries, streams, AncestralConfig(samples=GROUP), OBJECTIVE.temperature
        )
        candidates = Candidates(batch, items)
        rewards = (items == wanted[:, None]).float()
        everything = torch.ones(USERS, GROUP, dtype=torch.bool)
        config = self.config.advantages
        gain = pg.group_advantages(rewards, everything, config.scaling, config.epsilon)
        uniform = torch.full((USERS, GROUP, 1), -math.log(ITEMS))
        inputs = OnlineInputs(
            candidates, everything[..., None], self.score(candidates), uniform, gain, None, {}, None
        )
        return inputs, rewards

    def step(self, inputs: OnlineInputs) -> dict[str, float]:
        """One update; the metrics' means."""
        ids = self.loss.required_ids(inputs)
        output = self.loss.train()(inputs, {"item": self.table}, ids)
        weight = self.loss.weight(inputs)
        self.adam.zero_grad()
        (output.loss_sum / weight).backward()
        self.adam.step()
        return {name: float(value / weight) for name, value in output.metrics.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "grpo"},
        {"kind": "grpo", "inner_epochs": 3, "kl": {"weight": 0.01}, "ratio": "item"},
        {"kind": "ecpo", "inner_epochs": 2, "entropy_weight": 0.003},
        {"kind": "gbpo", "advantages": {"scaling": "none"}, "reduction": "dapo"},
    ],
    ids=["grpo", "grpo_inner", "ecpo", "gbpo"],
)
def test_reaches_the_best_answer(settings: dict[str, Any]) -> None:
    """Mean reward rises from 1/12 to what softmax of unit vectors can give; the divergence from
    uniform is then log 12, and every user is offered their one item first."""
    task = Task(alignment(**settings))
    course, divergence = [], []
    for step in range(150):
        inputs, rewards = task.roll(step)
        course.append(float(rewards.mean()))
        for _ in range(task.config.inner_epochs):
            metrics = task.step(inputs)
        divergence.append(metrics["kl"])
    first, middle, last = (sum(part) / 10 for part in (course[:10], course[30:40], course[-10:]))
    assert first < 0.4 and first < middle < last and last > 0.9
    assert max(divergence) < 1.5 * math.log(ITEMS)
    batch, wanted = task.contexts(9999)
    with torch.no_grad():
        best = task.score(task.every_item(batch)).squeeze(-1).argmax(1) + 1
    assert torch.equal(best, wanted)


def test_divergence_holds_the_policy_at_the_known_tilt() -> None:
    """E[r] - β KL(π‖uniform) is largest at π ∝ exp(r / β); the own reward in a group's mean shrinks
    what is learnt by (G - 1) / G, so β counts G / (G - 1) as much."""
    beta = 0.5
    task = Task(
        alignment(
            kind="grpo", kl={"weight": beta, "estimator": "k2"}, advantages={"scaling": "none"}
        )
    )
    for step in range(250):
        task.step(task.roll(step)[0])
        task.adam.param_groups[0]["lr"] = 0.02 * (1 - step / 250)
    batch, wanted = task.contexts(9999)
    with torch.no_grad():
        log_probs = task.score(task.every_item(batch)).squeeze(-1)
    found = log_probs.exp().gather(1, wanted[:, None] - 1).mean()
    scale = math.exp((GROUP - 1) / GROUP / beta)
    assert float(found) == pytest.approx(scale / (scale + ITEMS - 1), rel=0.1)


def test_old_probabilities_are_the_losses_own_before_an_update() -> None:
    task = Task(alignment(kind="grpo"))
    inputs, _ = task.roll(0)
    assert task.step(inputs)["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert task.step(inputs)["ratio"] != pytest.approx(1.0, abs=1e-4)


def gradient(task: Task, inputs: list[OnlineInputs]) -> Tensor:
    task.adam.zero_grad()
    weight = torch.stack([task.loss.weight(each) for each in inputs]).sum()
    for each in inputs:
        ids = task.loss.required_ids(each)
        (task.loss(each, {"item": task.table}, ids).loss_sum / weight).backward()
    assert task.table.grad is not None
    return task.table.grad.clone()


def part(inputs: OnlineInputs, rows: slice) -> OnlineInputs:
    """The prompts of `rows` alone."""
    batch = inputs.candidates.batch
    tokens = slice(2 * rows.start, 2 * rows.stop)
    cut = replace(
        batch,
        sample_ids=batch.sample_ids[rows],
        user_ids=batch.user_ids[rows],
        offsets=torch.arange(rows.stop - rows.start + 1) * 2,
        item_ids=batch.item_ids[tokens],
        timestamps=batch.timestamps[tokens],
        next_timestamps=batch.next_timestamps[tokens],
        target_ids=batch.target_ids[tokens],
    )
    assert inputs.reference is not None
    supervised = inputs.supervised
    if isinstance(supervised, NextItemInputs):
        supervised = replace(supervised, batch=cut)
    logged = inputs.logged_advantages
    return OnlineInputs(
        replace(inputs.candidates, batch=cut, items=inputs.candidates.items[rows]),
        inputs.mask[rows],
        inputs.old[rows],
        inputs.reference[rows],
        inputs.advantages[rows],
        None if logged is None else logged[rows],
        {},
        supervised,
    )


@pytest.mark.parametrize("reduction", ["grpo", "dapo"])
def test_micro_batches_change_nothing(reduction: str) -> None:
    """With every term there is, some candidates missing."""
    rule = {"kind": "rating"}
    config = alignment(
        kind="gbpo", reduction=reduction, logged={"rule": rule, "weight": 0.7},
        supervised_weight=0.4, kl={"weight": 0.2}, entropy_weight=0.1,
    )  # fmt: skip
    task = Task(config)
    inputs, _ = task.roll(0)
    mask = inputs.mask.clone()
    mask[3, 5:] = False
    mask[20] = False
    batch, wanted = task.contexts(0)
    batch = replace(batch, target_ids=batch.item_ids.roll(-1))
    items = torch.cat([inputs.candidates.items, wanted[:, None]], dim=1)
    told = torch.arange(USERS) % 3 - 1.0
    inputs = replace(
        inputs,
        candidates=Candidates(batch, items),
        mask=mask,
        old=inputs.old.masked_fill(~mask, -torch.inf),
        logged_advantages=told,
        supervised=NextItemInputs(batch, None, None, 0),
    )
    whole = gradient(task, [inputs])
    assert whole.isfinite().all() and (whole != 0).any()
    parts = gradient(task, [part(inputs, slice(0, 7)), part(inputs, slice(7, USERS))])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_impressions_alone_teach_what_the_formula_says() -> None:
    """Loss and gradient, with the bound written out: -A π / sg max(π, 1 - π) where disliked,
    -A π / sg π where liked, nothing elsewhere; beside it the mean supervised loss."""
    logged = {"rule": {"kind": "rating"}, "weight": 0.5, "alone": True}
    config = alignment(kind="gbpo", logged=logged, supervised_weight=0.3)
    assert isinstance(config, GBPOConfig)
    task = Task(config)
    loss = LoggedLoss(task.scorer, config).train()
    batch, wanted = task.contexts(0)
    batch = replace(batch, target_ids=batch.item_ids.roll(-1))
    told = torch.arange(USERS) % 3 - 1.0
    supervised = NextItemInputs(batch, None, None, 0)
    inputs = LoggedInputs(Candidates(batch, wanted[:, None]), told, supervised)
    output = loss(inputs, {"item": task.table}, loss.required_ids(inputs))
    assert float(loss.weight(inputs)) == USERS
    found = torch.autograd.grad(output.loss_sum / USERS, task.table)[0]

    p = task.score(inputs.candidates).exp().flatten()
    sg = p.detach()
    bound = torch.where(told < 0, torch.maximum(sg, 1 - sg), sg)
    losses = -told * p / bound
    queries = task.scorer.model(batch, {"item": task.table[batch.item_ids]}, 0)
    keys = task.scorer.model.item_keys(task.table[1:])
    scores = queries @ keys.T / OBJECTIVE.temperature
    context = torch.nn.functional.cross_entropy(scores, batch.target_ids - 1)
    expected = 0.5 * losses.mean() + 0.3 * context
    torch.testing.assert_close(output.loss_sum / USERS, expected)
    torch.testing.assert_close(
        found, torch.autograd.grad(expected, task.table)[0], rtol=1e-4, atol=1e-6
    )
    assert float(output.metrics["logged_loss"] / USERS) == pytest.approx(losses.mean().item())
    assert output.metrics["liked"] == output.metrics["disliked"] == USERS / 3


def test_the_logged_item_weighs_what_a_group_does() -> None:
    """Its loss alone, by hand: -A π / max(π, 1 - π) where disliked, -A where liked."""
    rule = {"kind": "rating"}
    task = Task(alignment(kind="gbpo", logged={"rule": rule, "weight": 0.5}))
    inputs, _ = task.roll(0)
    batch, wanted = task.contexts(0)
    told = torch.arange(USERS) % 3 - 1.0
    items = torch.cat([inputs.candidates.items, wanted[:, None]], dim=1)
    inputs = replace(
        inputs,
        candidates=Candidates(batch, items),
        advantages=torch.zeros_like(inputs.advantages),
        logged_advantages=told,
    )
    ids = task.loss.required_ids(inputs)
    with torch.no_grad():
        output = task.loss.train()(inputs, {"item": task.table}, ids)
        p = task.score(Candidates(batch, wanted[:, None])).exp().flatten()
    losses = torch.where(told < 0, p / torch.maximum(p, 1 - p), -told)
    expected = 0.5 * losses.mean()
    weight = task.loss.weight(inputs)
    torch.testing.assert_close(output.loss_sum / weight, expected)
    liked, disliked = (output.metrics[name] / weight for name in ("liked", "disliked"))
    assert float(liked) == pytest.approx(1 / 3) == float(disliked)


def test_weights_tell_what_is_measured_and_teach_nothing() -> None:
    """Entropy and KL are the weighted means; the loss, its KL term included, stays a plain one."""
    task = Task(alignment(kind="grpo", kl={"weight": 0.5}))
    inputs, _ = task.roll(0)
    weights = torch.rand(USERS, GROUP).softmax(1) * GROUP
    ids, new = task.loss.required_ids(inputs), inputs.old
    plain, weighed = (
        task.loss(each, {"item": task.table}, ids)
        for each in (inputs, replace(inputs, weights=weights))
    )
    assert torch.equal(plain.loss_sum, weighed.loss_sum)
    assert inputs.reference is not None
    divergences = pg.divergences(new, inputs.reference, "k3")
    for name, values in {"entropy": -new, "kl": divergences}.items():
        torch.testing.assert_close(plain.metrics[name], values.sum())
        torch.testing.assert_close(weighed.metrics[name], (values * weights[..., None]).sum())
        assert not torch.isclose(plain.metrics[name], weighed.metrics[name])
    same = [name for name in plain.metrics if name not in ("entropy", "kl")]
    assert all(torch.equal(plain.metrics[name], weighed.metrics[name]) for name in same)


@pytest.mark.parametrize(
    "generation",
    [
        {"kind": "gumbel_top_k"},
        {"kind": "beam"},
        {"kind": "ancestral", "top_p": 0.9},
        {"kind": "ancestral", "temperature": 2.0},
    ],
)
def test_an_entropy_bonus_over_what_is_no_sample_is_refused(generation: dict[str, Any]) -> None:
    alignment(kind="grpo", generation=generation)
    with pytest.raises(ValueError, match="entropy_weight=0.1 needs samples of the policy itself"):
        alignment(kind="grpo", entropy_weight=0.1, generation=generation)
