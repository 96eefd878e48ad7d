"""Collision policies against plain loops; what they promise holds for any codes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_loaders.collisions import FREE, extra_digits, next_best

LEVELS, SIZE = 2, 4


def loop_digits(codes: np.ndarray, digits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    following: dict[tuple[int, ...], int] = {}
    for code, digit in zip(codes, digits, strict=True):
        if digit != FREE:
            key = tuple(code)
            following[key] = max(following.get(key, 0), digit + 1)
    result = digits.copy()
    for row in np.argsort(ids, kind="stable"):
        if digits[row] == FREE:
            key = tuple(codes[row])
            result[row] = following.get(key, 0)
            following[key] = result[row] + 1
    return result


def loop_next_best(
    codes: np.ndarray,
    candidates: np.ndarray,
    far: np.ndarray,
    fixed: np.ndarray,
    ids: np.ndarray,
    size: int,
) -> np.ndarray:
    taken = {tuple(code) for code, stays in zip(codes, fixed, strict=True) if stays}
    pending = [row for row in np.lexsort([ids, far]) if not fixed[row]]
    result = codes.copy()
    for choice in range(candidates.shape[1]):
        waiting = []
        claimed = set()
        for row in pending:
            wanted = (*codes[row, :-1], candidates[row, choice])
            if wanted in taken or wanted in claimed:
                waiting.append(row)
            else:
                claimed.add(wanted)
                result[row, -1] = wanted[-1]
        taken |= claimed
        pending = waiting
    for row in pending:
        prefix = tuple(codes[row, :-1])
        free = [code for code in range(size) if (*prefix, code) not in taken]
        if free:
            result[row, -1] = free[0]
            taken.add((*prefix, free[0]))
    return result


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.random.Generator]:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random.integers(0, SIZE, (draw(st.integers(1, 30)), LEVELS)), random


@given(tables())
def test_digits_number_each_group_by_item(table: tuple[np.ndarray, np.random.Generator]) -> None:
    codes, random = table
    ids = random.permutation(len(codes)) + 1
    digits = extra_digits(codes, np.full(len(codes), FREE), ids)
    assert np.array_equal(digits, loop_digits(codes, np.full(len(codes), FREE), ids))
    whole = np.concatenate([codes, digits[:, None]], axis=1)
    assert len(np.unique(whole, axis=0)) == len(codes)
    assert digits.max() + 1 == np.unique(codes, axis=0, return_counts=True)[1].max()


@given(tables())
def test_digits_go_on_after_those_given_before(
    table: tuple[np.ndarray, np.random.Generator],
) -> None:
    codes, random = table
    ids = random.permutation(len(codes)) + 1
    before = extra_digits(codes, np.full(len(codes), FREE), ids)
    given_before = np.where(random.random(len(codes)) < 0.5, before, FREE)
    digits = extra_digits(codes, given_before, ids)
    assert np.array_equal(digits, loop_digits(codes, given_before, ids))
    stays = given_before != FREE
    assert np.array_equal(digits[stays], given_before[stays])
    assert len(np.unique(np.c_[codes, digits], axis=0)) == len(codes)


@given(tables(), st.integers(1, SIZE))
def test_next_best_equals_a_loop_and_is_unique_where_it_can_be(
    table: tuple[np.ndarray, np.random.Generator], num_candidates: int
) -> None:
    codes, random = table
    n = len(codes)
    ids, far = random.permutation(n) + 1, random.integers(0, 3, n).astype(np.float32)
    others = np.argsort(random.random((n, SIZE)), axis=1)
    own_first = np.argsort(others != codes[:, -1:], axis=1, kind="stable")
    candidates = np.take_along_axis(others, own_first, 1)[:, :num_candidates]
    fixed = np.zeros(n, bool)
    fixed[np.unique(codes, axis=0, return_index=True)[1][:2]] = True
    result, remaining = next_best(codes, candidates, far, fixed, ids, SIZE)
    assert np.array_equal(result, loop_next_best(codes, candidates, far, fixed, ids, SIZE))
    assert np.array_equal(result[fixed], codes[fixed])
    assert np.array_equal(result[:, :-1], codes[:, :-1])
    per_prefix = np.unique(codes[:, :-1], axis=0, return_counts=True)[1]
    too_many = np.maximum(per_prefix - SIZE, 0).sum()
    assert remaining == too_many == n - len(np.unique(result, axis=0))
