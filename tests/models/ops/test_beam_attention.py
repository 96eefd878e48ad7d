"""Attention along beams' paths: kernel against reference, reference against loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.ops import native
from models.ops.beam_attention import Written, beam_attention, beam_attention_reference


def inputs(
    beams: list[int], requests: int, groups: int, share: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Written, Tensor, Tensor]:
    """Queries, keys and values are slices of one projection, as layers make them."""
    generator = torch.Generator().manual_seed(sum(beams) + requests + width)
    heads = groups * share
    written, q = [], torch.empty(0)
    for count in beams:
        shape = requests, count, (heads + 2 * groups) * width
        qkv = torch.randn(shape, generator=generator, dtype=dtype)
        q, k, v = qkv.split([heads * width, groups * width, groups * width], dim=-1)
        written.append((k.unflatten(-1, (groups, -1)), v.unflatten(-1, (groups, -1))))
    drawn = [torch.randint(n, (requests, beams[-1]), generator=generator) for n in beams[:-1]]
    ancestors = torch.stack([*drawn, torch.arange(beams[-1]).expand(requests, -1)], dim=2)
    bias = torch.randn(heads, len(beams), generator=generator, dtype=dtype)
    return q.unflatten(-1, (heads, -1)), written, ancestors, bias


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 40),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_kernel_equals_the_reference(
    beams: list[int], requests: int, groups: int, share: int, width: int, biased: bool
) -> None:
    if not native.native_available():
        pytest.skip("no C++ compiler")
    q, written, ancestors, bias = inputs(beams, requests, groups, share, width, torch.float32)
    given_bias = bias if biased else None
    fast = beam_attention(q, written, ancestors, given_bias)
    plain = beam_attention_reference(q, written, ancestors, given_bias)
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=2e-5)


def test_keys_and_values_of_other_layouts_are_read_as_well() -> None:
    q, written, ancestors, bias = inputs([1, 3], 2, 2, 2, 5, torch.float32)
    plain = beam_attention_reference(q, written, ancestors, bias)
    copied = [(k.contiguous(), v) for k, v in written]
    turned = [(k.mT.contiguous().mT, v) for k, v in written]
    for other in (copied, turned):
        torch.testing.assert_close(beam_attention(q, other, ancestors, bias), plain)


def test_reference_equals_loops() -> None:
    q, written, ancestors, bias = inputs([1, 4, 3], 2, 2, 2, 3, torch.float64)
    actual = beam_attention_reference(q, written, ancestors, bias)
    for n in range(2):
        for w in range(3):
            for h in range(4):
                path = [int(beam) for beam in ancestors[n, w]]
                keys = [written[p][0][n, beam, h // 2] for p, beam in enumerate(path)]
                values = [written[p][1][n, beam, h // 2] for p, beam in enumerate(path)]
                weights = [
                    math.exp(float(q[n, w, h] @ key) / math.sqrt(3) + float(bias[h, p]))
                    for p, key in enumerate(keys)
                ]
                mixed = sum(x * v for x, v in zip(weights, values, strict=True)) / sum(weights)
                torch.testing.assert_close(actual[n, w, h], mixed)


def test_gradients_flow_where_they_are_wanted() -> None:
    q, written, ancestors, bias = inputs([1, 2], 1, 1, 2, 3, torch.float32)
    q = q.detach().requires_grad_()
    beam_attention(q, written, ancestors, bias).sum().backward()
    assert q.grad is not None and q.grad.any()
    with torch.no_grad():
        assert not beam_attention(q, written, ancestors, bias).requires_grad
