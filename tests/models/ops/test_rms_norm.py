"""Root-mean-square norm: kernel against the formula, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.layers.norms import RMSNorm
from models.ops.rms_norm import rms_norm

EPS = 1e-6


@given(
    st.lists(st.integers(0, 5), max_size=2), st.integers(1, 70), st.sampled_from([1.0, 1e-4, 1e4])
)
@settings(deadline=None, max_examples=40)
def test_equals_the_formula_forward_and_backward(
    leading: list[int], width: int, scale: float
) -> None:
    x = (torch.randn(*leading, width) * scale).requires_grad_()
    weight = torch.randn(width, requires_grad=True)
    fast = rms_norm(x, weight, EPS)
    y, w = (t.detach().double().requires_grad_() for t in (x, weight))
    plain = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * w
    torch.testing.assert_close(fast, plain.float(), atol=1e-6, rtol=1e-5)
    upstream = torch.randn(fast.shape)
    got = torch.autograd.grad(fast, [x, weight], upstream)
    expected = torch.autograd.grad(plain, [y, w], upstream.double())
    # Of the two terms that may cancel (all of a row of width 1), not of their difference.
    inverse = (y.square().mean(-1, keepdim=True) + EPS).rsqrt()
    size = float((upstream * w * inverse).detach().abs().max()) if x.numel() else 0.0
    torch.testing.assert_close(got[0], expected[0].float(), atol=3e-6 * size, rtol=1e-4)
    torch.testing.assert_close(got[1], expected[1].float(), atol=1e-4, rtol=1e-4)


def test_many_tokens_sum_their_weight_gradient_alike_for_any_threads() -> None:
    x, weight = torch.randn(1000, 24), torch.randn(24, requires_grad=True)
    threads, gradients = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out = rms_norm(x, weight, EPS)
            gradients.append(torch.autograd.grad(out.square().sum(), weight)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*gradients)
    wide = weight.detach().double().requires_grad_()
    norm = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    (expected,) = torch.autograd.grad((norm * wide).square().sum(), wide)
    torch.testing.assert_close(gradients[0], expected.float(), atol=1e-3, rtol=1e-5)


def test_rows_that_are_not_contiguous_and_other_dtypes() -> None:
    layer, x = RMSNorm(6), torch.randn(6, 5)
    torch.testing.assert_close(layer(x.t()), layer(x.t().contiguous()))
    torch.testing.assert_close(layer.double()(x.t().double()).float(), layer.float()(x.t()))
    rough = layer.bfloat16()(x.t().bfloat16())
    assert rough.dtype == torch.bfloat16
    assert rms_norm(x[:0], torch.ones(5), EPS).shape == (0, 5)


@pytest.mark.parametrize("width", [1, 16, 33])
def test_zero_rows_stay_zero(width: int) -> None:
    x = torch.zeros(3, width, requires_grad=True)
    out = rms_norm(x, torch.ones(width), EPS)
    out.sum().backward()
    assert not out.any()
    assert x.grad is not None and x.grad.isfinite().all()
