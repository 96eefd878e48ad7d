"""Sampled softmax against a loop over positions and negatives, in both implementations."""

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.ops.jagged import lengths_to_offsets
from models.ops.softmax_loss import runs_fused
from trainer.objectives.full_softmax import full_softmax
from trainer.objectives.sampled_softmax import (
    Sharing,
    negative_scores,
    sampled_softmax,
    sampled_softmax_by_products,
)

IMPLEMENTATIONS = [sampled_softmax, sampled_softmax_by_products]
sharings = st.sampled_from(["batch", "sequence", "position"])


def make(
    lengths: list[int], shared: Sharing, count: int, num_keys: int, width: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, offsets, positives (some −1) and negatives."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    queries = F.normalize(torch.randn(total, width, generator=generator), dim=-1)
    keys = F.normalize(torch.randn(num_keys, width, generator=generator), dim=-1)
    positives = torch.randint(-1, num_keys, (total,), generator=generator)
    groups = {"batch": (), "sequence": (len(lengths),), "position": (total,)}[shared]
    negatives = torch.randint(0, num_keys, (*groups, count), generator=generator)
    return queries, keys, lengths_to_offsets(torch.tensor(lengths)), positives, negatives


def by_loops(
    queries: Tensor,
    keys: Tensor,
    offsets: Tensor,
    positives: Tensor,
    negatives: Tensor,
    shared: Sharing,
    temperature: float,
    logq: Tensor | None,
) -> Tensor:
    """The formula, a number at a time, differentiable, float64."""
    losses = []
    for b in range(offsets.numel() - 1):
        for t in range(int(offsets[b]), int(offsets[b + 1])):
            positive = int(positives[t])
            if positive < 0:
                losses.append(queries.sum() * 0)
                continue
            group = {"batch": (), "sequence": (b,), "position": (t,)}[shared]
            own = (queries[t] @ keys[positive] / temperature).exp()
            total = own
            for r in range(negatives.shape[-1]):
                negative = int(negatives[(*group, r)])
                if negative == positive:
                    continue
                score = queries[t] @ keys[negative] / temperature
                if logq is not None:
                    score = score - logq.expand(negatives.shape)[(*group, r)]
                total = total + score.exp()
            losses.append(-(own / total).log())
    return torch.stack(losses) if losses else queries.sum(-1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    shared=sharings,
    count=st.integers(1, 7),
    corrected=st.sampled_from(["no", "scalar", "each"]),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=30)
def test_equals_loops_with_gradients(
    implementation: object,
    lengths: list[int],
    shared: Sharing,
    count: int,
    corrected: Literal["no", "scalar", "each"],
    seed: int,
) -> None:
    assert callable(implementation)
    queries, keys, offsets, positives, negatives = make(lengths, shared, count, 6, 5, seed)
    per_key = torch.randn(6, generator=torch.Generator().manual_seed(seed + 1))
    logq = {"no": None, "scalar": per_key[0], "each": per_key[negatives]}[corrected]
    weights = torch.rand(len(positives), generator=torch.Generator().manual_seed(seed + 2))

    fast = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    losses = implementation(*fast, offsets, positives, negatives, shared, 0.2, logq)
    exact = queries.double().requires_grad_(), keys.double().requires_grad_()
    expected = by_loops(*exact, offsets, positives, negatives, shared, 0.2, logq)
    torch.testing.assert_close(losses.double(), expected, atol=2e-5, rtol=1e-5)

    grads = torch.autograd.grad((losses * weights).sum(), fast, materialize_grads=True)
    golden = torch.autograd.grad((expected * weights).sum(), exact, materialize_grads=True)
    for got, wanted in zip(grads, golden, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=3e-5, rtol=1e-4)


@given(
    lengths=st.lists(st.integers(0, 300), min_size=0, max_size=5),
    shared=sharings,
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_scores_of_long_sequences_equal_a_gather(
    lengths: list[int], shared: Sharing, seed: int
) -> None:
    """Several blocks and chunks, empty sequences, empty batches."""
    queries, keys, offsets, _, negatives = make(lengths, shared, 6, 20, 4, seed)
    scores = negative_scores(queries, keys, offsets, negatives, shared)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).long())
    rows = {"batch": negatives, "sequence": negatives[owner], "position": negatives}[shared]
    expected = (queries[:, None] * keys[rows.expand(len(queries), 6)]).sum(-1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shared", ["batch", "sequence", "position"])
def test_the_product_path_never_holds_rows_of_every_position(shared: Sharing) -> None:
    """Nothing as large as [T, R, D] is kept for the backward pass."""
    queries, keys, offsets, positives, negatives = make([200] * 10, shared, 16, 50, 32, 0)
    sizes: list[int] = []

    def record(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        sampled_softmax_by_products(
            queries.requires_grad_(), keys, offsets, positives, negatives, shared, 0.1
        )
    assert max(sizes) <= 2 * 2000 * 32 < 2000 * 16 * 32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_positive_as_negative_gives_no_loss(implementation: object) -> None:
    assert callable(implementation)
    queries = torch.randn(3, 4, requires_grad=True)
    keys = torch.randn(5, 4, requires_grad=True)
    positives, negatives = torch.tensor([2, 2, 2]), torch.tensor([2, 2])
    offsets = torch.tensor([0, 3])
    losses = implementation(queries, keys, offsets, positives, negatives, "batch", 0.05)
    assert losses.tolist() == [0.0, 0.0, 0.0]
    losses.sum().backward()
    assert queries.grad is not None and not queries.grad.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_correction_makes_the_loss_that_of_the_full_softmax(implementation: object) -> None:
    """Every item drawn 20 times, expected 20 times: the sum is the catalogue's, exactly."""
    assert callable(implementation)
    queries, keys, offsets, _, _ = make([30], "batch", 1, 40, 8, 3)
    positives = torch.randint(0, 40, (30,))
    negatives = torch.arange(40).repeat(20)
    logq = torch.tensor(math.log(20))
    losses = implementation(queries, keys, offsets, positives, negatives, "batch", 0.2, logq)
    full = full_softmax(queries, keys, positives, 0.2, chunk_tokens=7)
    torch.testing.assert_close(losses, full, atol=1e-5, rtol=1e-5)


def test_this_machine_tests_both_paths() -> None:
    """The fused kernel is what the CPU runs; without a compiler the first path is untested."""
    assert runs_fused(torch.zeros(1, 8), torch.zeros(1, 8))
    assert not runs_fused(torch.zeros(1, 300), torch.zeros(1, 300))
