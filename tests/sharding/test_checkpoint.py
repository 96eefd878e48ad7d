"""Checkpoints of a real policy: bit exact, at other world sizes, under every ZeRO stage.

Many settings share one call of `run_ranks`: starting ranks costs more than what they do.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharding.checkpoint import CheckpointError, CheckpointInfo, CheckpointStore
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, differing, make_policy, train, whole_state

STATE = {"loader": {"epoch": 1, "epoch_step": 2}, "best": 0.25, "history": [1, None, "x"]}
RECIPE = {"name": "small", "seed": 1}
BASE = Settings()
WIDE = replace(BASE, width=8)  # two column-wise shards; 6 columns are too few to cut
STAGES = [replace(BASE, zero_stage=stage) for stage in (0, 1, 2, 3)]
VARIANTS = [
    replace(BASE, precision="bf16"),
    replace(BASE, placement="table_wise", optimizer="adagrad"),
    replace(WIDE, placement="column_wise"),
    replace(BASE, placement="replicated", zero_stage=3),
    replace(BASE, optimizer="sgd"),
]
Run = tuple[dict[str, Tensor], list[float], dict[str, Tensor]]
"""The whole state at the checkpoint, the losses after it, and the state then."""


def save(root: str, settings: Settings) -> tuple[CheckpointInfo, Run]:
    """Train two steps, save, go on."""
    policy = make_policy(current_context("cpu"), settings)
    train(policy, 2)
    state = whole_state(policy)
    store = CheckpointStore(root, 2, policy.ctx)
    info = store.save(policy, policy.step, STATE, RECIPE, {"data": "abc"})
    return info, (state, train(policy, 3), whole_state(policy))


def load(root: str, settings: Settings) -> Run:
    """Load into a policy that was initialised otherwise, go on."""
    policy = make_policy(current_context("cpu"), replace(settings, seed=2))
    store = CheckpointStore(root, 2, policy.ctx)
    assert store.load(policy, newest(store)) == STATE
    assert store.recipe(newest(store)) == RECIPE
    return whole_state(policy), train(policy, 3), whole_state(policy)


def newest(store: CheckpointStore) -> CheckpointInfo:
    info = store.newest()
    assert info is not None and store.skipped == ()
    return info


def round_trips(root: str, variants: Sequence[Settings]) -> None:
    """All alike to the last bit, after loading and three steps later."""
    for at, settings in enumerate(variants):
        info, (saved, losses, final) = save(f"{root}/{at}", settings)
        draw = torch.rand(3)
        torch.manual_seed(99)
        loaded, losses_again, final_again = load(f"{root}/{at}", settings)
        assert differing(saved, loaded) == [], settings
        assert losses == losses_again, settings
        assert differing(final, final_again) == [], settings
        assert torch.equal(draw, torch.rand(3)), "generators continue as they would have"
        assert (info.step, info.fingerprints) == (2, {"data": "abc"})
        momenta = [v for key, v in saved.items() if key.endswith(("momentum1", "exp_avg"))]
        assert momenta and all(v.any() for v in momenta), "there is something to forget"


@pytest.mark.parametrize(
    ("world_size", "variants"),
    [(1, STAGES), (2, STAGES), (2, VARIANTS)],
    ids=["stages alone", "stages", "variants"],
)
def test_round_trips_are_bit_exact(
    world_size: int, variants: list[Settings], tmp_path: Path
) -> None:
    run_ranks(world_size, round_trips, str(tmp_path), variants)


def save_all(root: str, variants: Sequence[Settings]) -> list[Run]:
    return [save(f"{root}/{at}", settings)[1] for at, settings in enumerate(variants)]


def load_all(root: str, variants: Sequence[Settings]) -> list[Run]:
    return [load(f"{root}/{at}", settings) for at, settings in enumerate(variants)]


def assert_continues(before: Run, after: Run) -> None:
    """The same state, and the same training up to the order of summation."""
    assert differing(before[0], after[0]) == []
    assert after[1] == pytest.approx(before[1], rel=1e-5)
    key = "tables/item.weight"
    assert torch.allclose(before[2][key], after[2][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(2, (1, 3)), (1, (2,))])
def test_the_world_and_the_stage_may_change(
    before: int, after: tuple[int, ...], tmp_path: Path
) -> None:
    saved = run_ranks(before, save_all, str(tmp_path), [STAGES[1], STAGES[3]])[0]
    for world_size in after:
        ranks = run_ranks(world_size, load_all, str(tmp_path), [STAGES[2], STAGES[1]])
        for loaded in ranks:
            assert_continues(saved[0], loaded[0])
            assert_continues(saved[1], loaded[1])


def change_the_cut(root: str) -> None:
    """Row-wise to others: exact where the optimizer's state has a number for every weight."""
    settings = replace(WIDE, optimizer="adagrad")
    _, saved = save(root, settings)
    for placement in ("table_wise", "column_wise"):
        assert_continues(saved, load(root, replace(settings, placement=placement)))
    _, saved = save(f"{root}/rowwise", WIDE)
    assert_continues(saved, load(f"{root}/rowwise", replace(WIDE, placement="table_wise")))


