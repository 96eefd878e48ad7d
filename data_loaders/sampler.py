"""Which samples form a step, and which rank and micro batch takes each of them.

Both are pure functions without communication. The order depends on (seed, epoch, step, global
batch) and never on the world size, so a run may stop on two ranks and go on with four; dealing
needs only the lengths of the step's samples, so every rank computes all of it and agrees.

Shape legend: N samples, G row groups, B samples of a global batch, W ranks, K micro batches.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from models.ops.hashing import GOLDEN_64, as_signed, mix64, mix64_int

RANKS_PER_SPAN = 8
"""Ranks that share the row groups of one stretch of a step (a node's worth)."""


def hash_values(values: np.ndarray, *keys: int) -> np.ndarray:
    """A random-looking int64 for each int64 value, a pure function of the value and the keys.

    Hashes rather than a library's generator, whose stream may change between releases.
    """
    state = 0
    for key in keys:
        state = mix64_int(state + key + 1)
    spread = torch.from_numpy(values) * as_signed(GOLDEN_64)
    return mix64(spread + as_signed(state)).numpy()


def hashes(count: int, *keys: int) -> np.ndarray:
    """`count` independent random int64, a pure function of the keys."""
    return hash_values(np.arange(1, count + 1), *keys)


def hashed_order(count: int, *keys: int) -> np.ndarray:
    """A permutation of 0 … count-1, int64, a pure function of the keys."""
    return np.argsort(hashes(count, *keys), kind="stable")


class ElasticOrder:
    """The order of all epochs over row groups of given sizes.

    Row groups are permuted, cut into windows of `window` groups, and the rows of a window are
    permuted; steps cut that sequence. Memory is O(G + rows of a window), never O(N).

    Args:
        row_group_sizes: rows of each group; sample ids run over them in this order. Zeros are fine.
        global_batch: samples of a step over all ranks; the last step of an epoch may hold fewer.
        window: groups whose rows are shuffled together.
        drop_last: leave out a last step that is not full.

    Raises:
        ValueError: there is no step in an epoch.
    """

    def __init__(
        self,
        row_group_sizes: Sequence[int] | np.ndarray,
        *,
        global_batch: int,
        window: int,
        seed: int,
        drop_last: bool = False,
    ) -> None:
        self._sizes = np.asarray(row_group_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.num_samples = int(self._sizes.sum())
        self.global_batch, self._window, self._seed = global_batch, window, seed
        full, rest = divmod(self.num_samples, global_batch)
        self.steps_per_epoch = full + (1 if rest and not drop_last else 0)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"an epoch has no step: {self.num_samples} samples, global batch {global_batch}, "
                f"drop_last={drop_last}; lower the global batch or set drop_last to false"
            )
        # Neighbouring steps share a window and all steps of an epoch share the groups' order.
        self._epoch = lru_cache(maxsize=2)(self._compute_epoch)
        self._rows = lru_cache(maxsize=2)(self._compute_rows)

    def samples_of_step(self, epoch: int, step: int) -> np.ndarray:
        """Sample ids of step `step` of `epoch`, int64 [B], for all ranks together.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} is not in 0 … {self.steps_per_epoch - 1}")
        begin = step * self.global_batch
        end = min(begin + self.global_batch, self.num_samples)
        _, bounds = self._epoch(epoch)
        first = int(np.searchsorted(bounds, begin, side="right")) - 1
        last = int(np.searchsorted(bounds, end, side="left"))
        parts = [
            self._rows(epoch, w)[max(begin - bounds[w], 0) : end - bounds[w]]
            for w in range(first, last)
        ]
        return np.concatenate(parts)

    def _compute_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Groups in the epoch's order [G]; where each window starts and the last one ends."""
        groups = hashed_order(len(self._sizes), self._seed, epoch)
        ends = np.concatenate([[0], np.cumsum(self._sizes[groups])])
        return groups, np.append(ends[: -1 : self._window], ends[-1])

    def _compute_rows(self, epoch: int, window: int) -> np.ndarray:
        """Sample ids of one window in order."""
        groups, _ = self._epoch(epoch)
        chosen = groups[window * self._window : (window + 1) * self._window]
        rows = expand_ranges(self._starts[chosen], self._sizes[chosen])
        return rows[hashed_order(len(rows), self._seed, epoch, window)]


def expand_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of the ranges starts[i] … starts[i]+lengths[i]-1, int64."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def deal_step(
    lengths: np.ndarray,
    *,
    world_size: int,
    accumulation: int,
    token_budget: int | None,
    balance: bool,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Deal the samples of a step over ranks and micro batches.

    With `balance`, token counts are alike over all micro batches of all ranks: the longest sample
    of each round goes to the emptiest micro batch. Worlds of more than RANKS_PER_SPAN ranks are
    first cut into spans that take neighbouring samples, so that a rank reads the row groups of its
    span and not those of the whole window.

    Args:
        lengths: int64 [B], tokens of each sample, in ascending order of sample id.
        accumulation: least K.
        token_budget: most tokens of a micro batch; K grows until all fit.

    Returns:
        (rank [B], micro batch [B], K); K is the same on all ranks, and a micro batch may be empty.

    Raises:
        ValueError: one sample alone exceeds the budget.
    """
    longest = int(lengths.max(initial=0))
    if token_budget is not None and longest > token_budget:
        raise ValueError(
            f"tokens_per_micro_batch={token_budget} cannot hold a sequence of {longest} tokens; "
            "raise data.loader.tokens_per_micro_batch or lower data.loader.max_length"
        )
    spans = [(np.arange(len(lengths)), 0, world_size)]
    if balance and world_size > RANKS_PER_SPAN:
        spans = _spans(lengths, world_size)
    budget = token_budget if token_budget is not None else int(lengths.sum())
    needed = [
        -(-int(lengths[members].sum()) // (ranks * max(budget, 1))) for members, _, ranks in spans
    ]
    micro_batches = max(accumulation, *needed)
    while True:
        bins = np.empty(len(lengths), dtype=np.int64)
        for members, first_rank, ranks in spans:
            count = ranks * micro_batches
            dealt = _deal_evenly(lengths[members], count) if balance else members % count
            bins[members] = first_rank + dealt % ranks + (dealt // ranks) * world_size
        loads = np.bincount(bins, weights=lengths, minlength=world_size * micro_batches)
        if loads.max(initial=0) <= budget:
            return bins % world_size, bins // world_size, micro_batches
        micro_batches += 1


def _spans(lengths: np.ndarray, world_size: int) -> list[tuple[np.ndarray, int, int]]:
    """Cut the samples into stretches of equal tokens per rank: (members, first rank, ranks)."""
    count = -(-world_size // RANKS_PER_SPAN)
    bounds = np.arange(count + 1) * world_size // count
    cost = lengths + 1  # + 1: samples without tokens are spread, too
    middle = (np.cumsum(cost) - cost / 2) * world_size / max(cost.sum(), 1)
    span = np.searchsorted(bounds[1:-1], middle, side="right")
    return [
        (np.flatnonzero(span == s), int(bounds[s]), int(bounds[s + 1] - bounds[s]))
        for s in range(count)
    ]


def _deal_evenly(lengths: np.ndarray, num_bins: int) -> np.ndarray:
    """Bin of each sample, int64, such that loads are alike and counts differ by one at most.

    Longest first, in rounds of one sample a bin: within a round the longest goes to the bin with
    the least load. One small sort a round instead of a heap operation a sample.
    """
    bins = np.zeros(len(lengths), dtype=np.int64)
    if num_bins == 1:
        return bins
    by_length = np.argsort(-lengths, kind="stable")
    load = np.zeros(num_bins, dtype=np.int64)
    for start in range(0, len(lengths), num_bins):
        chosen = by_length[start : start + num_bins]
        emptiest = np.argsort(load, kind="stable")[: len(chosen)]
        bins[chosen] = emptiest
        load[emptiest] += lengths[chosen]
    return bins
