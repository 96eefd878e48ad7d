"""Attention over visible keys against a loop, on both sides of the choice of kernel."""

import math

import pytest
import torch

from models.ops.masked_attention import masked_attention


@pytest.mark.parametrize("keys", [1, 5, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_loop_over_visible_keys(keys: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(keys)
    q, k, v = (
        torch.randn(3, 2, n, 4, generator=generator).to(dtype).requires_grad_()
        for n in (6, keys, keys)
    )
    lengths = [keys, 1, (keys + 1) // 2]
    visible = (torch.arange(keys) < torch.tensor(lengths)[:, None])[:, None, None]
    actual = masked_attention(q, k, v, visible)
    direction = torch.randn(actual.shape, generator=generator)
    grads = torch.autograd.grad((actual.float() * direction).sum(), (q, k, v))
    expected = torch.zeros_like(direction)
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    rows = []
    for n, length in enumerate(lengths):
        for h in range(2):
            for i in range(6):
                weights = torch.exp(doubles[1][n, h, :length] @ doubles[0][n, h, i] / math.sqrt(4))
                rows.append((weights / weights.sum()) @ doubles[2][n, h, :length])
    expected = torch.stack(rows).view(actual.shape)
    wanted = torch.autograd.grad((expected * direction).sum(), doubles)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
    for got, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), right, atol=tolerance, rtol=tolerance)
