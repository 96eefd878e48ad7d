"""A step that is left out leaves nothing behind, under every ZeRO stage."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sharding.loss_module import LossOutput, NonFiniteLossError
from sharding.parallelize import ParallelModel
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding import test_parallelize_decoders as decoders
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


def leave_out_of_experts(bad_rank: int) -> None:
    """What the forward counts is no gradient: it has to be forgotten, too."""
    for case in (decoders.Case("lazy_decoder", 0), decoders.Case("onerec", 2)):
        policy, other = decoders.make_policy(case), decoders.make_policy(case)
        policy.may_skip = True
        decode(policy, 1)
        if policy.ctx.rank == bad_rank:
            spoil_once(policy)
        with pytest.raises(NonFiniteLossError):
            decode(policy, 1)
        policy.skip_step()
        decode(other, 1)
        other.step += 1
        buffers = dict(other.model.named_buffers())  # those that no checkpoint has, too
        for name, buffer in policy.model.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
        assert decode(policy, 2) == decode(other, 2), case
        assert differing(whole_state(policy), whole_state(other)) == [], case


def decode(policy: ParallelModel, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        own = list(range(policy.ctx.rank, decoders.SAMPLES, policy.ctx.world_size))
        inputs = decoders.inputs(policy.model, policy.step, own)
        losses.append(policy.train_step([inputs]).loss)
    return losses


def leave_out_of_all(bad_rank: int) -> None:
    leave_out(bad_rank)
    leave_out_of_experts(bad_rank)


def test_nothing_of_a_step_that_is_left_out_stays() -> None:
    run_ranks(2, leave_out_of_all, 1, timeout=300)
