"""HSTU attention: native against reference against loops written from the formula."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.ops.hstu_attention import (
    TIME_BUCKETS,
    TIME_THRESHOLDS,
    hstu_attention,
    hstu_attention_reference,
    time_buckets,
)
from models.ops.jagged import lengths_to_offsets
from models.ops.native import native_available


@dataclass
class Case:
    """Arguments of the op for some lengths."""

    floats: dict[str, Tensor]
    offsets: Tensor
    timestamps: Tensor
    next_timestamps: Tensor
    max_len: int

    def run(self, op, **replaced: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        f = self.floats | replaced
        times = (self.timestamps, self.next_timestamps)
        weights = (f["pos_weight"], f["ts_weight"])
        return op(f["q"], f["k"], f["v"], self.offsets, *times, *weights, self.max_len)

    def gradients(self, op, upstream: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        leaves = {name: x.clone().requires_grad_() for name, x in self.floats.items()}
        out = self.run(op, **leaves)
        return torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))


def make_case(
    lengths: list[int], heads: int = 1, dqk: int = 4, dv: int = 4, max_len: int = 0, seed: int = 0
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    total, max_len = sum(lengths), max_len or max(lengths, default=0) or 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    exponent = torch.rand(total, generator=generator) * 40
    timestamps = exponent.exp().to(torch.int64)  # unsorted, gaps of every magnitude
    return Case(
        floats={
            "q": normal(total, heads, dqk),
            "k": normal(total, heads, dqk),
            "v": normal(total, heads, dv),
            "pos_weight": normal(2 * max_len - 1),
            "ts_weight": normal(TIME_BUCKETS),
        },
        offsets=lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64)),
        timestamps=timestamps,
        next_timestamps=timestamps.roll(-1) if total else timestamps,
        max_len=max_len,
    )


def loop(case: Case) -> Tensor:
    """The formula, an element at a time, in Python's double precision."""
    q, k, v, pos_weight, ts_weight = (x.double() for x in case.floats.values())
    out = torch.zeros(v.shape, dtype=torch.float64)
    bounds = case.offsets.tolist()
    for start, end in itertools.pairwise(bounds):
        for i in range(start, end):
            for j in range(start, i + 1):
                elapsed = abs(int(case.next_timestamps[i]) - int(case.timestamps[j]))
                bucket = min(max(int(math.log(max(elapsed, 1)) / 0.301), 0), 128)
                bias = pos_weight[j - i + case.max_len - 1] + ts_weight[bucket]
                for h in range(q.shape[1]):
                    score = q[i, h] @ k[j, h] + bias
                    out[i, h] += score * torch.sigmoid(score) / case.max_len * v[j, h]
    return out


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=3e-6 * scale + 1e-7)


def test_kernels_are_built_here() -> None:
    # Without kernels the parity tests below would compare the reference with itself.
    assert native_available()


@given(
    lengths=st.lists(st.integers(0, 9), max_size=4),
    heads=st.integers(1, 3),
    dqk=st.integers(1, 6),
    dv=st.integers(1, 6),
)
@settings(deadline=None, max_examples=20)
def test_reference_and_native_equal_the_formula(
    lengths: list[int], heads: int, dqk: int, dv: int
) -> None:
    case = make_case(lengths, heads, dqk, dv, max_len=11)
    expected = loop(case)
    assert_close(case.run(hstu_attention_reference), expected)
    assert_close(case.run(hstu_attention), expected)


