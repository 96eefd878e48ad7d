"""Random jagged batches for tests of models and objectives."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import JaggedBatch


def make_batch(
    lengths: list[int],
    num_items: int,
    seed: int = 0,
    predicting: float = 1.0,
    user_features: dict[str, int] | None = None,
    side_features: dict[str, int] | None = None,
) -> JaggedBatch:
    """Sequences of these lengths whose content depends on (seed, place in the list) alone.

    `predicting` is the share of positions with a target; features map a name to its categories.
    """
    parts = [_sequence(length, num_items, seed * 1000 + b) for b, length in enumerate(lengths)]
    items, times = (_concatenate([part[at] for part in parts]) for at in (0, 1))
    targets, following = (_concatenate([part[at] for part in parts]) for at in (2, 3))
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(targets.shape, generator=generator) < predicting

    def draw(features: dict[str, int] | None, count: int) -> dict[str, Tensor]:
        return {
            name: torch.randint(0, categories + 1, (count,), generator=generator)
            for name, categories in (features or {}).items()
        }

    return JaggedBatch(
        sample_ids=torch.arange(len(lengths)),
        user_ids=torch.arange(len(lengths)) + 1,
        offsets=F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)),
        item_ids=items,
        timestamps=times,
        next_timestamps=following,
        target_ids=targets * kept,
        user_features=draw(user_features, len(lengths)),
        side_features=draw(side_features, items.numel()),
    )


def take(batch: JaggedBatch, sequences: list[int]) -> JaggedBatch:
    """The batch of some of the sequences, in the given order."""
    starts = batch.offsets.tolist()
    tokens = _concatenate([torch.arange(starts[b], starts[b + 1]) for b in sequences])
    chosen = torch.tensor(sequences, dtype=torch.int64)
    return JaggedBatch(
        sample_ids=batch.sample_ids[chosen],
        user_ids=batch.user_ids[chosen],
        offsets=F.pad(batch.lengths[chosen].cumsum(0), (1, 0)),
        item_ids=batch.item_ids[tokens],
        timestamps=batch.timestamps[tokens],
        next_timestamps=batch.next_timestamps[tokens],
        target_ids=batch.target_ids[tokens],
        user_features={name: x[chosen] for name, x in batch.user_features.items()},
        side_features={name: x[tokens] for name, x in batch.side_features.items()},
    )


def tokens_of(batch: JaggedBatch, values: Tensor, sequence: int) -> Tensor:
    """The rows of `values` [T, ...] that belong to one sequence."""
    start, stop = batch.offsets[sequence : sequence + 2].tolist()
    return values[start:stop]


def _sequence(length: int, num_items: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(1, num_items + 1, (length + 1,), generator=generator)
    # from seconds to years apart, so that many time buckets are met
    gaps = torch.exp(torch.rand(length + 1, generator=generator) * 17).long()
    times = 1_000_000_000 + gaps.cumsum(0)
    return items[:-1], times[:-1], items[1:], times[1:]


def _concatenate(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
