"""The order is a permutation that ignores the world size; dealing loses nothing and is even."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loaders.sampler import (
    RANKS_PER_SPAN,
    ElasticOrder,
    deal_step,
    expand_ranges,
    hashed_order,
)

sizes_strategy = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda s: sum(s) > 0)


@given(
    sizes=sizes_strategy,
    global_batch=st.integers(1, 20),
    window=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 3),
)
@settings(deadline=None, max_examples=150)
def test_an_epoch_holds_each_sample_once(
    sizes: list[int], global_batch: int, window: int, seed: int, epoch: int
) -> None:
    order = ElasticOrder(sizes, global_batch=global_batch, window=window, seed=seed)
    steps = [order.samples_of_step(epoch, s) for s in range(order.steps_per_epoch)]
    assert sorted(np.concatenate(steps).tolist()) == list(range(sum(sizes)))
    assert all(len(step) == global_batch for step in steps[:-1])
    # Any step alone, from a fresh object, equals the same step of the sequence.
    fresh = ElasticOrder(sizes, global_batch=global_batch, window=window, seed=seed)
    pick = seed % order.steps_per_epoch
    assert fresh.samples_of_step(epoch, pick).tolist() == steps[pick].tolist()


@given(sizes=sizes_strategy, window=st.integers(1, 6), batches=st.tuples(*[st.integers(1, 9)] * 2))
@settings(deadline=None)
def test_the_global_batch_only_cuts_the_order(
    sizes: list[int], window: int, batches: tuple[int, int]
) -> None:
    epochs = []
    for batch in batches:
        order = ElasticOrder(sizes, global_batch=batch, window=window, seed=5)
        steps = [order.samples_of_step(1, s) for s in range(order.steps_per_epoch)]
        epochs.append(np.concatenate(steps).tolist())
    assert epochs[0] == epochs[1]


def test_windows_bound_what_a_step_reads() -> None:
    order = ElasticOrder([10] * 20, global_batch=10, window=4, seed=1)
    for window in range(5):
        rows = np.concatenate([order.samples_of_step(0, window * 4 + s) for s in range(4)])
        assert len(set((rows // 10).tolist())) == 4
        assert rows.tolist() != sorted(rows.tolist())


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = ElasticOrder([50, 50], global_batch=100, window=2, seed=seed)
        return list(order.samples_of_step(number, 0).tolist())

    assert epoch(0, 0) != epoch(0, 1) and epoch(0, 0) != epoch(1, 0)


def test_order_is_frozen() -> None:
    """A changed hash would silently reorder every resumed run."""
    order = ElasticOrder([3, 4, 2], global_batch=4, window=2, seed=7)
    steps = [order.samples_of_step(1, s).tolist() for s in range(3)]
    assert steps == [[6, 8, 4, 7], [3, 5, 1, 2], [0]]


def test_hashed_order_is_uniform_enough() -> None:
    places = np.zeros((5, 5))
    for seed in range(2000):
        places[np.arange(5), hashed_order(5, seed)] += 1
    assert abs(places / 2000 - 0.2).max() < 0.04


def test_drop_last_and_empty_epochs() -> None:
    order = ElasticOrder([7], global_batch=3, window=1, seed=0, drop_last=True)
    assert order.steps_per_epoch == 2
    with pytest.raises(IndexError):
        order.samples_of_step(0, 2)
    with pytest.raises(ValueError, match="lower the global batch"):
        ElasticOrder([2], global_batch=3, window=1, seed=0, drop_last=True)
    with pytest.raises(ValueError, match="no step"):
        ElasticOrder([0, 0], global_batch=3, window=1, seed=0)


@given(ranges=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=8))
def test_expand_ranges(ranges: list[tuple[int, int]]) -> None:
    starts = np.array([r[0] for r in ranges], dtype=np.int64)
    lengths = np.array([r[1] for r in ranges], dtype=np.int64)
    expected = [v for start, length in ranges for v in range(start, start + length)]
    assert expand_ranges(starts, lengths).tolist() == expected


@given(
    lengths=st.lists(st.integers(0, 20), max_size=60),
    world_size=st.sampled_from([1, 2, 3, 4, 9, 17]),
    accumulation=st.integers(1, 3),
    budget=st.none() | st.integers(20, 90),
    balance=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_dealing_loses_nothing_and_keeps_the_budget(
    lengths: list[int],
    world_size: int,
    accumulation: int,
    budget: int | None,
    balance: bool,
) -> None:
    tokens = np.array(lengths, dtype=np.int64)
    ranks, micro, count = deal_step(
        tokens,
        world_size=world_size,
        accumulation=accumulation,
        token_budget=budget,
        balance=balance,
    )
    assert len(ranks) == len(micro) == len(tokens) and count >= accumulation
    assert ((ranks >= 0) & (ranks < world_size) & (micro >= 0) & (micro < count)).all()
    loads = np.zeros((world_size, count), dtype=np.int64)
    np.add.at(loads, (ranks, micro), tokens)
    if budget is not None:
        assert loads.max(initial=0) <= budget
    if balance and world_size <= RANKS_PER_SPAN and len(tokens):
        # Rounds of one sample a bin: no two bins differ by more than one longest sample.
        assert loads.max() - loads.min() <= tokens.max()
        samples = np.zeros((world_size, count), dtype=np.int64)
        np.add.at(samples, (ranks, micro), 1)
        assert samples.max() - samples.min() <= 1


@pytest.mark.parametrize(("world_size", "bound"), [(2, 1.005), (4, 1.01), (8, 1.02), (24, 1.05)])
def test_ranks_get_alike_token_counts(world_size: int, bound: float) -> None:
    """Lengths as skewed as real ones: half of the users hit the longest length, many are short."""
    generator = np.random.RandomState(0)
    for _ in range(10):
        tokens = np.minimum(generator.lognormal(4.5, 1.0, 32 * world_size), 200).astype(np.int64)
        ranks, _, _ = deal_step(
            tokens,
            world_size=world_size,
            accumulation=1,
            token_budget=None,
            balance=True,
        )
        loads = np.bincount(ranks, weights=tokens, minlength=world_size)
        assert loads.max() / loads.mean() <= bound


def test_large_worlds_read_neighbouring_samples() -> None:
    """A rank of a world of 64 takes its samples from one eighth of the window."""
    generator = np.random.RandomState(1)
    tokens = generator.randint(1, 200, 4096)
    ranks, _, _ = deal_step(tokens, world_size=64, accumulation=1, token_budget=None, balance=True)
    spread = [np.ptp(np.flatnonzero(ranks == rank)) for rank in range(64)]
    assert max(spread) < 4096 / 8 * 1.2


def test_micro_batches_are_as_few_as_the_budget_allows() -> None:
    tokens = np.full(64, 100)
    _, _, count = deal_step(tokens, world_size=2, accumulation=1, token_budget=800, balance=True)
    assert count == 4


def test_a_sequence_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens_per_micro_batch=10 cannot hold"):
        deal_step(
            np.array([11]),
            world_size=1,
            accumulation=1,
            token_budget=10,
            balance=True,
        )
