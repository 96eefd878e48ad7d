"""The loader deals the same global batches to every world size and survives a change of it."""

import threading
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.data import LoaderConfig
from data_loaders.dataset import SequenceDataset
from data_loaders.loader import (
    LoaderState,
    StepBatches,
    TrainingLoader,
)
from data_loaders.synthetic import write_synthetic
from models.batch import JaggedBatch
from tests.data_loaders.conftest import LENGTH, USERS, known

Step = StepBatches[JaggedBatch]


def loader_of(
    dataset: SequenceDataset,
    rank: int,
    world_size: int,
    state: LoaderState | None = None,
    include_validation: bool = False,
    **options: object,
) -> TrainingLoader:
    config = LoaderConfig(**{"max_length": LENGTH, "shuffle_window": 3, "prefetch": 0} | options)
    return TrainingLoader(
        dataset,
        config,
        seed=11,
        rank=rank,
        world_size=world_size,
        include_validation=include_validation,
        state=state,
    )


def steps_of_world(
    dataset: SequenceDataset, world_size: int, count: int, **options: object
) -> list[list[Step]]:
    """[step][rank]."""
    ranks = [loader_of(dataset, rank, world_size, **options) for rank in range(world_size)]
    return [[next(loader) for loader in ranks] for _ in range(count)]


def samples(ranks: list[Step]) -> list[int]:
    return sorted(i for step in ranks for i in step.sample_ids.tolist())


def tokens(step: Step) -> list[int]:
    return [batch.num_tokens for batch in step.micro_batches]


def by_sample(ranks: list[Step]) -> dict[int, tuple]:
    """Sample id → everything that its batch says about it."""
    found: dict[int, tuple] = {}
    for batch in (batch for step in ranks for batch in step.micro_batches):
        per_token = [batch.item_ids, batch.timestamps, batch.next_timestamps, batch.target_ids]
        per_token += [
            batch.ratings,
            batch.action_ids,
            batch.labels,
            batch.durations,
            batch.side_features["genre"],
        ]
        for b, sample in enumerate(batch.sample_ids.tolist()):
            own = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
            row = [int(batch.user_ids[b]), int(batch.user_features["segment"][b])]
            dwelt = tuple(known(batch.dwell_times[own].tolist()))
            found[sample] = (*row, *(tuple(values[own].tolist()) for values in per_token), dwelt)
    return found


def reference(row: dict, include_validation: bool = False) -> tuple:
    """What `by_sample` must say of a user, from the definition."""
    end = row["validation_end" if include_validation else "train_end"]
    begin = max(end - 1 - LENGTH, 0)
    inputs, following = slice(begin, max(end - 1, 0)), slice(begin + 1, end)
    return (
        row["user_id"],
        row["user_segment"],
        tuple(row["item_ids"][inputs]),
        tuple(row["timestamps"][inputs]),
        tuple(row["timestamps"][following]),
        tuple(row["item_ids"][following]),
        tuple(row["ratings"][inputs]),
        tuple(row["action_ids"][inputs]),
        tuple(row["labels"][inputs]),
        tuple(row["durations"][inputs]),
        tuple(row["side_genre"][inputs]),
        tuple(known(row["dwell_times"][inputs])),  # of what is predicted nothing is told
    )


options_strategy = st.fixed_dictionaries(
    {
        "global_batch": st.integers(1, 24),
        "tokens_per_micro_batch": st.none() | st.integers(LENGTH, 50),
        "accumulation": st.integers(1, 3),
        "balance": st.booleans(),
        "shuffle_window": st.integers(1, 10),
    }
)


