"""Steps of jagged batches for training.

The sequence of global batches is fixed by (seed, epoch, step, global batch); ranks only share it
out. A position in it is two integers, so a run may stop in the middle of an epoch on one number of
ranks and go on with another.

Shape legend: B sequences, T tokens.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Generic, Self, TypeVar

import numpy as np

from configs.data import LoaderConfig
from data_loaders.collate import jagged_batch, split_last
from data_loaders.dataset import SequenceDataset, ShardReader
from data_loaders.poison import NOT_THE_SAMPLES, Unit, find_poisoned
from data_loaders.prefetch import Prefetcher
from data_loaders.sampler import ElasticOrder, deal_step
from models.batch import JaggedBatch

BatchT = TypeVar("BatchT")
NOBODY = np.zeros(0, dtype=np.int64)
"""Sample ids of none."""


@dataclass(frozen=True)
class LoaderState:
    """A position in the endless sequence of steps: the next step to hand out."""

    epoch: int = 0
    epoch_step: int = 0

    def to_dict(self) -> dict[str, int]:
        """The fields, for the checkpoint's JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`.

        Raises:
            ValueError: `text` is not a loader state.
        """
        try:
            state = cls(**json.loads(text))
        except (json.JSONDecodeError, TypeError):
            state = cls(-1, -1)
        if not all(type(v) is int and v >= 0 for v in (state.epoch, state.epoch_step)):
            raise ValueError(f"{text!r} is not a loader state; resume from another checkpoint")
        return state


@dataclass(frozen=True)
class StepBatches(Generic[BatchT]):
    """One rank's share of one optimizer step."""

    epoch: int
    epoch_step: int
    step: int
    """epoch · steps_per_epoch + epoch_step."""
    micro_batches: tuple[BatchT, ...]
    """As many on every rank; some may be empty."""
    sample_ids: np.ndarray
    """int64, all samples of this rank in this step, micro batch after micro batch."""
    global_tokens: int
    """Tokens of the step over all ranks."""
    last_of_epoch: bool


