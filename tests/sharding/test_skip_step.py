"""A step that is left out leaves nothing behind, under every ZeRO stage."""

from dataclasses import replace
from typing import Any

import pytest

from sharding.loss_module import LossOutput, NonFiniteLossError
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, differing, make_policy, train, whole_state


def spoil_once(policy: Any) -> None:
    """Have the next loss of this rank be no number."""
    forward = policy._loss.forward

    def spoiled(*args: Any) -> LossOutput:
        policy._loss.forward = forward
        output = forward(*args)
        return replace(output, loss_sum=output.loss_sum * float("nan"))

    policy._loss.forward = spoiled


def leave_out(bad_rank: int) -> None:
    for stage in range(4):
        settings = replace(Settings(), zero_stage=stage)
        ctx = current_context("cpu")
        policy, other = make_policy(ctx, settings), make_policy(ctx, settings)
        train(policy, 2)
        policy.may_skip = stage > 0
        if ctx.rank == bad_rank:
            spoil_once(policy)
        with pytest.raises(NonFiniteLossError) as error:
            train(policy, 1)
        assert error.value.mine == (ctx.rank == bad_rank)
        told = "failures.non_finite.action=skip" in str(error.value)
        assert told == (not policy.may_skip)  # no advice that is followed already
        policy.skip_step()
        losses = train(policy, 3)

        train(other, 2)
        other.step += 1  # as if there had been no such step
        assert train(other, 3) == losses, stage
        assert differing(whole_state(policy), whole_state(other)) == [], stage


def test_nothing_of_a_step_that_is_left_out_stays() -> None:
    run_ranks(2, leave_out, 1, timeout=300)
