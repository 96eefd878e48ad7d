"""Whole event sequences with what was done at each event, for models that learn from outcomes.

Shape legend: B sequences, T tokens.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from configs.data import LoaderConfig
from data_loaders.collate import Following, jagged_batch
from data_loaders.dataset import SequenceDataset, Slices
from data_loaders.loader import NOBODY, LoaderState, PrefixLoader, rank_share, without
from models.batch import JaggedBatch


class HistoryLoader(PrefixLoader):
    """Steps over the training prefixes of all users, their last event included.

    `TrainingLoader` keeps the last event for prediction; here every event's outcome is in the
    batch. Order, dealing, budget and state are its own.

    Args:
        candidates: events of a request; a sequence is dealt at the cost of its requests, each of
            which carries its history.
        requests_per_user: most requests of a sequence in a step; None is every one.
        include_validation: prefixes end at `validation_end`.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        config: LoaderConfig,
        *,
        candidates: int,
        requests_per_user: int | None,
        seed: int,
        rank: int,
        world_size: int,
        include_validation: bool,
        state: LoaderState | None = None,
    ) -> None:
        super().__init__(
            dataset,
            config,
            seed=seed,
            rank=rank,
            world_size=world_size,
            include_validation=include_validation,
            state=state,
        )
        self._candidates, self._requests = candidates, requests_per_user

    def _tokens(self, sample_ids: np.ndarray) -> np.ndarray:
        events = np.minimum(self._ends(sample_ids), self._config.max_length)
        return request_tokens(events, self._candidates, self._requests)

    def _batch(self, sample_ids: np.ndarray) -> JaggedBatch:
        ends = self._ends(sample_ids)
        begin = np.maximum(ends - self._config.max_length, 0)
        return _whole(self._dataset.reader.slices(sample_ids, begin, ends))


def request_tokens(events: np.ndarray, candidates: int, requests: int | None) -> np.ndarray:
    """int64 tokens of the requests cut from sequences of so many events: candidates and histories.

    Where requests are drawn, their mean.
    """
    every = -(-events // candidates)
    tokens = events + candidates * every * (every - 1) // 2
    if requests is None:
        return tokens
    kept = np.minimum(every, requests)
    return -(-tokens * kept // np.maximum(every, 1))


def held_out_batches(
    dataset: SequenceDataset,
    part: Literal["train", "validation", "test"],
    *,
    users_per_batch: int,
    max_length: int,
    rank: int,
    world_size: int,
    max_users: int | None = None,
    left_out: np.ndarray = NOBODY,
) -> Iterator[tuple[JaggedBatch, Tensor]]:
    """All events of a part and the `max_length` before them, with the place [B] of the first.

    This rank's share of the users, as many batches on every rank; users without an event in the
    part are left out, and so are those of `left_out` (int64 sample ids). The histories of test
    events hold the validation events, as in serving. Of the part `train` only the last `max_length`
    events are read.
    """
    total = dataset.num_samples if max_users is None else min(max_users, dataset.num_samples)
    asked = without(np.arange(total), left_out)
    for ids in rank_share(asked, users_per_batch, rank, world_size):
        lengths = dataset.lengths(ids)
        first, end = {
            "train": (np.maximum(lengths.train_end - max_length, 0), lengths.train_end),
            "validation": (lengths.train_end, lengths.validation_end),
            "test": (lengths.validation_end, lengths.total),
        }[part]
        kept = first < end
        ids, first, end = ids[kept], first[kept], end[kept]
        begin = np.maximum(first - max_length, 0)
        slices = dataset.reader.slices(ids, begin, end)
        yield _whole(slices), torch.from_numpy((first - begin).astype(np.int64))


def _whole(slices: Slices) -> JaggedBatch:
    """All events; the request after the last one is made at its own time, as no later is known."""
    filled = slices.lengths > 0
    now = np.zeros(len(filled), np.int64)
    now[filled] = slices.events["timestamps"][slices.offsets[1:][filled] - 1]
    return jagged_batch(slices, Following(np.zeros_like(now), now))
