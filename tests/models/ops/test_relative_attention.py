"""Attention with a bias by distance: kernel against reference, reference against loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.ops import native
from models.ops.jagged import lengths_to_offsets
from models.ops.relative_attention import relative_attention, relative_attention_reference


def inputs(
    lengths: list[int], heads: int, width: int, slack: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(sum(lengths) + heads + width)
    longest = max([1, *lengths]) + slack
    qkv = torch.randn(sum(lengths), 3, heads, width, generator=generator).to(dtype)
    bias = torch.randn(heads, 2 * longest - 1, generator=generator).to(dtype)
    offsets = lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64))
    return qkv.requires_grad_(), bias.requires_grad_(), offsets, longest


@given(
    st.lists(st.integers(0, 60), max_size=5),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=40)
def test_kernel_equals_the_reference_forward_and_backward(
    lengths: list[int], heads: int, width: int, slack: int
) -> None:
    if not native.native_available():
        pytest.skip("no C++ compiler")
    qkv, bias, offsets, longest = inputs(lengths, heads, width, slack)
    fast = relative_attention(qkv, bias, offsets, longest)
    plain = relative_attention_reference(qkv, bias, offsets, longest)
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=2e-5)
    upstream = torch.randn(fast.shape)
    grads = torch.autograd.grad(fast, [qkv, bias], upstream)
    expected = torch.autograd.grad(plain, [qkv, bias], upstream)
    torch.testing.assert_close(grads, expected, atol=1e-4, rtol=1e-4)


def test_reference_equals_loops() -> None:
    qkv, bias, offsets, longest = inputs([3, 0, 5, 1], 2, 3, dtype=torch.float64)
    actual = relative_attention_reference(qkv, bias, offsets, longest)
    starts = offsets.tolist()
    for b in range(4):
        for i in range(starts[b], starts[b + 1]):
            for head in range(2):
                weights = [
                    math.exp(
                        float(qkv[i, 0, head].detach() @ qkv[j, 1, head].detach()) / math.sqrt(3)
                        + float(bias[head, j - i + longest - 1].detach())
                    )
                    for j in range(starts[b], starts[b + 1])
                ]
                mixed = sum(w * qkv[starts[b] + at, 2, head] for at, w in enumerate(weights))
                torch.testing.assert_close(actual[i, head], mixed / sum(weights))


def test_a_sequence_does_not_see_its_batch_and_threads_change_nothing() -> None:
    qkv, bias, offsets, longest = inputs([30, 7, 50], 2, 8)
    whole = relative_attention(qkv, bias, offsets, longest)
    alone = relative_attention(qkv[30:37], bias, torch.tensor([0, 7]), longest)
    assert torch.equal(whole[30:37], alone)
    threads, upstream = torch.get_num_threads(), torch.randn(whole.shape)
    grads = torch.autograd.grad(whole, [qkv, bias], upstream)
    torch.set_num_threads(3)
    try:
        again = relative_attention(qkv, bias, offsets, longest)
        others = torch.autograd.grad(again, [qkv, bias], upstream)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, again)
    assert all(torch.equal(one, two) for one, two in zip(grads, others, strict=True))


def test_large_logits_and_nan() -> None:
    qkv, bias, offsets, longest = inputs([20], 1, 4)
    with torch.no_grad():
        qkv[:, :2] *= 30
    out = relative_attention(qkv, bias, offsets, longest)
    torch.testing.assert_close(
        out, relative_attention_reference(qkv, bias, offsets, longest), atol=1e-3, rtol=1e-3
    )
    with torch.no_grad():
        qkv[3, 0] = torch.nan
    assert relative_attention(qkv, bias, offsets, longest)[3].isnan().all()


def test_bfloat16_keeps_its_dtype() -> None:
    qkv, bias, offsets, longest = inputs([20, 3], 2, 8)
    rough = relative_attention(qkv.bfloat16(), bias, offsets, longest)
    assert rough.dtype == torch.bfloat16
    exact = relative_attention(qkv, bias, offsets, longest)
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)
