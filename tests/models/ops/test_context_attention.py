"""Attention over jagged contexts: kernel and padded rows against one request at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.ops import native
from models.ops.context_attention import context_attention, context_attention_reference
from models.ops.jagged import lengths_to_offsets


def inputs(
    lengths: list[int], groups: int, queries: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + groups + queries + width)
    shapes = [(len(lengths), groups, queries, width), *[(sum(lengths), groups, width)] * 2]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    offsets = lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), offsets


def one_by_one(q: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> Tensor:
    """Each request, and each of its groups, alone."""
    rows = []
    pieces = zip(q, keys.split(lengths), values.split(lengths), strict=True)
    for query, k, v in pieces:
        logits = query @ k.permute(1, 2, 0) / math.sqrt(q.shape[-1])  # [G, Q, n]
        rows.append(logits.softmax(-1) @ v.transpose(0, 1))
    return torch.stack(rows) if rows else q


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if not native.native_available():
        pytest.skip("no C++ compiler")


@given(
    st.lists(st.integers(0, 50), max_size=5),
    st.integers(1, 3),
    st.integers(1, 60),
    st.integers(1, 40),
)
@settings(deadline=None, max_examples=40)
def test_kernel_and_padded_rows_equal_single_requests_forward_and_backward(
    lengths: list[int], groups: int, queries: int, width: int
) -> None:
    q, k, v, offsets = inputs(lengths, groups, queries, width)
    expected = one_by_one(q, k, v, lengths)
    upstream = torch.randn(expected.shape)
    wanted = [q, k, v]
    fast = context_attention(q, k, v, offsets)
    padded = context_attention_reference(q, k, v, offsets, max([1, *lengths]))
    grads = torch.autograd.grad(expected, wanted, upstream, materialize_grads=True)
    for actual in (fast, padded):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
        found = torch.autograd.grad(actual, wanted, upstream, materialize_grads=True)
        if lengths:
            torch.testing.assert_close(found, grads, atol=1e-4, rtol=1e-4)


def test_an_empty_context_reads_as_zero_and_sends_nothing_back() -> None:
    q, k, v, offsets = inputs([0, 3], 2, 4, 5)
    out = context_attention(q, k, v, offsets)
    assert not out[0].any() and out[1].all()
    [d_q] = torch.autograd.grad(out.sum(), [q])
    assert not d_q[0].any()


def test_a_request_does_not_see_its_batch_and_threads_change_nothing() -> None:
    q, k, v, offsets = inputs([30, 7, 50], 2, 70, 8)
    whole = context_attention(q, k, v, offsets)
    alone = context_attention(q[1:2], k[30:37], v[30:37], torch.tensor([0, 7]))
    assert torch.equal(whole[1:2], alone)
    threads, upstream = torch.get_num_threads(), torch.randn(whole.shape)
    grads = torch.autograd.grad(whole, [q, k, v], upstream)
    torch.set_num_threads(3)
    try:
        again = context_attention(q, k, v, offsets)
        others = torch.autograd.grad(again, [q, k, v], upstream)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_bfloat16_is_rounded_once() -> None:
    q, k, v, offsets = inputs([9, 4], 2, 5, 8, torch.bfloat16)
    out = context_attention(q, k, v, offsets)
    exact = context_attention(q.float(), k.float(), v.float(), offsets)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())
