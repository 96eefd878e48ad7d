"""Prompts: where they are cut, what came next, and what a rule said of it."""

import numpy as np
import torch

from configs.data import LoaderConfig
from configs.preferences import RatingRule
from data_loaders.dataset import SequenceDataset
from data_loaders.pairs import validation_users
from data_loaders.prompts import PromptLoader, PromptSequences
from data_loaders.synthetic import write_synthetic
from models.batch import JaggedBatch
from trainer.prompts import cut_prompts, request_keys


def sequences(lengths: list[int], first_sample: int = 0) -> PromptSequences:
    """User u reads items 100 u + 1, 2, …; the outcome of an event is its item."""
    items = [100 * u + 1 + torch.arange(n + 1) for u, n in enumerate(lengths, first_sample)]
    tokens = torch.cat([row[:-1] for row in items])
    targets = torch.cat([row[1:] for row in items])
    users = torch.arange(len(lengths)) + first_sample
    batch = JaggedBatch(
        sample_ids=users,
        user_ids=users + 1,
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        item_ids=tokens,
        timestamps=tokens,
        next_timestamps=targets,
        target_ids=targets,
    )
    return PromptSequences(batch, targets.float())


def test_last_position_and_what_follows() -> None:
    found = cut_prompts(sequences([3, 0, 5]), "last", 4, seed=0, epoch=0)
    assert found.batch.lengths.tolist() == [3, 4]  # the empty user gives none, the latest 4 events
    assert found.batch.item_ids.tolist() == [1, 2, 3, 202, 203, 204, 205]
    assert found.batch.target_ids.tolist() == [2, 3, 4, 203, 204, 205, 206]
    assert found.target_ids.tolist() == [4, 206]
    assert found.outcomes is not None and found.outcomes.tolist() == [4, 206]


def test_random_positions_depend_on_epoch_and_user_alone() -> None:
    lengths = [7] * 40
    together = cut_prompts(sequences(lengths), "random", 9, seed=3, epoch=1)
    ends = together.target_ids
    assert together.outcomes is not None and torch.equal(together.outcomes, ends.float())
    half = cut_prompts(sequences(lengths[:20], 20), "random", 9, seed=3, epoch=1)
    assert torch.equal(half.target_ids, ends[20:])
    later = cut_prompts(sequences(lengths), "random", 9, seed=3, epoch=2).target_ids
    assert (later != ends).float().mean() > 0.5
    cuts = ends - 100 * torch.arange(40) - 1
    assert set(cuts.tolist()) == set(range(1, 8))  # every event but the first may be a target


def test_keys_name_user_cut_and_step() -> None:
    one = cut_prompts(sequences([5, 5, 5]), "random", 9, seed=3, epoch=0).batch
    keys = request_keys(one, 3, 7)
    assert keys.unique().numel() == 3
    alone = cut_prompts(sequences([5], 2), "random", 9, seed=3, epoch=0).batch
    assert torch.equal(request_keys(alone, 3, 7), keys[2:])
    assert (request_keys(one, 3, 8) != keys).all() and (request_keys(one, 4, 7) != keys).all()


def test_outcomes_are_those_of_the_next_event(tmp_path) -> None:  # type: ignore[no-untyped-def]
    url = str(tmp_path / "data")
    write_synthetic(url, 30, 12, 9, 3, rows_per_group=8)
    dataset = SequenceDataset(url, 8)
    rule = RatingRule(liked_from=4, disliked_to=2)
    config = LoaderConfig(global_batch=99, max_length=4, prefetch=0, cached_row_groups=8)
    with PromptLoader(
        dataset, config, rule, prompts_per_step=10, seed=1, rank=0, world_size=1
    ) as loader:
        assert loader.steps_per_epoch == 3
        told = []
        for _ in range(3):
            step = next(loader)
            [found] = step.micro_batches
            batch, outcomes = found.batch, found.outcomes
            assert outcomes is not None and outcomes.numel() == batch.num_tokens
            told.append(outcomes)
            for at, sample in enumerate(batch.sample_ids.tolist()):
                ids = np.array([sample])
                end = dataset.lengths(ids).train_end
                ratings = dataset.reader.slices(ids, end * 0, end).events["ratings"]
                mine = outcomes[batch.offsets[at] : batch.offsets[at + 1]].numpy()
                following = ratings[len(ratings) - len(mine) :]
                expected = (following >= 4).astype(np.float32) - (following <= 2)
                assert mine.tolist() == expected.tolist()
        assert {-1.0, 1.0} <= set(torch.cat(told).tolist())


def test_users_who_are_held_out_teach_nothing(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The users whose pairs measure the policy: events of theirs are neither prompts nor losses."""
    url = str(tmp_path / "data")
    write_synthetic(url, 30, 12, 9, 3, rows_per_group=8)
    config = LoaderConfig(global_batch=99, max_length=4, prefetch=0, cached_row_groups=8)
    held = validation_users(np.arange(1, 31), 5, 0.3)
    assert 3 < held.sum() < 20
    shared = {"prompts_per_step": 10, "seed": 5, "rank": 0, "world_size": 1}
    with PromptLoader(
        SequenceDataset(url, 8), config, RatingRule(), held_out=0.3, **shared
    ) as loader:
        batches = [found.batch for _ in range(3) for found in next(loader).micro_batches]
    lengths = {
        int(sample): int(length)
        for batch in batches
        for sample, length in zip(batch.sample_ids, batch.lengths, strict=True)
    }
    assert set(lengths) == set(range(30))
    assert {sample for sample in lengths if held[sample] and lengths[sample]} == set()
    assert sum(lengths[sample] > 0 for sample in lengths) > 10
