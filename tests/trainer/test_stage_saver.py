"""What a stage saves beside its checkpoints belongs to those that are resumed."""

from pathlib import Path

import pytest

from sharding.checkpoint import CheckpointStore
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, make_policy, train
from trainer.stage_saver import StageSaver


def save_all(root: str, behind_training: bool) -> tuple[list[int], list[int | None], bool]:
    """Steps that `before_save` was called at, the stores' newest steps, and whether cost is told.

    A selection saves in every step, as a rising metric does, and what is resumed in the first.
    """
    policy = make_policy(current_context("cpu"), Settings())
    newest, best = (CheckpointStore(f"{root}/{name}", 2, policy.ctx) for name in ("newest", "best"))
    called: list[int] = []
    saver = StageSaver(
        policy,
        {},
        {},
        newest,
        lambda: called.append(policy.step),
        behind_training=behind_training,
    )
    for step in range(1, 5):
        train(policy, 1)
        if step == 1:
            saver.save(newest, {})
        saver.save(best, {})
    saver.wait()
    found = [store.newest() for store in (newest, best)]
    steps = [None if info is None else info.step for info in found]
    return called, steps, saver.sentence() is not None


@pytest.mark.parametrize("behind_training", [True, False])
def test_only_what_is_resumed_has_something_beside_it(
    tmp_path: Path, behind_training: bool
) -> None:
    [found] = run_ranks(1, save_all, str(tmp_path), behind_training)
    assert found == ([1], [1, 4], behind_training)
