"""Fused softmax losses against plain PyTorch in double precision and against a loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.ops.softmax_loss import (
    full_softmax_loss,
    full_softmax_loss_reference,
    sampled_softmax_loss,
    sampled_softmax_loss_reference,
)


def assert_same(fast: Tensor, exact: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Values and gradients agree to rounding; ``exact`` was computed in double precision."""
    torch.testing.assert_close(fast.double(), exact, rtol=2e-5, atol=2e-5)
    upstream = torch.randn(fast.shape)
    actual = torch.autograd.grad(fast, leaves, upstream)
    expected = torch.autograd.grad(exact, leaves, upstream.double())
    for a, e in zip(actual, expected, strict=True):
        scale = e.abs().max().item() if e.numel() else 0.0
        # Where p is nearly 1, 1 - p is known to 6e-8 only: times 1 / τ and the upstream gradient.
        torch.testing.assert_close(a, e, rtol=0, atol=1e-5 * scale + 3e-6)


def test_sampled_loss_equals_the_formula() -> None:
    queries, keys = torch.randn(3, 4), torch.randn(5, 4)
    positives, negatives = torch.tensor([1, -1, 4]), torch.tensor([[0, 1, 3], [0, 1, 2], [2, 2, 4]])
    log_q = torch.randn(5)

    def score(t: int, row: int) -> float:
        return math.exp(float(queries[t] @ keys[row]) / 0.7)

    expected = []
    for t, positive in enumerate(positives.tolist()):
        drawn = [row for row in negatives[t].tolist() if row != positive]
        others = sum(score(t, row) / math.exp(float(log_q[row])) for row in drawn)
        own = score(t, positive)
        expected.append(0.0 if positive < 0 else -math.log(own / (own + others)))
    arguments = (queries, keys, positives, negatives, 0.7)
    for op in (sampled_softmax_loss, sampled_softmax_loss_reference):
        loss = op(*arguments, correction=log_q)
        torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@given(
    tokens=st.integers(0, 40),
    width=st.sampled_from([1, 16, 20, 50, 64, 65, 130, 256, 257]),
    num_keys=st.sampled_from([1, 3, 40]),
    count=st.sampled_from([0, 1, 17]),
    sharing=st.sampled_from(["none", "group", "batch"]),
    corrected=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=40)
def test_sampled_native_equals_reference(
    tokens: int, width: int, num_keys: int, count: int, sharing: str, corrected: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    queries = torch.randn(tokens, width, requires_grad=True)
    keys = (torch.randn(num_keys, width) / width**0.5).requires_grad_()
    positives = torch.randint(-1, num_keys, (tokens,))
    num_groups = {"none": tokens, "group": 3, "batch": 1}[sharing]
    groups = None if sharing == "none" else torch.randint(0, num_groups, (tokens,))
    negatives = torch.randint(0, num_keys, (num_groups, count))
    correction = torch.randn(num_keys) if corrected else None
    options = {"groups": groups, "correction": correction}
    fast = sampled_softmax_loss(queries, keys, positives, negatives, 0.2, **options)
    exact = sampled_softmax_loss_reference(
        queries.double(), keys.double(), positives, negatives, 0.2, **options
    )
    assert_same(fast, exact, (queries, keys))


@given(
    tokens=st.sampled_from([0, 1, 5, 23, 24, 25, 50]),
    width=st.sampled_from([1, 16, 50, 70]),
    num_keys=st.sampled_from([1, 2, 15, 16, 255, 256, 257, 530]),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=40)
def test_full_native_equals_reference(tokens: int, width: int, num_keys: int, seed: int) -> None:
    torch.manual_seed(seed)
    queries = torch.randn(tokens, width, requires_grad=True)
    keys = (torch.randn(num_keys, width) / width**0.5).requires_grad_()
    positives = torch.randint(-1, num_keys, (tokens,))
    fast = full_softmax_loss(queries, keys, positives, 0.2)
    exact = full_softmax_loss_reference(queries.double(), keys.double(), positives, 0.2)
    assert_same(fast, exact, (queries, keys))


def test_full_is_sampled_with_every_key_as_negative() -> None:
    queries, keys, positives = torch.randn(20, 8), torch.randn(30, 8), torch.randint(0, 30, (20,))
    everything = torch.arange(30)[None]
    groups = torch.zeros(20, dtype=torch.int64)
    sampled = sampled_softmax_loss(queries, keys, positives, everything, 0.5, groups=groups)
    torch.testing.assert_close(sampled, full_softmax_loss(queries, keys, positives, 0.5))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_large_logits_stay_finite(scale: float) -> None:
    queries, keys = scale * torch.randn(10, 8), torch.randn(300, 8)
    positives, negatives = torch.arange(10), torch.randint(10, 300, (10, 20))
    exact = (queries.double(), keys.double(), positives)
    torch.testing.assert_close(
        full_softmax_loss(queries, keys, positives, 0.05).double(),
        full_softmax_loss_reference(*exact, 0.05),
        rtol=1e-5,
        atol=1e-4,
    )
    torch.testing.assert_close(
        sampled_softmax_loss(queries, keys, positives, negatives, 0.05).double(),
        sampled_softmax_loss_reference(*exact, negatives, 0.05),
        rtol=1e-5,
        atol=1e-4,
    )


def test_nan_reaches_the_loss_and_only_its_token() -> None:
    queries, keys, positives = torch.randn(30, 8), torch.randn(300, 8), torch.arange(30)
    queries[7, 2] = torch.nan
    negatives = torch.randint(0, 300, (30, 9))
    for loss in (
        full_softmax_loss(queries, keys, positives, 0.1),
        sampled_softmax_loss(queries, keys, positives, negatives, 0.1),
    ):
        assert loss.isnan().nonzero().flatten().tolist() == [7]


def test_threads_agree() -> None:
    queries = torch.randn(100, 50, requires_grad=True)
    keys = torch.randn(70, 50, requires_grad=True)
    positives, negatives = torch.randint(0, 70, (100,)), torch.randint(0, 70, (100, 20))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            sampled = sampled_softmax_loss(queries, keys, positives, negatives, 0.3)
            full = full_softmax_loss(queries, keys, positives, 0.3)
            grads = [torch.autograd.grad(loss.sum(), (queries, keys)) for loss in (sampled, full)]
            results.append((sampled, *grads[0], full, *grads[1]))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*(result[:5] for result in results), strict=True):
        assert torch.equal(one, two)
    torch.testing.assert_close(results[0][5], results[1][5])  # keys: one share per thread
