"""What a step changes outside of parameters (an expert's balance) comes back with a checkpoint."""

from dataclasses import replace
from pathlib import Path

import torch

from sharding.checkpoint import CheckpointStore
from sharding.parallelize import ParallelModel
from sharding.process_group import current_context
from tests.harness import run_ranks
from tests.sharding.policies import Settings, make_policy


def policy_with_buffers(zero_stage: int, value: float) -> ParallelModel:
    policy = make_policy(current_context("cpu"), replace(Settings(), zero_stage=zero_stage))
    policy.model.register_buffer("balance", torch.full((3,), value))
    policy.model.register_buffer("load", torch.full((3,), value), persistent=False)
    return policy


def buffers_return(root: str, zero_stage: int) -> None:
    saved = policy_with_buffers(zero_stage, 0.5)
    store = CheckpointStore(f"{root}/{zero_stage}", 2, saved.ctx)
    info = store.save(saved, 0, {}, {}, {})
    for load in (store.load, store.load_weights):
        policy = policy_with_buffers(zero_stage, 0.0)
        load(policy, info)
        buffers = dict(policy.model.named_buffers())
        assert buffers["balance"].tolist() == [0.5] * 3
        assert not buffers["load"].any(), "counts of a step are not part of a checkpoint"


def both_stages(root: str) -> None:
    for zero_stage in (1, 3):
        buffers_return(root, zero_stage)


def test_persistent_buffers_are_saved_and_restored(tmp_path: Path) -> None:
    run_ranks(2, both_stages, str(tmp_path))
