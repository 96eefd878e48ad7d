"""Preference pairs read off the log: in one context a user liked one item and disliked another.

A *pair* is a winner and its losers, mostly one (`rule.rejected_per_chosen`). Only training events
are looked at, so neither a validation nor a test event is ever in a pair or
its context. Pairs are rows of their own: context, request time, winner and loser; a pair's id is
its position 0 … P-1 in the manifest's order of shards, training pairs first.

Shape legend: n users, T events, C candidate pairs, P pairs, K losers of a pair.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import NonNegativeInt, PositiveInt

from configs import storage
from configs.preferences import PreferenceRule
from configs.terminal import say
from data_loaders.dataset import SequenceDataset, Slices, event_columns
from data_loaders.exchange import Progress, map_parts, quiet
from data_loaders.manifest import (
    MANIFEST,
    DatasetManifest,
    GroupedEntry,
    Sealed,
    read_manifest,
    read_sealed,
    seal,
    write_manifest,
)
from data_loaders.preference_rules import OUTCOMES, check_rule, outcomes
from data_loaders.sampler import expand_ranges, hash_values
from models.ops.hashing import mix64

Part = Literal["train", "validation"]
PARTS: tuple[Part, ...] = ("train", "validation")
PAIRS_PER_GROUP = 512
_PURPOSES = {"train": ("train on", "lower"), "validation": ("measure with", "raise")}
"""What a part's pairs are for, and what gives more of them."""
MEND = "delete that directory and run `tandem align RECIPE` to write the pairs anew"


class PairShard(GroupedEntry):
    """A shard of pairs of one part."""

    part: Part


class PairManifest(Sealed):
    """The pairs of a data set under one rule."""

    format: Literal[1] = 1
    data: str
    """Fingerprint of the data set."""
    rule: PreferenceRule
    seed: NonNegativeInt
    max_length: PositiveInt
    validation_share: float
    num_pairs: PositiveInt
    """All pairs, of both parts."""
    num_validation_pairs: NonNegativeInt
    outcomes: dict[str, NonNegativeInt]
    """What the rule says of the training events: `liked`, `disliked`, `neither`."""
    num_users: PositiveInt
    """Users with a pair."""
    num_candidates: PositiveInt
    """A winner and one loser that the rule allows, before `pairs_per_user`."""
    user_columns: tuple[str, ...]
    event_columns: tuple[str, ...]
    shards: tuple[PairShard, ...]
    """Training shards first."""


@dataclass(frozen=True)
class Pairs:
    """Pairs among the events of n users: indices into their slices, int64."""

    user: np.ndarray
    """[P], 0 … n-1."""
    earlier: np.ndarray
    """[P], the first of a pair's events; the context ends before it."""
    chosen: np.ndarray
    """[P]"""
    rejected: np.ndarray
    """[P, K]; -1 behind a pair's last loser."""
    candidates: int
    """C."""
    outcomes: dict[str, int]
    """Events by what the rule says of them."""


