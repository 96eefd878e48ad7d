"""Preference pairs in batches, with the reference policy's log-probabilities of both items.

Shape legend: B pairs of a batch, P pairs of the data set, K losers of a pair.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import NonNegativeInt

from configs import storage
from configs.data import LoaderConfig
from data_loaders.collate import Following, jagged_batch
from data_loaders.dataset import ShardReader, column_types
from data_loaders.loader import NOBODY, LoaderState, StepLoader, rank_share, without
from data_loaders.manifest import GroupedEntry, Sealed, read_sealed, seal, write_manifest
from data_loaders.pairs import MEND, read_pairs, rejected_columns
from data_loaders.shards import write_table
from models.batch import PreferenceBatch

REFERENCE_ROWS_PER_GROUP = 1 << 14
_REFERENCE_MEND = "delete that directory and run `tandem align RECIPE` to compute it anew"
_SCALARS = ("user_id", "length", "request_timestamp", "chosen_id")


class PairDataset:
    """Random access to the pairs in directory `url`; pair id = row position, training pairs first.

    Raises:
        ValueError: there is no valid manifest; later, on reading, a shard is missing or damaged.
    """

    def __init__(self, url: str, cached_row_groups: int, reference_url: str | None = None) -> None:
        self.manifest = read_pairs(url)
        self._rejected = rejected_columns(self.manifest.rule.rejected_per_chosen)
        self.num_training_pairs = self.manifest.num_pairs - self.manifest.num_validation_pairs
        self.reader = ShardReader(
            url,
            self.manifest.shards,
            [shard.row_group_rows for shard in self.manifest.shards],
            scalars=column_types([*_SCALARS, *self._rejected, *self.manifest.user_columns]),
            events=column_types(self.manifest.event_columns),
            cached_row_groups=cached_row_groups,
            mend=MEND,
            unit="pair",
        )
        self._reference = (
            None
            if reference_url is None
            else _reference_reader(reference_url, self.manifest.num_pairs, self._rejected)
        )

    @property
    def training_row_groups(self) -> np.ndarray:
        """int64, rows of the row groups of training pairs (the first ones)."""
        groups = sum(len(s.row_group_rows) for s in self.manifest.shards if s.part == "train")
        return self.reader.row_group_sizes[:groups]

    def lengths(self, pair_ids: np.ndarray) -> np.ndarray:
        """Events of each pair's context, int64 [B]."""
        return self.reader.values(pair_ids, ("length",))["length"]

    def batch(self, pair_ids: np.ndarray) -> PreferenceBatch:
        """The batch of pairs, maybe none; reference log-probabilities are 0 without a reference."""
        lengths = self.lengths(pair_ids)
        slices = self.reader.slices(pair_ids, np.zeros_like(lengths), lengths)
        rows = slices.rows
        following = Following(rows["chosen_id"], rows["request_timestamp"])
        names = ("chosen", *self._rejected)
        reference = {name: np.zeros(len(pair_ids), np.float32) for name in names}
        if self._reference is not None:
            reference = self._reference.values(pair_ids, tuple(reference), verify=True)
        return PreferenceBatch(
            batch=jagged_batch(slices, following),
            pair_ids=torch.from_numpy(pair_ids),
            chosen_ids=torch.from_numpy(rows["chosen_id"]),
            rejected_ids=self._side_by_side(rows),
            reference_chosen=torch.from_numpy(reference["chosen"]),
            reference_rejected=self._side_by_side(reference),
        )

    def _side_by_side(self, columns: Mapping[str, np.ndarray]) -> torch.Tensor:
        """The columns of the losers as [B, K]."""
        return torch.from_numpy(np.stack([columns[name] for name in self._rejected], axis=1))


class PreferenceLoader(StepLoader[PreferenceBatch]):
    """Steps over the training pairs; order, dealing, budget and state are TrainingLoader's.

    Args:
        url: directory of the pairs.
        pairs_per_step: pairs of a step over all ranks; replaces the loader's `global_batch`.
        loader: everything else (its `max_length` was applied when the pairs were written).
        reference_url: directory of the reference log-probabilities; without it they are 0.

    Raises:
        ValueError: configuration, state, pairs and reference do not fit together.
    """

    def __init__(
        self,
        url: str,
        *,
        pairs_per_step: int,
        loader: LoaderConfig,
        seed: int,
        rank: int,
        world_size: int,
        reference_url: str | None = None,
        state: LoaderState | None = None,
    ) -> None:
        self._pairs = PairDataset(url, loader.cached_row_groups, reference_url)
        super().__init__(
            self._pairs.reader,
            self._pairs.training_row_groups,
            loader.model_copy(update={"global_batch": pairs_per_step}),
            seed=seed,
            rank=rank,
            world_size=world_size,
            state=state,
        )

    def _tokens(self, sample_ids: np.ndarray) -> np.ndarray:
        return self._pairs.lengths(sample_ids)

    def _batch(self, sample_ids: np.ndarray) -> PreferenceBatch:
        return self._pairs.batch(sample_ids)


