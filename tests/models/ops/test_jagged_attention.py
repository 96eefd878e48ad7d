"""Attention within jagged sequences: kernel and padded rows against one sequence at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.jagged import lengths_to_offsets
from models.ops.jagged_attention import jagged_self_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernel, and padded rows
@given(st.lists(st.integers(0, 30), max_size=5), st.integers(1, 3), st.integers(0, 2))
@settings(deadline=None, max_examples=25)
def test_sequences_see_themselves_alone(
    dtype: torch.dtype, lengths: list[int], heads: int, slack: int
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    qkv = torch.randn(sum(lengths), 3, heads, 5, generator=generator, dtype=torch.float64)
    qkv = qkv.to(dtype).requires_grad_()
    offsets = lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64))
    actual = jagged_self_attention(qkv, offsets, max([1, *lengths]) + slack)
    upstream = torch.randn(actual.shape, generator=generator, dtype=torch.float64).to(dtype)
    [grad] = torch.autograd.grad(actual, qkv, upstream)
    parts = []
    for one in qkv.split(lengths):
        q, k, v = one.permute(1, 2, 0, 3)  # [H, S, Dh] each
        parts.append(((q @ k.mT / math.sqrt(5)).softmax(-1) @ v).transpose(0, 1))
    expected = torch.cat(parts) if parts else actual
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    if parts:
        [plain] = torch.autograd.grad(expected, qkv, upstream)
        torch.testing.assert_close(grad, plain, atol=1e-4, rtol=1e-4)