def read_pairs(url: str) -> PairManifest:
    """The manifest of the pairs in directory `url`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    absent = "so no pairs were written there; run `tandem align RECIPE`"
    return read_sealed(url, PairManifest, absent=absent, mend=MEND)


def select_pairs(
    slices: Slices, rule: PreferenceRule, seed: int, labels: Sequence[str] = ()
) -> Pairs:
    """Pairs among whole training prefixes; at most `rule.pairs_per_user` of a user's candidates.

    Which of them is decided by a hash of (seed, user, positions), so it depends neither on how
    users are sharded nor on the order of the work. Loops over the lags of the window, not events.
    `labels` names the bits of the events' labels, where they have any.
    """
    lengths = slices.lengths
    user = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(user)) - np.repeat(slices.offsets[:-1], lengths)
    items, said = slices.events["item_ids"], outcomes(slices, rule, labels)
    liked, disliked = said.liked, said.disliked
    found: list[np.ndarray] = []
    for lag in range(1, min(rule.window, len(user))):
        a, b = slice(None, -lag), slice(lag, None)
        opposed = (liked[a] & disliked[b]) | (disliked[a] & liked[b])
        allowed = opposed & (user[a] == user[b]) & (items[a] != items[b])
        found.append(np.flatnonzero(allowed & (position[a] >= rule.min_context)))
    lags = np.repeat(np.arange(1, len(found) + 1), np.array([len(f) for f in found], np.int64))
    earlier = np.concatenate([np.empty(0, np.int64), *found])

    keys = hash_values(slices.rows["user_id"], seed)[user[earlier]] + position[earlier]
    keys = mix64(mix64(torch.from_numpy(keys)) + torch.from_numpy(lags)).numpy()
    later = earlier + lags
    chosen = np.where(liked[earlier], earlier, later)
    rejected = np.where(liked[earlier], later, earlier)
    if rule.rejected_per_chosen > 1:  # an item twice in a list would count as two negatives
        distinct = _distinct([chosen, items[rejected]], keys)
        chosen, rejected, keys = chosen[distinct], rejected[distinct], keys[distinct]
    first, losers = _lists(chosen, rejected, keys, rule.rejected_per_chosen)
    winners, keys = chosen[first], keys[first]
    begin = np.minimum(winners, np.where(losers < 0, winners[:, None], losers).min(axis=1))
    lost = np.sort(np.where(losers < 0, 0, items[losers]), axis=1)
    # The same choice in the same context, as when an item is liked twice, is one pair.
    distinct = _distinct([begin, items[winners], *lost.T], keys)
    order = distinct[np.lexsort((keys[distinct], user[winners[distinct]]))]
    kept = order[_place_in_group(user[winners[order]]) < rule.pairs_per_user]
    return Pairs(
        user=user[winners[kept]],
        earlier=begin[kept],
        chosen=winners[kept],
        rejected=losers[kept],
        candidates=len(earlier),
        outcomes=said.counts(),
    )


def _distinct(columns: Sequence[np.ndarray], keys: np.ndarray) -> np.ndarray:
    """Indices of rows [C] that differ in some column, of alike ones that of least key."""
    order = np.lexsort((keys, *columns))
    first = np.ones(len(order), bool)
    first[1:] = np.any([column[order][1:] != column[order][:-1] for column in columns], axis=0)
    return order[first]


def _lists(
    chosen: np.ndarray, rejected: np.ndarray, keys: np.ndarray, losers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Deal the candidates [C] of each winner into lists of at most K losers, by their keys.

    Returns:
        the candidate that opens each list [P], whose key stands for the list, and the lists'
        losers [P, K], -1 where there are no more.
    """
    order = np.lexsort((keys, chosen))
    place = _place_in_group(chosen[order]) % losers
    opens = place == 0
    lists = np.cumsum(opens) - 1
    members = np.full((int(opens.sum()), losers), -1, np.int64)
    members[lists, place] = rejected[order]
    return order[opens], members


def _place_in_group(groups: np.ndarray) -> np.ndarray:
    """Place of each entry among those of its group; equal `groups` lie together."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1) != 0)
    sizes = np.diff(np.append(starts, len(groups)))
    return np.arange(len(groups)) - np.repeat(starts, sizes)


def pair_table(slices: Slices, pairs: Pairs, max_length: int) -> pa.Table:
    """Self-contained rows of the pairs, with the last `max_length` events before each."""
    length = np.minimum(pairs.earlier - slices.offsets[pairs.user], max_length)
    context = expand_ranges(pairs.earlier - length, length)
    offsets = pa.array(np.concatenate([[0], np.cumsum(length)]).astype(np.int32))
    items = slices.events["item_ids"]
    columns: dict[str, pa.Array] = {
        "user_id": pa.array(slices.rows["user_id"][pairs.user]),
        "length": pa.array(length.astype(np.int32)),
        "request_timestamp": pa.array(slices.events["timestamps"][pairs.earlier]),
        "chosen_id": pa.array(items[pairs.chosen]),
    }
    for name, losers in zip(
        rejected_columns(pairs.rejected.shape[1]), pairs.rejected.T, strict=True
    ):
        columns[name] = pa.array(np.where(losers < 0, 0, items[losers]))
    for name, values in slices.events.items():
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values[context]))
    for name in slices.rows:
        if name.startswith("user_") and name != "user_id":
            columns[name] = pa.array(slices.rows[name][pairs.user])
    return pa.table(columns)


def rejected_columns(losers: int) -> tuple[str, ...]:
    """Columns of a pair's K losers; item 0 behind the last one."""
    return tuple(f"rejected_{place}" for place in range(1, losers + 1))


def validation_users(user_ids: np.ndarray, seed: int, share: float) -> np.ndarray:
    """bool [n]: whose pairs measure preference accuracy, and whom alignment learns nothing from."""
    # The extra key keeps this choice independent of the one among a user's candidates.
    uniform = (hash_values(user_ids, seed, 1).view(np.uint64) >> np.uint64(11)) / 2.0**53
    return uniform < share


def build_pairs(
    dataset_url: str,
    rule: PreferenceRule,
    output_url: str,
    *,
    max_length: int,
    seed: int,
    validation_share: float,
    trains: bool,
) -> PairManifest:
    """Write the preference pairs of a prepared data set, a Ray Data task a shard.

    Args:
        dataset_url: the prepared data set; all nodes must see it, and `output_url`.
        output_url: directory of the pairs; what it held is replaced.
        max_length: most events of a context.
        validation_share: share of users whose pairs are held out.
        trains: whether the others are trained on; if not, there may be none.

    Returns:
        The manifest, which has been written last.

    Raises:
        ValueError: the data set lacks what the rule reads, or there is no pair to train on or none
            to measure with.
    """
    data = read_manifest(dataset_url)
    check_rule(rule, data, dataset_url)
    storage.remove(storage.join(output_url, MANIFEST))
    settings: dict[str, Any] = {
        "rule": rule,
        "max_length": max_length,
        "seed": seed,
        "validation_share": validation_share,
    }
    task = functools.partial(
        _write_shard, dataset_url=dataset_url, output_url=output_url, **settings
    )
    with quiet():
        progress = Progress(say)
        reports = map_parts("read preference pairs", progress, len(data.shards), task)
    manifest = _summary(data, reports, settings, PARTS if trains else ("validation",))
    write_manifest(output_url, manifest)
    return manifest


