"""Negatives as pure functions of (seed, step, sample id, position): nothing else can change them.

Shape legend: B sequences, T tokens, R uniform negatives, M positives of the global batch.
"""

import math

import torch
from torch import Tensor

from configs.objectives import FullSoftmaxConfig, ItemObjective, SampledSoftmaxConfig
from models.batch import JaggedBatch
from models.ops.dropout import token_keys
from models.ops.hashing import GOLDEN_64, mix64_int
from models.ops.keyed_sampling import keyed_integers
from trainer.objectives.next_item import NextItemInputs

_NEGATIVES_SALT = 0x4E454731  # tells these draws from dropout's and the in-batch pool's


def draw_negatives(
    objective: ItemObjective,
    batch: JaggedBatch,
    num_items: int,
    seed: int,
    step: int,
    global_positives: Tensor | None = None,
    item_counts: Tensor | None = None,
) -> NextItemInputs:
    """The loss inputs of a micro batch, on its device.

    Args:
        objective: which negatives, how many, shared by whom, corrected or not.
        batch: the micro batch.
        num_items: uniform negatives are 1 … num_items.
        seed: of the run.
        step: global optimizer step.
        global_positives: [M] positives of the global batch, equal on all ranks and micro batches;
            wanted where the objective has in-batch negatives.
        item_counts: [num_items+1] occurrences of each item in the training data; wanted where
            in-batch negatives are corrected by their frequency.

    Raises:
        ValueError: in-batch negatives are to be corrected and no counts are given.
    """
    step_seed = seed_of_step(seed, step)
    if isinstance(objective, FullSoftmaxConfig):
        return NextItemInputs(batch, None, None, step_seed)
    count, in_batch = _pool_sizes(objective, global_positives)
    device = batch.item_ids.device
    ids = torch.empty(0, dtype=torch.int64, device=device)
    if count:
        ids = _uniform(objective, batch, num_items, count, seed, step)
    if global_positives is not None and in_batch:
        shared = global_positives.to(device).expand(*ids.shape[:-1], -1)
        ids = torch.cat([ids, shared], dim=-1)
    logq = None
    if objective.logq_correction:
        logq = _expected_log_count(ids, count, in_batch, num_items, item_counts)
    return NextItemInputs(batch, ids, logq, step_seed)


def seed_of_step(seed: int, step: int) -> int:
    """Seed of a step's randomness, a pure function of the two."""
    return mix64_int(mix64_int(seed + GOLDEN_64) + step * GOLDEN_64) >> 1


def _pool_sizes(objective: SampledSoftmaxConfig, positives: Tensor | None) -> tuple[int, int]:
    """Uniform negatives per group, and positives of the global batch among the negatives."""
    count = 0 if objective.negatives == "in_batch" else objective.num_negatives
    if objective.negatives == "uniform":
        return count, 0
    assert positives is not None, "in-batch negatives need the positives of the global batch"
    return count, positives.numel()


def _uniform(
    objective: SampledSoftmaxConfig,
    batch: JaggedBatch,
    num_items: int,
    count: int,
    seed: int,
    step: int,
) -> Tensor:
    """Ids 1 … num_items: [R], [B, R] or [T, R]."""
    samples, offsets = batch.sample_ids, batch.offsets
    if objective.shared == "batch":
        samples, offsets = torch.zeros_like(offsets[:1]), torch.tensor([0, 1]).to(offsets.device)
    elif objective.shared == "sequence":
        offsets = torch.arange(offsets.numel(), device=offsets.device)
    keys = token_keys(seed, step, samples, offsets)
    ids = keyed_integers(keys, count, num_items, _NEGATIVES_SALT) + 1
    return ids[0] if objective.shared == "batch" else ids


def _expected_log_count(
    ids: Tensor, count: int, in_batch: int, num_items: int, item_counts: Tensor | None
) -> Tensor:
    """log of the expected number of times that each id is drawn; a scalar where all are alike.

    A uniform draw expects R / num_items of every item, an in-batch pool M times the item's share of
    the training events, a mixture the sum of both (mixed negative sampling, Yang et al. 2020).
    """
    if not in_batch:
        return torch.tensor(math.log(count / num_items), device=ids.device)
    if item_counts is None:
        raise ValueError(
            "objective.logq_correction with in-batch negatives needs the items' training counts; "
            "pass item_counts or set objective.logq_correction to false"
        )
    counts = item_counts.to(ids.device)
    share = counts[ids].clamp(min=1) / counts.sum()
    return (count / num_items + in_batch * share).log().float()
