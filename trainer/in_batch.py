"""Positives of the global batch as negatives: a sample that world size cannot change."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.batch import JaggedBatch
from models.ops.dropout import token_keys
from sharding.process_group import DistributedContext


def gather_positives(
    batches: Sequence[JaggedBatch], count: int, seed: int, step: int, ctx: DistributedContext
) -> Tensor:
    """Draw `count` targets of the global batch without replacement. Collective.

    Every position has a key that depends on (seed, step, sample, position) alone, and the `count`
    lowest keys of the global batch win: each rank offers its own lowest, so that what is exchanged
    is count × world numbers whatever the batch.

    Returns:
        [min(count, targets)] int64 item ids, in key order, equal on all ranks.
    """
    ids, keys = _targets(batches, seed, step)
    own = torch.topk(keys, min(count, keys.numel()), largest=False).indices
    offer = torch.full((2, count), torch.iinfo(torch.int64).max, dtype=torch.int64)
    offer[0, : own.numel()] = keys[own].cpu()
    offer[1, : own.numel()] = ids[own].cpu()
    offers = torch.cat(ctx.all_gather_object(offer), dim=1)
    order = torch.argsort(offers[0], stable=True)[:count]
    chosen = offers[:, order]
    present = chosen[0] < torch.iinfo(torch.int64).max
    return chosen[1][present].to(ctx.device)


def _targets(batches: Sequence[JaggedBatch], seed: int, step: int) -> tuple[Tensor, Tensor]:
    ids = torch.cat([b.target_ids for b in batches])
    keys = torch.cat([token_keys(seed, step, b.sample_ids, b.offsets) for b in batches])
    valid = ids > 0
    return ids[valid], keys[valid]
