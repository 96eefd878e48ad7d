"""The reference moves as told, both halves of it, and comes back as it was."""

from pathlib import Path

import pytest
import torch

from configs.alignment import OnlineAlignment
from configs.layout import RunLayout
from data_loaders.synthetic import write_synthetic
from sharding.checkpoint import CheckpointStore
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, differing, make_policy, train, whole_state
from tests.trainer.runs import ITEMS, USERS, quiet
from tests.trainer.test_align_online import GRPO, settings_for
from trainer.objectives.online import OnlineLoss
from trainer.policy import start_worker
from trainer.reference_policy import ReferencePolicy, mix
from trainer.scoring import build_scorer

SHARE = 0.25


def mixed(zero_stage: int) -> tuple[dict[str, torch.Tensor], ...]:
    """Weights of the reference and the policy before, and of the reference after."""
    ctx = current_context("cpu")
    policy = make_policy(ctx, Settings(zero_stage=zero_stage))
    still = 3 if zero_stage == 3 else 0
    reference = make_policy(ctx, Settings(zero_stage=still, optimizer="sgd", seed=2))
    train(policy, 2)
    before, newer = whole_state(reference), whole_state(policy)
    mix(reference, policy, SHARE)
    return before, newer, whole_state(reference), whole_state(policy)


def test_mixing_in_every_stage_on_two_ranks() -> None:
    for zero_stage in (1, 3):
        before, newer, after, untouched = run_ranks(2, mixed, zero_stage)[0]
        assert not differing(newer, untouched)
        names = [key for key in before if key.endswith(("/weight", ".weight"))]
        assert any(key.startswith("tables/") for key in names)
        for key in names:
            assert not torch.equal(before[key], newer[key]), key
            torch.testing.assert_close(after[key], before[key].lerp(newer[key], SHARE), msg=key)


def come_back(root: str) -> None:
    worker = start_worker(settings_for(Path(root), "f", "hstu", **GRPO), quiet)
    config = worker.recipe.alignment
    assert isinstance(config, OnlineAlignment) and config.reference is not None
    loss = OnlineLoss(build_scorer(worker, normalised=True), config)
    reference = ReferencePolicy(worker, config.reference, loss, {"url": "", "hash": "h"})
    newest = CheckpointStore(RunLayout(root).checkpoints("align", "f"), 2, worker.ctx)
    policy = make_policy(worker.ctx, Settings())
    names = {}
    for step in (2, 4, 6, 8, 10):
        names[step] = name = newest.next_name(step)
        reference.save(newest, name, step)
        reference.restore(newest, name)
        if step < 6:
            newest.save(policy, step, {}, {}, {}, name)
    # As long as its checkpoint is there; that of the last ones would have come next.
    kept = [int(path.name[5:13]) for path in Path(newest.root).glob("reference/step-*")]
    assert sorted(kept) == [2, 4, 8, 10]
    for file in Path(newest.root).glob("reference/step-00000004-*/*.distcp"):
        file.write_bytes(b"")
    absent = f"no reference policy {names[4]} .* has 0 bytes"
    with pytest.raises(ValueError, match=absent) as error:
        reference.restore(newest, names[4])
    told = str(error.value)
    assert f"the checkpoint of that name in {newest.root} " in told and "--force" not in told
    reference.restore(newest, names[2])


def test_a_damaged_reference_costs_no_more_than_its_own_checkpoint(tmp_path: Path) -> None:
    write_synthetic(str(tmp_path / "data"), USERS, ITEMS, 9, 3, rows_per_group=16)
    run_ranks(1, come_back, str(tmp_path))
