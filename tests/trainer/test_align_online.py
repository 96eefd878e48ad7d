"""Online alignment on real ranks, of both families of models: first step, worlds, resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.alignment import GBPOConfig
from data_loaders.dataset import SequenceDataset
from data_loaders.pairs import validation_users
from data_loaders.poison import PoisonedSampleError, quarantine
from sharding.process_group import DistributedContext
from tests.harness import run_ranks
from tests.trainer.runs import USERS, assert_named, logged, quiet, settings_of
from tests.trainer.test_align import align, interrupting
from tests.trainer.test_code_stages import BLOCKS, write_run
from trainer.align import logged_stage
from trainer.align_logged import LoggedImpressions
from trainer.align_online import SpreadCheck
from trainer.evaluate import evaluation_policy
from trainer.policy import start_worker
from trainer.pretrain import train_worker

PER_STEP = 32
STEPS_PER_EPOCH = -(-USERS // PER_STEP)
ONLINE: dict[str, Any] = {
    "rule": None,
    "epochs": 2,
    "prompts": {"per_step": PER_STEP},
    "generation": {"kind": "ancestral", "samples": 6},
    "rewards": [{"kind": "hit"}, {"kind": "novelty", "weight": 0.3}],
    "log_every_steps": 1,
    "supervised_weight": 0.5,
    "optimizer": {"lr": 0.01},
    "checkpoint": {"every_steps": 2},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "hstu": {"evaluation": {"ks": [1, 5, 10], "users_per_batch": 16}},
    "lazy_decoder": BLOCKS,
}
GRPO: dict[str, Any] = {
    "kind": "grpo",
    "inner_epochs": 2,
    "kl": {"weight": 0.1},
    "entropy_weight": 0.01,
    "reference": {"sync_every_steps": 2, "mixing": 0.5},
}
OTHERS: dict[str, dict[str, Any]] = {
    "hstu": {
        "kind": "gbpo",
        "advantages": {"scaling": "batch"},
        "reduction": "dapo",
        "generation": {"kind": "gumbel_top_k", "samples": 6},
        "reference": None,
        "logged": {"rule": {"kind": "rating", "liked_from": 4, "disliked_to": 2}},
    },
    "lazy_decoder": {
        "kind": "ecpo",
        "inner_epochs": 2,
        "ratio": "item",
        "generation": {"kind": "beam", "beams": 6},
        "rewards": [{"kind": "rank"}, {"kind": "prefix"}, {"kind": "quota"}],
    },
}
"""Of each family, an algorithm with what the first one leaves out."""


def settings_for(root: Path, name: str, family: str, **more: Any) -> dict[str, Any]:
    blocks = FAMILIES[family] | {"cluster": {"num_workers": more.pop("workers", 1)}}
    blocks["training"] = {"zero_stage": more.pop("zero_stage", 1)}
    start = more.pop("start", None)
    alignment = {"kind": "grpo"} | ONLINE | more
    if alignment["rewards"] is None:
        alignment.pop("rewards")
    blocks["alignment"] = alignment
    urls = {"pairs": None, "reference": None, "start": start}
    codes = str(root / "codes") if family != "hstu" else None
    return settings_of(root, name, blocks, **(urls | {"semantic_ids": codes}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("online")
    write_run(path)
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def started(request: pytest.FixtureRequest, root: Path) -> tuple[str, dict[str, Any]]:
    settings = settings_for(root, f"pretrain-{request.param}", request.param)
    [outputs] = run_ranks(1, train_worker, settings, quiet)
    return request.param, outputs["checkpoint"]


def run(
    root: Path, name: str, started: tuple[str, dict[str, Any]], workers: int, **more: Any
) -> dict[int, Any]:
    """What an alignment measured, step by step."""
    family, start = started
    say = more.pop("say", quiet)
    name = f"{name}-{family}"
    settings = settings_for(root, name, family, start=start, workers=workers, **more)
    run_ranks(workers, align, settings, say)
    rows = logged(root, "align", name)
    assert_named(settings, rows)
    return rows


def test_first_step_worlds_and_resume(root: Path, started: tuple[str, dict[str, Any]]) -> None:
    whole = run(root, "one", started, 1, **GRPO)
    assert len([step for step in whole if step]) == 2 * STEPS_PER_EPOCH * 2
    first = whole[1]
    assert first["train/ratio"] == pytest.approx(1.0, abs=1e-5)  # rollout and loss agree
    assert first["train/kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["train/clip_low"] == first["train/clip_high"] == 0
    assert first["train/legality"] == 1
    assert 0 < first["train/unique"] <= 1 and 0 <= first["train/zero_std"] < 1
    parts = first["train/reward/hit"] + first["train/reward/novelty"]
    assert first["train/reward"] == pytest.approx(parts, rel=1e-5)
    assert abs(whole[2]["train/ratio"] - 1) > 1e-4  # the same rollout, after an update
    assert whole[max(whole)]["train/kl"] > 1e-5

    shared = run(root, "two", started, 2, zero_stage=3, **GRPO)
    assert shared.keys() == whole.keys()
    for tag, value in first.items():
        assert shared[1][tag] == pytest.approx(value, rel=2e-3, abs=2e-5), tag
    assert shared[max(shared)]["train/kl"] > 1e-5

    cut = run(root, "cut", started, 1, say=interrupting, **GRPO)
    assert 0 < max(cut) < max(whole)
    again = run(root, "cut", started, 1, **GRPO)
    assert again.keys() == whole.keys()
    for step, row in whole.items():
        assert again[step] == row, f"step {step}"


def test_first_groups_without_spread_are_told() -> None:
    """Once, and only if every one of them is so."""
    told: list[str] = []
    alone = DistributedContext(0, 1, torch.device("cpu"))
    even, mixed = torch.tensor([True, True]), torch.tensor([True, False])
    SpreadCheck(alone, told.append)([even, mixed])
    assert told == []
    check = SpreadCheck(alone, told.append)
    check([even[:0]])  # a step of held-out users alone
    check([even, even])
    check([even, even])
    assert len(told) == 1 and "each of the first 4 groups are worth the same" in told[0]


FOLLOWING: dict[str, tuple[dict[str, Any], str]] = {
    "hstu": (
        {"kind": "grpo", "reference": {"sync_every_steps": STEPS_PER_EPOCH, "mixing": 1}},
        "train/kl",
    ),
    "lazy_decoder": (
        {"kind": "sprec", "round_steps": STEPS_PER_EPOCH, "beta": 1.0},
        "train/margin",
    ),
}
"""Of each family, a reference that becomes the policy after each epoch, and how far it is."""


def test_a_roll_back_returns_to_the_reference_of_then(
    root: Path, started: tuple[str, dict[str, Any]]
) -> None:
    """The first epoch's policy, which was its own reference, is so again after the second's is
    given up: and not at the distance of what the reference has become in between."""
    moving, distance = FOLLOWING[started[0]]
    moving = moving | {"rewards": None} if moving["kind"] == "sprec" else moving
    more = moving | {"checkpoint": {"every_epochs": None}, "validation": {"metric": "mrr"}}
    free = run(root, "free", started, 1, epochs=2, **more)
    first, second = (free[epoch * STEPS_PER_EPOCH] for epoch in (1, 2))
    assert abs(second[distance]) > 1e-4
    limit = next(
        {"metric": name.removeprefix("validation/"), "action": "roll_back"}
        | {"max" if second[name] > first[name] else "min": between}
        for name in first
        if name.startswith("validation/") and first[name] != second[name]
        for between in [(first[name] + second[name]) / 2]
        if (free[0][name] < between) == (first[name] < between)  # else it is refused at the start
    )
    guarded = run(root, "guarded", started, 1, epochs=3, guardrails={"limits": [limit]}, **more)
    assert guarded[2 * STEPS_PER_EPOCH] == second
    assert guarded[2 * STEPS_PER_EPOCH + 1][distance] == pytest.approx(0.0, abs=1e-6)


def test_impressions_alone(root: Path, started: tuple[str, dict[str, Any]]) -> None:
    """GBPO without a single rollout, on two ranks as on one."""
    rule = {"kind": "rating", "liked_from": 4, "disliked_to": 2}
    settings = {"kind": "gbpo", "logged": {"alone": True, "rule": rule}, "rewards": None}
    settings |= {"generation": {"kind": "ancestral"}, "epochs": 1}
    whole = run(root, "log", started, 1, **settings)
    assert len([step for step in whole if step]) == STEPS_PER_EPOCH
    first, last = whole[1], whole[max(whole)]
    assert first["train/liked"] > 0 and first["train/disliked"] > 0
    assert -1 < first["train/logged_loss"] != last["train/logged_loss"]
    assert not {"train/reward", "train/ratio"} & first.keys()
    assert abs(first["train/kl"]) < 1e-6 < last["train/kl"]
    assert first["train/entropy"] > 0
    shared = run(root, "log2", started, 2, zero_stage=2, **settings)
    for tag, value in first.items():
        assert shared[1][tag] == pytest.approx(value, rel=2e-3, abs=2e-5), tag


def drawn_users(settings: dict[str, Any]) -> list[set[int]]:
    """In whose contexts GBPO from the log alone tells its KL: of all, without the first of them,
    and where nobody is left."""
    worker = start_worker(settings, quiet)
    config = worker.recipe.alignment
    assert isinstance(config, GBPOConfig)
    policy = evaluation_policy(worker)
    stage = logged_stage(worker, config, settings)
    place = worker.layout.quarantined(settings["fingerprint"])
    found: list[set[int]] = []
    for _ in range(3):
        assert stage.before is not None and isinstance(stage.updates, LoggedImpressions)
        stage.before(policy, False)
        drawn = stage.updates._probe._drawn
        found.append({user for each in drawn for user in each.candidates.batch.user_ids.tolist()})
        samples = [user - 1 for user in sorted(found[0])]
        bad = samples[:1] if len(found) == 1 else samples
        quarantine(place, PoisonedSampleError(bad, "collating it", "a reason"))
    assert not drawn, "without a context there is nothing to tell"
    return found


def test_the_divergence_is_told_at_who_is_trained_on(
    root: Path, started: tuple[str, dict[str, Any]]
) -> None:
    """Over steps, since those of a few users may be held out all of them, and without samples that
    are left out."""
    family, start = started
    rule = {"kind": "rating", "liked_from": 4, "disliked_to": 2}
    more = {"kind": "gbpo", "rewards": None, "logged": {"alone": True, "rule": rule}, "rule": rule}
    more |= {"generation": {"kind": "ancestral"}, "validation_share": 0.7}
    more |= {"prompts": {"per_step": 1}}
    settings = settings_for(root, f"drawn-{family}", family, start=start, **more)
    [[whole, some, nobody]] = run_ranks(1, drawn_users, settings)
    dataset = SequenceDataset(str(root / "data"), 4)
    samples = np.arange(USERS)
    held_out = validation_users(samples + 1, settings["recipe"]["seed"], 0.7)
    trained = ~held_out & (dataset.lengths(samples).train_end >= 2)
    assert held_out.any() and whole == set((samples[trained] + 1).tolist()) and len(whole) > 2
    assert some == whole - {min(whole)} and nobody == set()


def test_other_algorithms(root: Path, started: tuple[str, dict[str, Any]]) -> None:
    rows = run(root, "other", started, 1, epochs=1, zero_stage=2, **OTHERS[started[0]])
    last = rows[max(rows)]
    if started[0] == "hstu":
        assert len(rows) == STEPS_PER_EPOCH + 1
        assert "train/kl" not in last and last["train/clip_high"] == 0
        assert last["train/unique"] == 1  # without replacement
        assert last["train/ratio"] <= 1 and last["train/bounded"] > 0
        assert last["train/logged_loss"] != 0
        assert last["train/liked"] > 0 and last["train/disliked"] > 0
    else:
        assert len(rows) == 2 * STEPS_PER_EPOCH + 1
        assert rows[1]["train/ratio"] == pytest.approx(1.0, abs=1e-4)
        assert last["train/reward/quota"] <= 0
