"""Which events of the log were liked and which disliked, under a recipe's rule.

Formula of the watch-time rule: algorithms reference §6, GBPO (OneRec-V2, arXiv 2508.20900).

Shape legend: n users, T events.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from configs.preferences import LabelRule, PreferenceRule, RatingRule, WatchTimeRule
from data_loaders.dataset import Slices
from data_loaders.manifest import DatasetManifest

OUTCOMES = ("liked", "disliked", "neither")


@dataclass(frozen=True)
class Outcomes:
    """What the rule says of each event; no event is both."""

    liked: np.ndarray
    """bool [T]."""
    disliked: np.ndarray
    """bool [T]."""

    @property
    def rewards(self) -> np.ndarray:
        """float32 [T]: 1 where liked, −1 where disliked, else 0."""
        return self.liked.astype(np.float32) - self.disliked.astype(np.float32)

    def counts(self) -> dict[str, int]:
        """How many events are what, by `OUTCOMES`."""
        liked, disliked = int(self.liked.sum()), int(self.disliked.sum())
        return dict(
            zip(OUTCOMES, (liked, disliked, len(self.liked) - liked - disliked), strict=True)
        )


def check_rule(
    rule: PreferenceRule, data: DatasetManifest, url: str, place: str = "alignment.rule"
) -> None:
    """Raise ValueError where the data set in `url` lacks what the rule at the key `place` reads."""
    match rule:
        case RatingRule():
            if not data.has_ratings:
                raise ValueError(
                    f"{url} has no ratings, so liked and disliked items are unknown; map "
                    f"data.source.columns.rating, choose another {place}.kind, or set alignment to "
                    "null"
                )
            return
        case LabelRule():
            named = {"liked": rule.liked, "disliked": rule.disliked}
        case WatchTimeRule():
            named = {"negative": rule.negative}
            missing = {"dwell": data.has_dwell_times, "duration": data.has_durations}
            for column, present in missing.items():
                if not present:
                    raise ValueError(
                        f"{url} has no {column} times, which {place}.kind='watch_time' "
                        f"compares; map data.source.columns.{column} or choose another rule"
                    )
        case _:
            assert_never(rule)
    for key, names in named.items():
        unknown = [name for name in names if name not in data.labels]
        if unknown:
            raise ValueError(
                f"{place}.{key} names {unknown}, but the events of {url} carry the labels "
                f"{list(data.labels)}; map them in data.source.columns.labels"
            )


def columns_of(rule: PreferenceRule) -> list[str]:
    """Columns of events that the rule reads."""
    match rule:
        case RatingRule():
            return ["ratings"]
        case LabelRule():
            return ["labels"]
        case WatchTimeRule():
            return ["dwell_times", "durations", *(["labels"] if rule.negative else [])]
        case _:
            assert_never(rule)


def outcomes(slices: Slices, rule: PreferenceRule, labels: Sequence[str]) -> Outcomes:
    """Liked and disliked events of whole prefixes.

    Args:
        slices: events of n users with `columns_of` the rule; percentiles are over these.
        rule: of a recipe; `check_rule` has passed.
        labels: names of the bits of the column `labels`.
    """
    match rule:
        case RatingRule():
            ratings = slices.events["ratings"]
            return Outcomes(ratings >= rule.liked_from, ratings <= rule.disliked_to)
        case LabelRule():
            return _by_labels(slices.events["labels"], rule, labels)
        case WatchTimeRule():
            return _by_watch_time(slices, rule, labels)
        case _:
            assert_never(rule)


def bits_of(names: Sequence[str], labels: Sequence[str]) -> np.int64:
    """Mask of the named labels among those of a data set."""
    return np.int64(sum(1 << labels.index(name) for name in set(names)))


def _by_labels(masks: np.ndarray, rule: LabelRule, labels: Sequence[str]) -> Outcomes:
    negative = bits_of(rule.disliked, labels)
    disliked = (masks & negative) != 0
    if rule.skip_is_disliked:
        disliked |= (masks & ~negative) == 0
    return Outcomes(((masks & bits_of(rule.liked, labels)) != 0) & ~disliked, disliked)


def _by_watch_time(slices: Slices, rule: WatchTimeRule, labels: Sequence[str]) -> Outcomes:
    dwell, duration = slices.events["dwell_times"], slices.events["durations"]
    known = np.flatnonzero(np.isfinite(dwell) & np.isfinite(duration) & (duration > 0))
    user = np.repeat(np.arange(len(slices.lengths)), slices.lengths)
    more, less, size = _ranks_in_buckets(
        user[known], duration_buckets(duration[known], rule), dwell[known]
    )
    smallest = min(rule.liked_share, rule.disliked_share or rule.liked_share)
    # Without short views that are disliked, too, a tie from the longest to the shortest is no like.
    lowest = rule.disliked_share or min(rule.liked_share, 1 - rule.liked_share)
    # Quotients are rounded once, as the shares were: equal ones are equal. Products miss the edge.
    enough = 1 / size <= smallest
    top, bottom = more / size < rule.liked_share, less / size < lowest
    liked, disliked = np.zeros((2, len(dwell)), bool)
    liked[known] = enough & top & ~bottom
    disliked[known] = enough & bottom & ~top & (rule.disliked_share > 0)
    if rule.negative:
        hated = (slices.events["labels"] & bits_of(rule.negative, labels)) != 0
        liked, disliked = liked & ~hated, disliked | hated
    return Outcomes(liked, disliked)


def duration_buckets(duration: np.ndarray, rule: WatchTimeRule) -> np.ndarray:
    """int64 ⌊log_b(duration + ε)⌋ of positive seconds."""
    seconds = duration.astype(np.float64) + rule.duration_epsilon
    buckets = np.floor(np.log(seconds) / np.log(rule.duration_base))
    # A quotient of logarithms may miss a whole number by its rounding.
    buckets += np.power(rule.duration_base, buckets + 1) <= seconds
    buckets -= np.power(rule.duration_base, buckets) > seconds
    return buckets.astype(np.int64)


def _ranks_in_buckets(
    user: np.ndarray, bucket: np.ndarray, dwell: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Events of the same user and bucket with strictly more dwell, with less, and all: int64."""
    order = np.lexsort((dwell, bucket, user))
    new_group = _starts(user[order]) | _starts(bucket[order])
    first, last = _bounds(new_group)
    tie_first, tie_last = _bounds(new_group | _starts(dwell[order]))
    more, less, size = np.empty((3, len(order)), np.int64)
    more[order], less[order] = last - tie_last, tie_first - first
    size[order] = last - first
    return more, less, size


def _starts(values: np.ndarray) -> np.ndarray:
    """bool: the value differs from the one before it; the first does."""
    return np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])


def _bounds(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the group of each entry begins and ends, given where groups start."""
    begins = np.flatnonzero(starts)
    ends = np.append(begins[1:], len(starts))[: len(begins)]
    group = np.cumsum(starts) - 1
    return begins[group], ends[group]