def _summary(
    data: DatasetManifest,
    reports: list[dict[str, Any]],
    settings: dict[str, Any],
    needed: Sequence[Part],
) -> PairManifest:
    """The manifest of what was written. ValueError where a needed part is empty."""
    keys = ("users", "candidates", *PARTS, *OUTCOMES)
    totals = {key: sum(r[key] for r in reports) for key in keys}
    for part in needed:
        if totals[part] == 0:
            purpose, mend = _PURPOSES[part]
            raise ValueError(
                f"alignment.rule finds no pair to {purpose}: of {totals['liked']} liked and "
                f"{totals['disliked']} disliked events {totals['candidates']} pairs are within "
                f"{settings['rule'].window} events, {totals['train']} were kept for training and "
                f"{totals['validation']} for validation; loosen the rule or {mend} "
                f"alignment.validation_share={settings['validation_share']}"
            )
    shards = [PairShard(**entry) for report in reports for entry in report["shards"]]
    return seal(
        PairManifest,
        data=data.fingerprint,
        **settings,
        num_pairs=totals["train"] + totals["validation"],
        num_validation_pairs=totals["validation"],
        outcomes={key: totals[key] for key in OUTCOMES},
        num_users=totals["users"],
        num_candidates=totals["candidates"],
        user_columns=tuple(f"user_{name}" for name in data.user_features),
        event_columns=tuple(event_columns(data)),
        shards=tuple(sorted(shards, key=lambda shard: (PARTS.index(shard.part), shard.path))),
    )


def _write_shard(
    index: int,
    *,
    dataset_url: str,
    output_url: str,
    rule: PreferenceRule,
    max_length: int,
    seed: int,
    validation_share: float,
) -> dict[str, Any]:
    """Pairs of the users of one shard of sequences; what was written, for the manifest."""
    dataset = SequenceDataset(dataset_url, cached_row_groups=1)
    writers = {part: _PartWriter(f"{part}/part-{index:05d}.parquet", part) for part in PARTS}
    totals = dict.fromkeys(("users", "candidates", *OUTCOMES), 0)
    for ids in dataset.row_groups(index):
        ends = dataset.lengths(ids).train_end
        slices = dataset.reader.slices(ids, np.zeros_like(ends), ends)
        pairs = select_pairs(slices, rule, seed, dataset.manifest.labels)
        table = pair_table(slices, pairs, max_length)
        held_out = validation_users(slices.rows["user_id"], seed, validation_share)[pairs.user]
        writers["train"].write(table.filter(pa.array(~held_out)))
        writers["validation"].write(table.filter(pa.array(held_out)))
        found = {"users": len(np.unique(pairs.user)), "candidates": pairs.candidates}
        for key, count in (found | pairs.outcomes).items():
            totals[key] += count
    counts = {part: writer.rows for part, writer in writers.items()}
    shards = [writer.commit(output_url) for writer in writers.values() if writer.rows]
    return {
        "rows": sum(counts.values()),
        **totals,
        "shards": [entry.model_dump(mode="json") for entry in shards],
        "train": counts["train"],
        "validation": counts["validation"],
    }


class _PartWriter:
    """One file of pairs, compressed in memory as they come, which appears whole or not at all."""

    def __init__(self, path: str, part: Part) -> None:
        self._path, self._part = path, part
        self._sink = pa.BufferOutputStream()
        self._writer: pq.ParquetWriter | None = None
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        if not table.num_rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._sink, table.schema, compression="zstd", write_page_checksum=True
            )
        self._writer.write_table(table, row_group_size=PAIRS_PER_GROUP)
        self.rows += table.num_rows

    def commit(self, root: str) -> PairShard:
        assert self._writer is not None, "an empty part has no file"
        self._writer.close()
        data = self._sink.getvalue().to_pybytes()
        storage.make_directory(storage.join(root, self._part))
        storage.write_bytes(storage.join(root, self._path), data)
        metadata = pq.read_metadata(pa.BufferReader(data))
        groups = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        return PairShard(
            path=self._path,
            rows=self.rows,
            bytes=len(data),
            sha256=storage.sha256_bytes(data),
            part=self._part,
            row_group_rows=tuple(groups),
        )
