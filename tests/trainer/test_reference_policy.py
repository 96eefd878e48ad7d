"""The reference moves as told, both halves of it, and comes back as it was."""

import torch

from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, differing, make_policy, train, whole_state
from trainer.reference_policy import mix

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
