"""Users with their targets for evaluation, and without one for recommendation.

Shape legend: B users, S seen items of all users.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from configs.preferences import PreferenceRule
from data_loaders.collate import Following, jagged_batch, split_last
from data_loaders.dataset import SequenceDataset
from data_loaders.loader import NOBODY, rank_share, without
from data_loaders.preference_rules import columns_of, outcomes
from models.batch import JaggedBatch


@dataclass(frozen=True)
class EvaluationBatch:
    """Users, the item that each of them took next, and what they had seen before it."""

    batch: JaggedBatch
    """History before the target; the query is each sequence's last position."""
    target_ids: Tensor
    """[B] int64; 0 where there is none (recommendation)."""
    seen_ids: Tensor
    """[S] int64, all earlier items of each user, not truncated."""
    seen_offsets: Tensor
    """[B+1] int64; user b has seen seen_ids[seen_offsets[b]:seen_offsets[b+1]]."""
    liked: Tensor | None = None
    """[B] bool: a rule says that the user liked the target; None without a rule."""

    def to(self, device: torch.device | str) -> "EvaluationBatch":
        """Copy on `device` (itself if it is there already)."""
        return EvaluationBatch(
            batch=self.batch.to(device),
            target_ids=self.target_ids.to(device, non_blocking=True),
            seen_ids=self.seen_ids.to(device, non_blocking=True),
            seen_offsets=self.seen_offsets.to(device, non_blocking=True),
            liked=None if self.liked is None else self.liked.to(device, non_blocking=True),
        )


def evaluation_batches(
    dataset: SequenceDataset,
    part: Literal["validation", "test"],
    *,
    users_per_batch: int,
    max_length: int,
    rank: int,
    world_size: int,
    max_users: int | None = None,
    rule: PreferenceRule | None = None,
    left_out: np.ndarray = NOBODY,
) -> Iterator[EvaluationBatch]:
    """Users that have a target in `part`, this rank's share; as many batches on every rank.

    The history is all events before the target (so the test sees the validation item), cut to the
    last `max_length`. Users without a target, or without any event before it, are left out; with
    `max_users`, so are all but the first users by id; so are those of `left_out` (int64 sample
    ids), whom nobody can read. A `rule` (`check_rule` has passed) judges the
    targets; its percentiles are over the history and the target.
    """
    total = dataset.num_samples if max_users is None else min(max_users, dataset.num_samples)
    asked = without(np.arange(total), left_out)
    for ids in rank_share(asked, users_per_batch, rank, world_size):
        lengths = dataset.lengths(ids)
        target, limit = {
            "validation": (lengths.train_end, lengths.validation_end),
            "test": (lengths.validation_end, lengths.total),
        }[part]
        kept = (target < limit) & (target > 0)
        users = _with_seen(dataset, ids[kept], target[kept], max_length, predict=True)
        if rule is not None:
            users = replace(users, liked=_liked(dataset, ids[kept], target[kept], rule))
        yield users


def recommendation_batch(
    dataset: SequenceDataset, sample_ids: np.ndarray, max_length: int
) -> EvaluationBatch:
    """Whole histories of a few users (in their order, maybe none), with nothing to predict.

    Targets are 0, and the request time of the last position is that of the last event, since no
    later one is known.
    """
    return _with_seen(
        dataset, sample_ids, dataset.lengths(sample_ids).total, max_length, predict=False
    )


def _liked(
    dataset: SequenceDataset, ids: np.ndarray, targets: np.ndarray, rule: PreferenceRule
) -> Tensor:
    """[B] bool: the event at `targets` of each user was liked."""
    slices = dataset.reader.slices(ids, np.zeros_like(targets), targets + 1, columns_of(rule))
    judged = outcomes(slices, rule, dataset.manifest.labels).liked
    return torch.from_numpy(judged[slices.offsets[1:] - 1])


def _with_seen(
    dataset: SequenceDataset, ids: np.ndarray, ends: np.ndarray, max_length: int, *, predict: bool
) -> EvaluationBatch:
    """Events before `ends` as history and as seen items; the event at `ends` is the target."""
    seen = dataset.reader.slices(ids, np.zeros_like(ends), ends, ["item_ids"])
    begin = np.maximum(ends - max_length, 0)
    if predict:
        inputs, following = split_last(dataset.reader.slices(ids, begin, ends + 1))
    else:
        inputs = dataset.reader.slices(ids, begin, ends)
        now = inputs.events["timestamps"][inputs.offsets[1:] - 1]
        following = Following(np.zeros_like(ends), now)
    return EvaluationBatch(
        batch=jagged_batch(inputs, following),
        target_ids=torch.from_numpy(following.item_ids),
        seen_ids=torch.from_numpy(seen.events["item_ids"]),
        seen_offsets=torch.from_numpy(seen.offsets),
    )
