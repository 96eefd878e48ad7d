"""What a stage saves beside its checkpoints belongs to those that it goes back to."""

from pathlib import Path
from typing import Any

import pytest

from sharding.checkpoint import CheckpointStore
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, make_policy, train
from trainer.stage_saver import StageSaver


def save_all(root: str, behind_training: bool) -> tuple[list[Any], list[int | None], bool, bool]:
    """Stores and steps that something was saved beside, the stores' newest steps, whether cost is
    told, and whether each checkpoint has the name that `save` gave.

    A selection saves in every step, as a rising metric does; what is resumed in the first, and the
    last good policy in the first two.
    """
    policy = make_policy(current_context("cpu"), Settings())
    names = ("newest", "best", "good")
    newest, best, good = (CheckpointStore(f"{root}/{name}", 2, policy.ctx) for name in names)
    called: list[Any] = []
    saver = StageSaver(
        policy,
        {},
        {},
        (newest, good),
        lambda store, name: called.append((store.root.rsplit("/", 1)[1], name, policy.step)),
        behind_training=behind_training,
    )
    named: dict[str, str] = {}
    for step in range(1, 5):
        train(policy, 1)
        if step == 1:
            named["newest"] = saver.save(newest, {})
        named["best"] = saver.save(best, {})
        if step < 3:
            named["good"] = saver.save(good, {})
            assert called[-1][1] == named["good"]
    saver.wait()
    found = [store.newest() for store in (newest, best, good)]
    steps = [None if info is None else info.step for info in found]
    as_named = [None if info is None else info.name for info in found] == [*named.values()]
    beside = [(store, step) for store, _, step in called]
    return beside, steps, saver.sentence() is not None, as_named


@pytest.mark.parametrize("behind_training", [True, False])
def test_only_what_is_gone_back_to_has_something_beside_it(
    tmp_path: Path, behind_training: bool
) -> None:
    [found] = run_ranks(1, save_all, str(tmp_path), behind_training)
    beside = [("newest", 1), ("good", 1), ("good", 2)]
    assert found == (beside, [1, 4, 2], behind_training, True)