@given(options=options_strategy, stop=st.integers(0, 60), before=st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_no_sample_lost_or_repeated_on_any_world_size(
    dataset: SequenceDataset, options: dict, stop: int, before: int
) -> None:
    """An epoch on `before` ranks until step `stop`, then on 1, 2, 3 and 4 ranks."""
    per_epoch = loader_of(dataset, 0, 1, **options).steps_per_epoch
    stop %= per_epoch
    started = steps_of_world(dataset, before, stop, **options)
    state = LoaderState(0, stop)
    rest = {
        world: steps_of_world(dataset, world, per_epoch - stop, state=state, **options)
        for world in (1, 2, 3, 4)
    }
    assert all(
        [samples(step) for step in steps] == [samples(step) for step in rest[1]]
        for steps in rest.values()
    )
    epoch = [*map(samples, started), *map(samples, rest[1])]
    assert sorted(i for step in epoch for i in step) == list(range(USERS))
    assert all(len(step) == options["global_batch"] for step in epoch[:-1])


@given(options=options_strategy, world_size=st.sampled_from([1, 2, 3, 4]))
@settings(deadline=None, max_examples=25)
def test_ranks_agree_on_micro_batches_and_keep_the_budget(
    dataset: SequenceDataset, options: dict, world_size: int
) -> None:
    for ranks in steps_of_world(dataset, world_size, 4, **options):
        assert len({len(step.micro_batches) for step in ranks}) == 1
        assert len(ranks[0].micro_batches) >= options["accumulation"]
        assert {step.global_tokens for step in ranks} == {sum(map(sum, map(tokens, ranks)))}
        budget = options["tokens_per_micro_batch"]
        assert budget is None or max(map(max, map(tokens, ranks))) <= budget
        for step in ranks:
            dealt = torch.cat([batch.sample_ids for batch in step.micro_batches])
            assert dealt.tolist() == step.sample_ids.tolist()


@pytest.mark.parametrize("include_validation", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_sequences_are_inputs_and_shifted_targets(
    dataset: SequenceDataset, users: list[dict], include_validation: bool, world_size: int
) -> None:
    steps = steps_of_world(
        dataset,
        world_size,
        4,
        include_validation=include_validation,
        global_batch=20,
        tokens_per_micro_batch=30,
    )
    found = {k: v for ranks in steps for k, v in by_sample(ranks).items()}
    assert found == {i: reference(row, include_validation) for i, row in enumerate(users)}
    assert any(len(entry[2]) == 0 for entry in found.values()), "a user with one event is there"
    assert any(len(entry[2]) == LENGTH for entry in found.values()), "a truncated user is there"


def test_one_batch_of_eight_is_eight_batches_of_one(dataset: SequenceDataset) -> None:
    """The same samples with the same contents, whichever way a step is cut."""
    whole = steps_of_world(dataset, 1, 3, global_batch=8)
    cut = steps_of_world(dataset, 4, 3, global_batch=8, accumulation=2)
    assert [by_sample(ranks) for ranks in whole] == [by_sample(ranks) for ranks in cut]


def test_a_rank_without_data_gets_empty_batches(dataset: SequenceDataset) -> None:
    (ranks,) = steps_of_world(dataset, 4, 1, global_batch=2, accumulation=2)
    empty = [batch for step in ranks for batch in step.micro_batches if batch.num_sequences == 0]
    assert len(empty) == 6
    batch = empty[0]
    assert batch.offsets.tolist() == [0] and batch.num_tokens == 0
    for value in (batch.item_ids, batch.target_ids, batch.user_ids, batch.action_ids, batch.labels):
        assert value is not None and value.dtype == torch.int64 and value.shape == (0,)
    assert batch.ratings is not None and batch.ratings.dtype == torch.float32
    assert batch.user_features["segment"].shape == batch.side_features["genre"].shape == (0,)


def test_positions_counted_and_epochs_differ(dataset: SequenceDataset) -> None:
    loader = loader_of(dataset, 0, 1, global_batch=20)
    assert loader.steps_per_epoch == 4 and loader.state() == LoaderState(0, 0)
    steps = list(islice(loader, 8))
    assert [(s.epoch, s.epoch_step, s.step) for s in steps] == [
        (i // 4, i % 4, i) for i in range(8)
    ]
    assert [s.last_of_epoch for s in steps] == [i % 4 == 3 for i in range(8)]
    assert len(steps[3].sample_ids) == 1  # 61 = 3 · 20 + 1: kept, not dropped
    assert loader.state() == LoaderState(2, 0)
    assert set(steps[0].sample_ids) != set(steps[4].sample_ids)
    dropping = loader_of(dataset, 0, 1, global_batch=20, drop_last=True)
    assert dropping.steps_per_epoch == 3


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_changes_nothing_but_the_thread(dataset: SequenceDataset, depth: int) -> None:
    plain = loader_of(dataset, 1, 2, global_batch=10)
    with loader_of(dataset, 1, 2, global_batch=10, prefetch=depth) as ahead:
        for _ in range(9):
            ours, theirs = next(ahead), next(plain)
            assert by_sample([ours]) == by_sample([theirs]) and ours.step == theirs.step
            assert ahead.state() == plain.state()  # what the thread prepared does not count
        assert sum(thread.name == "loader" for thread in threading.enumerate()) == 1
        ahead.close()
        assert next(ahead).step == next(plain).step  # goes on where it was
    assert not any(thread.name == "loader" for thread in threading.enumerate())


def test_state_is_one_line_and_checked(dataset: SequenceDataset) -> None:
    state = LoaderState(3, 2)
    assert "\n" not in state.to_json() and LoaderState.from_json(state.to_json()) == state
    for text in ("{", "[1]", "3", '{"epoch": 1, "step": 2}', '{"epoch": -1, "epoch_step": 0}'):
        with pytest.raises(ValueError, match="is not a loader state"):
            LoaderState.from_json(text)
    with pytest.raises(ValueError, match="lies outside an epoch of 4 steps"):
        loader_of(dataset, 0, 1, LoaderState(0, 4), global_batch=20)


def test_a_cache_below_the_window_is_refused(directory: Path) -> None:
    small = SequenceDataset(str(directory), cached_row_groups=2)
    with pytest.raises(ValueError, match="cached_row_groups=2 is less than the 3 row groups"):
        loader_of(small, 0, 1)


@pytest.mark.parametrize("depth", [0, 2])
def test_errors_of_the_thread_reach_the_caller(tmp_path: Path, depth: int) -> None:
    write_synthetic(str(tmp_path), 20, 20, 6, 1, num_shards=1)
    file = tmp_path / "sequences" / "part-00000.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    broken = SequenceDataset(str(tmp_path), cached_row_groups=4)
    with loader_of(broken, 0, 1, global_batch=4, prefetch=depth) as loader:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"part-00000\.parquet is (missing or )?damaged"):
                next(loader)
        assert loader.state() == LoaderState(0, 0)
