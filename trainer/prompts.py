"""Prompts of rollouts: contexts cut off training sequences, and the item that came next.

Shape legend: B sequences, T tokens, N prompts.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from configs.policy_gradient import PromptConfig
from data_loaders.prompts import PromptSequences
from models.batch import JaggedBatch
from models.ops.dropout import token_keys
from models.ops.windows import window_ends, windows_ending_at
from trainer.policy import Worker

_DRAW_SALT = 0x70726F6D7074  # apart from the windows that pretraining draws with the same seed


@dataclass(frozen=True)
class Prompts:
    """N contexts, none empty."""

    batch: JaggedBatch
    """Every token's target is the next event's item; `sample_ids` are a hash of (user, cut)."""
    target_ids: Tensor
    """[N] int64, what the user took next."""
    outcomes: Tensor | None
    """[N] float32, whether that was liked (1), disliked (-1) or neither; None without a rule."""


def cut_prompts(
    sequences: PromptSequences,
    position: Literal["last", "random"],
    max_history: int,
    *,
    seed: int,
    epoch: int,
) -> Prompts:
    """One prompt of each sequence that is not empty; a pure function of (seed, epoch, user).

    On the CPU: cutting an accelerator's batch would wait for it.
    """
    batch = sequences.batch
    if position == "random":
        ends = window_ends(batch, 1, seed ^ _DRAW_SALT, epoch)
    else:
        ends = batch.offsets[1:][batch.lengths > 0] - 1
    prompts = windows_ending_at(batch, ends, max_history)
    targets = prompts.item_ids.roll(-1)  # the events of a window follow each other
    last = prompts.offsets[1:] - 1
    targets[last] = prompts.target_ids[last]
    outcomes = None if sequences.outcomes is None else sequences.outcomes[ends]
    return Prompts(replace(prompts, target_ids=targets), targets[last], outcomes)


def prompts_of_step(worker: Worker, config: PromptConfig, step: Any) -> list[Prompts]:
    """Prompts of a step's micro batches, on the CPU; whole, since rewards may read all of them."""
    recipe = worker.recipe
    longest = recipe.data.loader.max_length
    return [
        cut_prompts(sequences, config.position, longest, seed=recipe.seed, epoch=step.epoch)
        for sequences in step.micro_batches
    ]


def request_keys(prompts: JaggedBatch, seed: int, step: int) -> Tensor:
    """Key of each prompt's randomness: int64 [N], a pure function of (seed, step, user, cut)."""
    offsets = torch.arange(prompts.num_sequences + 1, device=prompts.sample_ids.device)
    return token_keys(seed ^ _DRAW_SALT, step, prompts.sample_ids, offsets)
