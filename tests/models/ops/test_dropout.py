"""Keyed dropout: native bits equal the reference, and the mask depends on the keys alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.dropout import (
    keep_mask,
    keyed_dropout,
    keyed_dropout_reference,
    keyed_relu_dropout,
    sub_keys,
    token_keys,
)
from models.ops.hashing import mix64, mix64_int
from models.ops.jagged import lengths_to_offsets

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(INT64, max_size=9), st.integers(0, 70), st.integers(0, 2**62))
@settings(deadline=None)
def test_native_equals_reference_forward_and_backward(
    keys: list[int], channels: int, salt: int
) -> None:
    key_tensor = torch.tensor(keys, dtype=torch.int64)
    x = torch.randn(len(keys), channels, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    fast = keyed_dropout(x, key_tensor, 0.3, salt)
    plain = keyed_dropout_reference(y, key_tensor, 0.3, salt)
    assert torch.equal(fast, plain)
    upstream = torch.randn_like(x)
    fast.backward(upstream)
    plain.backward(upstream)
    assert torch.equal(x.grad, y.grad)


@given(INT64)
def test_tensor_hash_equals_unsigned_arithmetic(value: int) -> None:
    assert int(mix64(torch.tensor([value]))[0]) % 2**64 == mix64_int(value)


@given(st.permutations(range(5)), st.integers(1, 4))
def test_mask_does_not_depend_on_batching(order: list[int], cut: int) -> None:
    lengths = torch.tensor([3, 0, 5, 1, 2])
    whole = token_keys(7, 11, torch.arange(5), lengths_to_offsets(lengths))
    pieces = whole.split(lengths.tolist())
    for part in (order[:cut], order[cut:]):
        ids = torch.tensor(part, dtype=torch.int64)
        keys = token_keys(7, 11, ids, lengths_to_offsets(lengths[ids]))
        assert torch.equal(keys, torch.cat([whole[:0], *(pieces[b] for b in part)]))


def test_keys_differ_by_every_argument() -> None:
    offsets = lengths_to_offsets(torch.tensor([40, 40]))
    ids = torch.tensor([3, 4])
    keys = [
        token_keys(seed, step, ids + shift, offsets)
        for seed in (0, 1)
        for step in (0, 1)
        for shift in (0, 2)
    ]
    assert torch.cat(keys).unique().numel() == 8 * 80


def test_keep_rate_and_independence() -> None:
    keys = token_keys(0, 0, torch.arange(64), lengths_to_offsets(torch.full((64,), 50)))
    p = 0.2
    masks = [keep_mask(keys, 64, p, salt).double() for salt in (0, 1)]
    n = masks[0].numel()
    for mask in masks:
        assert abs(mask.mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
        # channels, tokens: each column's and row's rate lies within 6 standard deviations
        for dim in (0, 1):
            count = mask.shape[dim]
            worst = (mask.mean(dim) - (1 - p)).abs().max().item()
            assert worst < 6 * (p * (1 - p) / count) ** 0.5
    neighbours = (
        (masks[0], masks[1]),
        (masks[0][:, 1:], masks[0][:, :-1]),
        (masks[0][1:], masks[0][:-1]),
    )
    for left, right in neighbours:
        covariance = (left * right).mean() - left.mean() * right.mean()
        assert abs(covariance.item()) < 5 * p * (1 - p) / n**0.5


def test_expectation_is_kept_and_zero_probability_is_the_identity() -> None:
    keys = torch.arange(4000)
    x = torch.ones(4000, 16)
    assert keyed_dropout(x, keys, 0.5, 1).mean().item() == pytest.approx(1.0, abs=0.02)
    assert keyed_dropout(x, keys, 0.0, 1) is x
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        keyed_dropout(x, keys, 1.0, 1)


def test_bfloat16_equals_the_reference_and_keeps_its_dtype() -> None:
    keys = torch.arange(50)
    x = torch.randn(50, 70).bfloat16().requires_grad_()
    y = x.detach().clone().requires_grad_()
    fast, plain = keyed_dropout(x, keys, 0.3, 1), keyed_dropout_reference(y, keys, 0.3, 1)
    assert fast.dtype == torch.bfloat16
    assert torch.equal(fast, plain)
    upstream = torch.randn(50, 70).bfloat16()
    fast.backward(upstream)
    plain.backward(upstream)
    assert torch.equal(x.grad, y.grad)


@given(st.lists(INT64, max_size=9), st.integers(0, 70), st.sampled_from([0.0, 0.3]))
@settings(deadline=None, max_examples=40)
def test_relu_and_dropout_in_one_pass(keys: list[int], channels: int, p: float) -> None:
    key_tensor = torch.tensor(keys, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(len(keys), channels).to(dtype).requires_grad_()
        y = x.detach().clone().requires_grad_()
        fast = keyed_relu_dropout(x, key_tensor, p, 7)
        plain = keyed_dropout_reference(y.relu(), key_tensor, p, 7)
        assert fast.dtype == dtype
        assert torch.equal(fast, plain)
        upstream = torch.randn(x.shape).to(dtype)
        fast.backward(upstream)
        plain.backward(upstream)
        assert torch.equal(x.grad, y.grad)


def test_nan_survives_relu_and_dropout() -> None:
    out = keyed_relu_dropout(torch.full((50, 8), torch.nan), torch.arange(50), 0.3, 1)
    assert out.isnan().float().mean().item() == pytest.approx(0.7, abs=0.1)


def test_parts_of_a_token_have_keys_of_their_own() -> None:
    keys = token_keys(0, 0, torch.arange(9), lengths_to_offsets(torch.full((9,), 40)))
    parts = sub_keys(keys, 4)
    assert parts.shape == (360, 4)
    assert torch.cat([parts.flatten(), keys]).unique().numel() == 5 * 360
    assert torch.equal(sub_keys(keys[7:9], 2), parts[7:9, :2])