def preference_batches(
    url: str,
    part: Literal["train", "validation", "all"],
    *,
    pairs_per_batch: int,
    rank: int,
    world_size: int,
    most: int | None = None,
    left_out: np.ndarray = NOBODY,
) -> Iterator[PreferenceBatch]:
    """All pairs of a part once (its first `most`), in order of pair id; this rank's contiguous
    share of them. Those of `left_out`, int64, are passed over.

    Every rank yields as many batches (the last ones may be empty) and at least one if there is a
    pair.
    """
    pairs = PairDataset(url, cached_row_groups=2)
    begin = pairs.num_training_pairs if part == "validation" else 0
    end = pairs.num_training_pairs if part == "train" else pairs.manifest.num_pairs
    end = end if most is None else min(end, begin + most)
    asked = without(np.arange(begin, end), left_out)
    for ids in rank_share(asked, pairs_per_batch, rank, world_size):
        yield pairs.batch(ids)


# -- reference log-probabilities --------------------------------------------------------------


class ReferencePart(GroupedEntry):
    """Log-probabilities of consecutive pairs."""


class ReferenceManifest(Sealed):
    """Log-probabilities of all pairs under one policy."""

    format: Literal[1] = 1
    policy_hash: str
    num_pairs: NonNegativeInt
    parts: tuple[ReferencePart, ...]
    """Pair ids run over the parts in this order."""


def write_reference(
    url: str, rank: int, pair_ids: np.ndarray, chosen: np.ndarray, rejected: np.ndarray
) -> None:
    """Write one rank's part: log-probabilities, float32, of consecutive pair ids, int64 [n].

    `chosen` is [n], `rejected` [n, K].
    """
    assert (np.diff(pair_ids) == 1).all(), "a rank's pairs are consecutive"
    table = pa.table(
        {
            "pair_id": pa.array(pair_ids.astype(np.int64)),
            "chosen": pa.array(chosen.astype(np.float32)),
        }
        | {
            name: pa.array(values.astype(np.float32))
            for name, values in zip(rejected_columns(rejected.shape[1]), rejected.T, strict=True)
        }
    )
    write_table(url, _reference_path(rank), table, rows_per_group=REFERENCE_ROWS_PER_GROUP)


def commit_reference(url: str, world_size: int, policy_hash: str) -> ReferenceManifest:
    """Seal the parts of all ranks; call it on one rank, after all have written.

    Args:
        policy_hash: hash of the weights whose log-probabilities they are.
    """
    parts, expected = [], 0
    for rank in range(world_size):
        part, first = _reference_part(url, _reference_path(rank))
        assert first in (None, expected), f"pairs before {first} have no reference"
        parts.append(part)
        expected += part.rows
    manifest = seal(
        ReferenceManifest, policy_hash=policy_hash, num_pairs=expected, parts=tuple(parts)
    )
    write_manifest(url, manifest)
    return manifest


def read_reference(url: str) -> ReferenceManifest:
    """The manifest of the reference log-probabilities in directory `url`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    absent = "so no reference was computed there; run `tandem align RECIPE`"
    return read_sealed(url, ReferenceManifest, absent=absent, mend=_REFERENCE_MEND)


def _reference_path(rank: int) -> str:
    return f"part-{rank:05d}.parquet"


def _reference_part(url: str, path: str) -> tuple[ReferencePart, int | None]:
    """A part's entry, and its first pair id (None if it is empty)."""
    place = storage.join(url, path)
    with storage.open_to_read(place) as stream:
        file = pq.ParquetFile(stream)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        rows = tuple(group.num_rows for group in groups if group.num_rows)
        first = groups[0].column(0).statistics.min if rows else None
    part = ReferencePart(
        path=path,
        rows=sum(rows),
        bytes=storage.size(place),
        sha256=storage.sha256_file(place),
        row_group_rows=rows,
    )
    return part, first


def _reference_reader(url: str, num_pairs: int, rejected: tuple[str, ...]) -> ShardReader:
    manifest = read_reference(url)
    if manifest.num_pairs != num_pairs:
        raise ValueError(
            f"{url} holds the reference of {manifest.num_pairs} pairs, but there are {num_pairs}; "
            f"{_REFERENCE_MEND}"
        )
    return ShardReader(
        url,
        manifest.parts,
        [part.row_group_rows for part in manifest.parts],
        scalars=dict.fromkeys(("chosen", *rejected), np.float32),
        events={},
        cached_row_groups=8,  # scalars are kept for 16 times as many
        mend=_REFERENCE_MEND,
    )
