"""Negatives: pure functions of (seed, step, sample, position), uniform, and rightly expected."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.objectives import FullSoftmaxConfig, SampledSoftmaxConfig
from models.batch import JaggedBatch
from tests.models.sequences import make_batch, take, tokens_of
from trainer.objectives.negatives import draw_negatives, seed_of_step

NUM_ITEMS = 37


def draw(config: SampledSoftmaxConfig, batch: JaggedBatch, seed: int = 0, step: int = 0) -> Tensor:
    ids = draw_negatives(config, batch, NUM_ITEMS, seed, step).negative_ids
    assert ids is not None
    return ids


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    step=st.integers(0, 10**6),
    data=st.data(),
)
@settings(deadline=None, max_examples=30)
def test_micro_batches_and_worlds_do_not_change_a_draw(
    lengths: list[int], step: int, data: st.DataObject
) -> None:
    batch = make_batch(lengths, NUM_ITEMS)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    part = take(batch, chosen)
    shared_by = {
        shared: SampledSoftmaxConfig(num_negatives=4, shared=shared)
        for shared in ("batch", "sequence", "position")
    }
    assert torch.equal(
        draw(shared_by["batch"], batch, 3, step), draw(shared_by["batch"], part, 3, step)
    )
    whole = draw(shared_by["sequence"], batch, 3, step)
    assert whole.shape == (len(lengths), 4)
    assert torch.equal(whole[chosen], draw(shared_by["sequence"], part, 3, step))
    whole = draw(shared_by["position"], batch, 3, step)
    assert whole.shape == (sum(lengths), 4)
    parts = [tokens_of(batch, whole, b) for b in chosen]
    assert torch.equal(torch.cat([whole[:0], *parts]), draw(shared_by["position"], part, 3, step))


@pytest.mark.parametrize("shared", ["batch", "sequence", "position"])
def test_seeds_steps_and_groups_draw_apart(shared: str) -> None:
    config = SampledSoftmaxConfig(num_negatives=64, shared=shared)
    batch = make_batch([3, 3], NUM_ITEMS)
    first = draw(config, batch)
    draws = [*first.view(-1, 64), *draw(config, batch, step=1).view(-1, 64)]
    draws += draw(config, batch, seed=1).view(-1, 64)
    for a, one in enumerate(draws):
        for other in draws[:a]:
            assert (one == other).float().mean() < 0.25  # 1 / 37 expected
    assert torch.equal(first, draw(config, batch))


@pytest.mark.parametrize("shared", ["batch", "sequence", "position"])
def test_every_item_is_drawn_alike(shared: str) -> None:
    """χ² of 60,000 draws; 36 degrees of freedom exceed 80 once in 30,000 times."""
    groups = {"batch": 1, "sequence": 60, "position": 600}[shared]
    config = SampledSoftmaxConfig(num_negatives=60_000 // groups, shared=shared)
    ids = draw(config, make_batch([10] * 60, NUM_ITEMS), seed=5)
    counts = torch.bincount(ids.flatten(), minlength=NUM_ITEMS + 1)
    assert counts[0] == 0 and counts.numel() == NUM_ITEMS + 1
    expected = 60_000 / NUM_ITEMS
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 80


def test_positives_of_the_global_batch_join_the_pool() -> None:
    batch, pool = make_batch([4, 2], NUM_ITEMS), torch.tensor([5, 5, 9])
    uniform = SampledSoftmaxConfig(num_negatives=8, shared="batch")
    mixed = uniform.model_copy(update={"negatives": "mixed"})
    inputs = draw_negatives(mixed, batch, NUM_ITEMS, 1, 2, global_positives=pool)
    assert inputs.negative_ids is not None and inputs.negative_logq is None
    assert torch.equal(inputs.negative_ids[:8], draw(uniform, batch, 1, 2))
    assert torch.equal(inputs.negative_ids[8:], pool)
    only = uniform.model_copy(update={"negatives": "in_batch"})
    inputs = draw_negatives(only, batch, NUM_ITEMS, 1, 2, global_positives=pool)
    assert inputs.negative_ids is not None and torch.equal(inputs.negative_ids, pool)


@pytest.mark.parametrize("shared, groups", [("sequence", 2), ("position", 6)])
def test_a_mixture_draws_its_uniform_part_for_whom_it_is_asked(shared: str, groups: int) -> None:
    batch, pool = make_batch([4, 2], NUM_ITEMS), torch.tensor([5, 5, 9])
    uniform = SampledSoftmaxConfig(num_negatives=8, shared=shared)
    mixed = uniform.model_copy(update={"negatives": "mixed"})
    inputs = draw_negatives(mixed, batch, NUM_ITEMS, 1, 2, global_positives=pool)
    assert inputs.negative_ids is not None
    assert torch.equal(inputs.negative_ids[:, :8], draw(uniform, batch, 1, 2))
    assert torch.equal(inputs.negative_ids[:, 8:], pool.expand(groups, -1))


def test_positives_alone_are_shared_by_the_whole_batch() -> None:
    with pytest.raises(ValueError, match=r"objective\.shared=batch"):
        SampledSoftmaxConfig(negatives="in_batch", shared="position")


def test_log_expected_counts() -> None:
    """Uniform: R/V of each item. In batch: M times its frequency. Mixed: the sum."""
    batch, pool = make_batch([4, 2], 3), torch.tensor([1, 1, 3])
    counts = torch.tensor([0, 6, 3, 1])
    config = SampledSoftmaxConfig(num_negatives=2, shared="batch", logq_correction=True)
    logq = draw_negatives(config, batch, 3, 0, 0).negative_logq
    assert logq is not None and logq.item() == pytest.approx(math.log(2 / 3))
    for negatives, uniform in (("in_batch", 0.0), ("mixed", 2 / 3)):
        kind = config.model_copy(update={"negatives": negatives})
        inputs = draw_negatives(kind, batch, 3, 0, 0, pool, counts)
        assert inputs.negative_ids is not None and inputs.negative_logq is not None
        expected = [uniform + 3 * int(counts[i]) / 10 for i in inputs.negative_ids]
        torch.testing.assert_close(inputs.negative_logq, torch.tensor(expected).log())
        with pytest.raises(ValueError, match="logq_correction"):
            draw_negatives(kind, batch, 3, 0, 0, pool)


@pytest.mark.parametrize("negatives", ["uniform", "in_batch", "mixed"])
def test_corrected_sums_estimate_the_catalogue_without_bias(negatives: str) -> None:
    """Mean over 400 steps of Σ_r exp(s_r) / E[count_r] is Σ_e exp(s_e) over all items."""
    config = SampledSoftmaxConfig(num_negatives=32, shared="batch", logq_correction=True)
    config = config.model_copy(update={"negatives": negatives})
    generator = torch.Generator().manual_seed(0)
    masses = torch.rand(NUM_ITEMS + 1, generator=generator) + 0.1
    counts = torch.randint(1, 50, (NUM_ITEMS + 1,), generator=generator)
    counts[0] = 0
    batch, sums = make_batch([1], NUM_ITEMS), []
    for step in range(400):
        pool = torch.multinomial(counts.float(), 32, replacement=True, generator=generator)
        inputs = draw_negatives(config, batch, NUM_ITEMS, 0, step, pool, counts)
        assert inputs.negative_ids is not None and inputs.negative_logq is not None
        sums.append((masses[inputs.negative_ids] / inputs.negative_logq.exp()).sum())
    estimates = torch.stack(sums)
    error = (estimates.mean() - masses[1:].sum()).abs()
    assert error < 4 * estimates.std() / 400**0.5
    assert error / masses[1:].sum() < 0.05


def test_full_softmax_draws_nothing() -> None:
    inputs = draw_negatives(FullSoftmaxConfig(), make_batch([4], NUM_ITEMS), NUM_ITEMS, 0, 7)
    assert inputs.negative_ids is None and inputs.negative_logq is None
    assert inputs.step_seed == seed_of_step(0, 7)


def test_step_seeds_differ() -> None:
    seeds = {seed_of_step(seed, step) for seed in range(30) for step in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
