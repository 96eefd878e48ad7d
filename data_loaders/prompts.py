"""Training sequences to cut prompts from, with what a rule says of each event that follows.

Shape legend: B users, T tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.data import LoaderConfig
from configs.preferences import PreferenceRule
from data_loaders.collate import jagged_batch, split_last
from data_loaders.dataset import SequenceDataset
from data_loaders.loader import LoaderState, StepLoader
from data_loaders.pairs import validation_users
from data_loaders.preference_rules import columns_of, outcomes
from data_loaders.sampler import expand_ranges
from models.batch import JaggedBatch


@dataclass(frozen=True)
class PromptSequences:
    """Training sequences of a micro batch."""

    batch: JaggedBatch
    """As `TrainingLoader` gives them; empty ones are among them."""
    outcomes: Tensor | None
    """[T] float32: 1 where the event that follows the token was liked, -1 where disliked, else 0;
    None without a rule."""


class PromptLoader(StepLoader[PromptSequences]):
    """Steps over the training prefixes of all users, as those of `TrainingLoader`.

    Percentiles of a rule are over a user's whole training prefix, not over what is cut off it.
    Users who are held out are empty sequences.

    Raises:
        ValueError: the configuration, the state and the data set do not fit together.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        config: LoaderConfig,
        rule: PreferenceRule | None,
        *,
        prompts_per_step: int,
        seed: int,
        rank: int,
        world_size: int,
        held_out: float = 0.0,
        state: LoaderState | None = None,
    ) -> None:
        """`rule`: `check_rule` has passed; `held_out`: share of `validation_users`."""
        super().__init__(
            dataset.reader,
            dataset.reader.row_group_sizes,
            config.model_copy(update={"global_batch": prompts_per_step}),
            seed=seed,
            rank=rank,
            world_size=world_size,
            state=state,
        )
        self._dataset, self._rule = dataset, rule
        self._seed, self._held_out = seed, held_out

    def _ends(self, sample_ids: np.ndarray) -> np.ndarray:
        return prompt_ends(self._dataset, sample_ids, self._seed, self._held_out)

    def _tokens(self, sample_ids: np.ndarray) -> np.ndarray:
        return np.clip(self._ends(sample_ids) - 1, 0, self._config.max_length)

    def _batch(self, sample_ids: np.ndarray) -> PromptSequences:
        ends, tokens = self._ends(sample_ids), self._tokens(sample_ids)
        begin = np.where(ends < 2, ends, ends - 1 - tokens)  # nothing to predict: nothing is read
        slices = self._dataset.reader.slices(sample_ids, begin, ends)
        batch = jagged_batch(*split_last(slices))
        if self._rule is None:
            return PromptSequences(batch, None)
        judged = following_outcomes(self._dataset, self._rule, sample_ids, ends, tokens)
        return PromptSequences(batch, torch.from_numpy(judged))


def prompt_ends(
    dataset: SequenceDataset, sample_ids: np.ndarray, seed: int, held_out: float
) -> np.ndarray:
    """Where the events that alignment learns from end, int64 [B]; 0 of users who are held out."""
    ends = dataset.lengths(sample_ids).train_end
    return np.where(validation_users(sample_ids + 1, seed, held_out), 0, ends)


def following_outcomes(
    dataset: SequenceDataset,
    rule: PreferenceRule,
    sample_ids: np.ndarray,
    ends: np.ndarray,
    tokens: np.ndarray,
) -> np.ndarray:
    """What the rule says of the last `tokens` [B] of each user's first `ends` [B] events.

    float32 [T]: 1 liked, -1 disliked, 0 neither. Percentiles are over all of the first events.
    """
    columns = columns_of(rule)
    whole = dataset.reader.slices(sample_ids, np.zeros_like(ends), ends, columns)
    judged = outcomes(whole, rule, dataset.manifest.labels).rewards
    return judged[expand_ranges(whole.offsets[1:] - tokens, tokens)]
