"""Full softmax against loops; the chunked path against the unchunked, and its memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.objectives.full_softmax import (
    full_softmax,
    full_softmax_by_chunks,
    log_partition,
)


def test_equals_loops() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(9, 5), torch.randn(13, 5)
    positives = torch.tensor([0, 12, -1, 3, 3, -1, 7, 1, 2])
    expected = []
    for query, positive in zip(queries.tolist(), positives.tolist(), strict=True):
        scores = [
            math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / 0.7)
            for key in keys.tolist()
        ]
        expected.append(-math.log(scores[positive] / sum(scores)) if positive >= 0 else 0.0)
    for implementation in (full_softmax, full_softmax_by_chunks):
        losses = implementation(queries, keys, positives, 0.7, chunk_tokens=4)
        torch.testing.assert_close(losses, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@given(
    tokens=st.integers(0, 30),
    catalogue=st.integers(1, 60),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_chunked_equals_unchunked_with_gradients(
    tokens: int, catalogue: int, chunk: int, seed: int
) -> None:
    torch.manual_seed(seed)
    queries = torch.randn(tokens, 6, requires_grad=True)
    keys = torch.randn(catalogue, 6, requires_grad=True)
    positives, weights = torch.randint(-1, catalogue, (tokens,)), torch.rand(tokens)
    grads = []
    for losses in (
        full_softmax(queries, keys, positives, 0.3, chunk),
        full_softmax_by_chunks(queries, keys, positives, 0.3, chunk),
        full_softmax_by_chunks(queries, keys, positives, 0.3, tokens + 1),
    ):
        gradients = torch.autograd.grad((losses * weights).sum(), (queries, keys))
        grads.append((losses.detach(), *gradients))
    for other in grads[1:]:
        for got, wanted in zip(other, grads[0], strict=True):
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


def test_memory_kept_for_the_backward_pass_has_no_logits() -> None:
    tokens, catalogue, chunk = 512, 1000, 32
    queries = torch.randn(tokens, 8, requires_grad=True)
    keys = torch.randn(catalogue, 8, requires_grad=True)
    positives = torch.randint(0, catalogue, (tokens,))
    sizes: list[int] = []

    def record(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    for implementation in (full_softmax, full_softmax_by_chunks):
        with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
            implementation(queries, keys, positives, 0.1, chunk)
    assert sizes and max(sizes) <= max(keys.numel(), queries.numel()) < tokens * catalogue


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_log_partition(chunk: int) -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(10, 4, requires_grad=True), torch.randn(7, 4)
    expected = [math.log(sum(math.exp(float(q @ k) / 0.5) for k in keys)) for q in queries.detach()]
    log_z = log_partition(queries, keys, 0.5, chunk)
    torch.testing.assert_close(log_z, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert not log_z.requires_grad