class StepLoader(ABC, Generic[BatchT]):
    """Endless iterator of this rank's steps, prepared ahead by a thread.

    A subclass says how many tokens samples have and what a batch of them is. Errors of the thread
    are raised by the iterator. After an error or `close`, iteration starts at `state()` again.

    Args:
        reader: what the samples are read from.
        row_group_sizes: those of the reader's first row groups that are trained on.
    """

    def __init__(
        self,
        reader: ShardReader,
        row_group_sizes: np.ndarray,
        config: LoaderConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        state: LoaderState | None,
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of world size {world_size}"
        window = min(config.shuffle_window, len(row_group_sizes))
        if reader.cached_row_groups < window:
            raise ValueError(
                f"data.loader.cached_row_groups={reader.cached_row_groups} is less than the "
                f"{window} row groups of a shuffle window, so that each would be read anew at "
                "every step; raise it or lower data.loader.shuffle_window"
            )
        self._order = ElasticOrder(
            row_group_sizes,
            global_batch=config.global_batch,
            window=config.shuffle_window,
            seed=seed,
            drop_last=config.drop_last,
        )
        self._config, self._rank, self._world_size = config, rank, world_size
        self._state = state if state is not None else LoaderState()
        if self._state.epoch_step >= self.steps_per_epoch:
            raise ValueError(
                f"loader state {self._state.to_json()} lies outside an epoch of "
                f"{self.steps_per_epoch} steps: the data or the global batch changed since it was "
                "saved; restore them or start a new run"
            )
        self.unit: Unit = reader.unit
        """What a sample is."""
        self._left_out = NOBODY
        self._steps: Prefetcher[StepBatches[BatchT]] | None = None

    def leave_out(self, sample_ids: np.ndarray) -> None:
        """Hand out steps without these samples, int64, a few; before the first step is taken."""
        assert self._steps is None, "steps were prepared already"
        self._left_out = sample_ids

    @abstractmethod
    def _tokens(self, sample_ids: np.ndarray) -> np.ndarray:
        """int64 [B] tokens of samples."""

    @abstractmethod
    def _batch(self, sample_ids: np.ndarray) -> BatchT:
        """The batch of samples, maybe none."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, the same for every world size."""
        return self._order.steps_per_epoch

    def state(self) -> LoaderState:
        """Position after the step handed out last; steps prepared ahead do not count."""
        return self._state

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepBatches[BatchT]:
        if self._steps is None:
            self._steps = Prefetcher(self._steps_from(self._state), self._config.prefetch)
        try:
            step = next(self._steps)
        except BaseException:
            self.close()  # the iterator has ended; a further call starts a new one at state()
            raise
        self._state = self._following(LoaderState(step.epoch, step.epoch_step))
        return step

    def close(self) -> None:
        """Stop the thread and drop what it prepared."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _following(self, state: LoaderState) -> LoaderState:
        if state.epoch_step + 1 < self.steps_per_epoch:
            return replace(state, epoch_step=state.epoch_step + 1)
        return LoaderState(state.epoch + 1, 0)

    def _steps_from(self, state: LoaderState) -> Iterator[StepBatches[BatchT]]:
        while True:
            yield self._step(state)
            state = self._following(state)

    def _step(self, state: LoaderState) -> StepBatches[BatchT]:
        # Ascending ids read each row group once; within a step the order has no meaning.
        samples = np.sort(self._order.samples_of_step(state.epoch, state.epoch_step))
        samples = without(samples, self._left_out)
        tokens = self._tokens(samples)
        ranks, micro, count = deal_step(
            tokens,
            world_size=self._world_size,
            accumulation=self._config.accumulation,
            token_budget=self._config.tokens_per_micro_batch,
            balance=self._config.balance,
        )
        mine = [samples[(ranks == self._rank) & (micro == k)] for k in range(count)]
        return StepBatches(
            epoch=state.epoch,
            epoch_step=state.epoch_step,
            step=state.epoch * self.steps_per_epoch + state.epoch_step,
            micro_batches=tuple(self._collated(ids) for ids in mine),
            sample_ids=np.concatenate(mine),
            global_tokens=int(tokens.sum()),
            last_of_epoch=state.epoch_step + 1 == self.steps_per_epoch,
        )

    def _collated(self, sample_ids: np.ndarray) -> BatchT:
        """The batch of samples, or an error that names the one that cannot be in it."""
        try:
            return self._batch(sample_ids)
        except NOT_THE_SAMPLES:
            raise
        except Exception as error:
            found = find_poisoned(self._batch, sample_ids, error, self.unit)
            raise (found or error) from error


class PrefixLoader(StepLoader[JaggedBatch]):
    """Steps over the training prefixes of all users; subclasses say what of them is a batch.

    Prefixes end at train_end, or at validation_end with `include_validation`.

    Raises:
        ValueError: the configuration, the state and the data set do not fit together.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        config: LoaderConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        include_validation: bool,
        state: LoaderState | None = None,
    ) -> None:
        super().__init__(
            dataset.reader,
            dataset.reader.row_group_sizes,
            config,
            seed=seed,
            rank=rank,
            world_size=world_size,
            state=state,
        )
        self._dataset, self._include_validation = dataset, include_validation

    def _ends(self, sample_ids: np.ndarray) -> np.ndarray:
        lengths = self._dataset.lengths(sample_ids)
        return lengths.validation_end if self._include_validation else lengths.train_end


class TrainingLoader(PrefixLoader):
    """Steps of next-item prediction.

    A user's prefix e_1 … e_n gives the inputs e_1 … e_{n-1} with targets e_2 … e_n, of which the
    last `max_length` are kept. A user with less than two training events is an empty sequence.
    """

    def _tokens(self, sample_ids: np.ndarray) -> np.ndarray:
        return np.clip(self._ends(sample_ids) - 1, 0, self._config.max_length)

    def _batch(self, sample_ids: np.ndarray) -> JaggedBatch:
        ends = self._ends(sample_ids)
        begin = np.maximum(ends - 1 - self._config.max_length, 0)
        begin = np.where(ends < 2, ends, begin)  # nothing to predict, so no event is read
        return jagged_batch(*split_last(self._dataset.reader.slices(sample_ids, begin, ends)))


def without(sample_ids: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Samples in their order, those of `left_out`, a few, passed over; all are int64."""
    return sample_ids[~np.isin(sample_ids, left_out)] if len(left_out) else sample_ids


def rank_share(
    sample_ids: np.ndarray, per_batch: int, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """This rank's contiguous part of the samples in batches, as many batches on every rank."""
    total = len(sample_ids)
    mine = sample_ids[total * rank // world_size : total * (rank + 1) // world_size]
    largest = -(-total // world_size)
    for start in range(0, largest, per_batch):
        yield mine[start : start + per_batch]