def test_a_table_may_be_cut_otherwise(tmp_path: Path) -> None:
    run_ranks(2, change_the_cut, str(tmp_path))


OTHERS = {
    "tables/item.weight": replace(WIDE, items=40),
    "another catalogue": replace(WIDE, width=10),
    "sharding.optimizer.kind": replace(WIDE, optimizer="adagrad"),
    "another architecture": replace(WIDE, layers=2),
}


def refusals(root: str) -> list[str]:
    """Why each other policy refuses the checkpoint; it stays as it was."""
    save(root, WIDE)
    store = CheckpointStore(root, 2, current_context("cpu"))
    info = newest(store)
    sentences = []
    for settings in OTHERS.values():
        policy = make_policy(current_context("cpu"), settings)
        before = whole_state(policy)
        with pytest.raises(CheckpointError) as error:
            store.load(policy, info)
        sentences.append(str(error.value))
        assert differing(before, whole_state(policy)) == []
    return sentences


def test_another_models_checkpoint_is_refused_in_a_sentence(tmp_path: Path) -> None:
    answers = run_ranks(2, refusals, str(tmp_path))
    assert answers[0] == answers[1]
    for part, sentence in zip(OTHERS, answers[0], strict=True):
        assert part in sentence and "cannot be loaded" in sentence and "\n" not in sentence


def start_from_weights(root: str) -> None:
    """A new stage: the weights are there, the optimizers and counters are new."""
    ctx = current_context("cpu")
    for settings in (STAGES[1], STAGES[3]):
        _, (saved, _, _) = save(f"{root}/{settings.zero_stage}", settings)
        fresh = whole_state(make_policy(ctx, replace(settings, seed=3)))
        policy = make_policy(ctx, replace(settings, seed=3))
        store = CheckpointStore(f"{root}/{settings.zero_stage}", 2, ctx)
        store.load_weights(policy, newest(store))
        for key, value in whole_state(policy).items():
            is_weight = key.endswith(("/weight", "item.weight"))
            assert torch.equal(value, (saved if is_weight else fresh)[key]), key
        assert (policy.step, policy.engine.adam_step) == (0, 0)
        store.load_start(policy, newest(store))  # alignment goes on with the tables' Adagrad sums
        for key, value in whole_state(policy).items():
            kept = key.endswith(("/weight", "item.weight", ".momentum1"))
            assert torch.equal(value, (saved if kept else fresh)[key]), key
        assert not torch.equal(saved["tables/item.momentum1"], fresh["tables/item.momentum1"])
        assert (policy.step, policy.engine.adam_step) == (0, 0)
        other = make_policy(ctx, replace(settings, optimizer="sgd"))
        store.load_start(other, newest(store))  # sgd keeps no sums: the weights alone
        store.load_weights(other, newest(store))  # weights do not depend on the optimizer
        assert torch.equal(other.tables.gather("item"), saved["tables/item.weight"])


def test_weights_alone_start_a_new_stage(tmp_path: Path) -> None:
    run_ranks(2, start_from_weights, str(tmp_path))


def test_other_file_systems_hold_checkpoints() -> None:
    run_ranks(1, round_trips, "memory://checkpoints", [BASE])
