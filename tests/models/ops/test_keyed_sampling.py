"""Keyed draws: native equals reference, uniform, and independent of batching."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.keyed_sampling import keyed_integers, keyed_integers_reference


@given(
    keys=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6),
    count=st.integers(0, 40),
    high=st.integers(1, 2**31 - 1),
    salt=st.integers(0, 2**62),
)
@settings(deadline=None)
def test_native_equals_reference(keys: list[int], count: int, high: int, salt: int) -> None:
    key_tensor = torch.tensor(keys, dtype=torch.int64)
    draws = keyed_integers(key_tensor, count, high, salt)
    assert draws.shape == (len(keys), count) and draws.dtype == torch.int64
    assert torch.equal(draws, keyed_integers_reference(key_tensor, count, high, salt))
    assert ((draws >= 0) & (draws < high)).all()
    for t in range(len(keys)):
        assert torch.equal(keyed_integers(key_tensor[t : t + 1], count, high, salt)[0], draws[t])


def test_draws_are_uniform() -> None:
    high, count = 50, 64
    draws = keyed_integers(torch.arange(2000), count, high, salt=3)
    observed = torch.bincount(draws.flatten(), minlength=high).double()
    expected = draws.numel() / high
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_square < high - 1 + 5 * (2 * (high - 1)) ** 0.5
    for left, right in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        same = (left == right).double()
        assert abs(same.mean().item() - 1 / high) < 5 * (1 / high / same.numel()) ** 0.5
    assert not torch.equal(draws, keyed_integers(torch.arange(2000), count, high, salt=4))


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="not 0"):
        keyed_integers(torch.arange(3), 2, 0, salt=0)