# Lengths around the kernel's blocks of 24 queries, 128 keys, 16 lanes and 6 rows.
@given(
    lengths=st.lists(st.sampled_from([0, 1, 5, 16, 23, 24, 25, 31, 97, 128, 129, 300]), max_size=4),
    heads=st.integers(1, 2),
    dqk=st.sampled_from([1, 8, 16, 17, 50, 64, 80]),
    dv=st.sampled_from([1, 7, 16, 25, 50, 96]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=30)
def test_native_equals_reference_forward_and_backward(
    lengths: list[int], heads: int, dqk: int, dv: int, seed: int
) -> None:
    case = make_case(lengths, heads, dqk, dv, max_len=310, seed=seed)
    assert_close(case.run(hstu_attention), case.run(hstu_attention_reference))
    upstream = torch.randn(sum(lengths), heads, dv)
    double = Case(
        {name: x.double() for name, x in case.floats.items()},
        case.offsets,
        case.timestamps,
        case.next_timestamps,
        case.max_len,
    )
    expected = double.gradients(hstu_attention_reference, upstream)
    for actual, exact in zip(case.gradients(hstu_attention, upstream), expected, strict=True):
        assert_close(actual, exact)


def test_reference_gradient_is_the_derivative() -> None:
    case = make_case([3, 0, 2], heads=2, dqk=2, dv=3)
    leaves = [x.double().requires_grad_() for x in case.floats.values()]

    def op(*values: Tensor) -> Tensor:
        return case.run(hstu_attention_reference, **dict(zip(case.floats, values, strict=True)))

    assert torch.autograd.gradcheck(op, leaves)


def test_slices_of_a_joint_projection_are_taken_as_they_are() -> None:
    case = make_case([30, 7], heads=2, dqk=5, dv=5)
    joint = torch.cat([case.floats[x].flatten(1) for x in "vqk"], dim=1).requires_grad_()
    v, q, k = (part.view(37, 2, 5) for part in joint.split(10, dim=1))
    assert not q.is_contiguous()
    out = case.run(hstu_attention, q=q, k=k, v=v)
    assert torch.equal(out, case.run(hstu_attention))
    upstream = torch.randn_like(out)
    out.backward(upstream)
    d_q, d_k, d_v, *_ = case.gradients(hstu_attention, upstream)
    assert torch.equal(joint.grad, torch.cat([x.flatten(1) for x in (d_v, d_q, d_k)], dim=1))


def test_threads_do_not_change_a_bit() -> None:
    case = make_case([50, 3, 77, 20, 20, 1], dqk=8, dv=8)
    upstream = torch.randn(171, 1, 8)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((case.run(hstu_attention), *case.gradients(hstu_attention, upstream)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_batching_does_not_change_a_bit() -> None:
    whole = make_case([9, 40, 0, 13], dqk=8, dv=8, max_len=64)
    out = whole.run(hstu_attention)
    parts = []
    for start, end in itertools.pairwise(whole.offsets.tolist()):
        floats = {
            name: x if name.endswith("weight") else x[start:end] for name, x in whole.floats.items()
        }
        times = (whole.timestamps[start:end], whole.next_timestamps[start:end])
        one = Case(floats, torch.tensor([0, end - start]), *times, whole.max_len)
        parts.append(one.run(hstu_attention))
    assert torch.equal(out, torch.cat(parts))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_in_gives_nothing_out_and_zero_gradients(lengths: list[int]) -> None:
    case = make_case(lengths)
    for op in (hstu_attention, hstu_attention_reference):
        assert case.run(op).shape == (0, 1, 4)
        # A rank without data still owes the others a gradient of each parameter.
        d_pos, d_ts = case.gradients(op, torch.zeros(0, 1, 4))[-2:]
        assert d_pos.shape == (1,) and d_ts.shape == (TIME_BUCKETS,)
        assert not d_pos.any() and not d_ts.any()


def test_bfloat16_is_computed_in_float32() -> None:
    case = make_case([20, 9], dqk=8, dv=8)
    low = {name: x.bfloat16() for name, x in case.floats.items()}
    out = case.run(hstu_attention, **low)
    assert out.dtype == torch.bfloat16
    exact = case.run(hstu_attention, **{name: x.float() for name, x in low.items()})
    assert torch.equal(out, exact.bfloat16())


def test_nan_reaches_the_output() -> None:
    case = make_case([20], dqk=8, dv=8)
    case.floats["q"][7, 0, 3] = torch.nan
    bad = case.run(hstu_attention).isnan().any(dim=(1, 2))
    assert bad.nonzero().flatten().tolist() == [7]


def test_too_long_a_sequence_is_refused() -> None:
    case = make_case([5, 12], max_len=11)
    for op in (hstu_attention, hstu_attention_reference):
        with pytest.raises(ValueError, match="12 events exceeds max_len = 11"):
            case.run(op)


def test_time_buckets_at_their_bounds() -> None:
    bounds = torch.tensor(TIME_THRESHOLDS, dtype=torch.int64)
    for shift in (-1, 0, 1):
        expected = [
            sum(bound <= value for bound in TIME_THRESHOLDS) for value in (bounds + shift).tolist()
        ]
        assert time_buckets(bounds + shift).tolist() == expected
        assert time_buckets(-(bounds + shift)).tolist() == expected
    assert time_buckets(torch.tensor([0, 1, 2, 2**62])).tolist() == [0, 0, 2, 128]
    seconds = torch.arange(1, 200_000)
    formula = (seconds.double().log() / 0.301).floor().clamp(0, 128).long()
    assert torch.equal(time_buckets(seconds), formula)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.integers(0, 127))
@settings(deadline=None)
def test_native_buckets_are_exact(shifts: list[int], bucket: int) -> None:
    """Weights that tell buckets apart: the output names the bucket that the kernel chose."""
    elapsed = torch.tensor([TIME_THRESHOLDS[(bucket + i) % 128] + s for i, s in enumerate(shifts)])
    total = len(shifts)
    ones = torch.ones(total, 1, 1)
    out = hstu_attention(
        torch.zeros(total, 1, 1),
        ones,
        ones,
        torch.arange(total + 1),
        torch.zeros(total, dtype=torch.int64),
        elapsed,
        torch.zeros(1),
        30.0 + torch.arange(TIME_BUCKETS),  # SiLU is the identity up there
        1,
    )
    assert (out.flatten() - 30).round().long().tolist() == time_buckets(elapsed).tolist()
