"""One definition of log π: against enumeration, sums to one, gradients finite and right."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.generation.catalogue_trie import CatalogueTrie
from models.generation.log_probs import child_log_probs, sequence_log_probs
from tests.models.generation.plain import Catalogue, TinyDecoder, catalogues, exact_log_probs


@given(catalogues(max_items=10), st.integers(0, 2**31))
def test_ids_of_the_catalogue_have_probabilities_that_sum_to_one(
    catalogue: Catalogue, seed: int
) -> None:
    decoder = TinyDecoder(catalogue.sizes, seed)
    context, ids = decoder.contexts(1, seed), catalogue.ids()
    exact = exact_log_probs(decoder, context[0], ids)
    logits = [
        torch.stack([decoder.logits(context[0], codes[:level]) for codes in ids])
        for level in range(len(catalogue.sizes))
    ]
    levels = sequence_log_probs(logits, torch.tensor(ids), catalogue.trie)
    assert levels.shape == (len(ids), len(catalogue.sizes)) and levels.dtype == torch.float32
    totals = levels.sum(1)
    torch.testing.assert_close(totals, torch.tensor([exact[codes] for codes in ids]))
    assert totals.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@given(catalogues(), st.integers(0, 2**31))
def test_restrictions_renormalise_over_what_is_left(catalogue: Catalogue, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    trie, count = catalogue.trie, catalogue.codes.shape[0]
    allowed = torch.rand(count, generator=generator) < 0.7
    seen = torch.rand(count, generator=generator) < 0.3
    left = allowed & ~seen
    logits = [torch.randn(count, size, generator=generator) for size in catalogue.sizes]
    exclude = (torch.arange(count) + 1).where(seen, 0).expand(count, -1)
    got = sequence_log_probs(
        logits, catalogue.codes, trie, trie.allow(allowed), exclude=exclude
    ).sum(1)
    if not left.any():
        assert (got == -torch.inf).all()
        return
    rebuilt = CatalogueTrie.build(catalogue.codes[left], catalogue.sizes)
    expected = sequence_log_probs(logits, catalogue.codes, rebuilt, known=True).sum(1)
    torch.testing.assert_close(got, expected)


def test_gradients_are_finite_and_those_of_the_dense_form() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 7, generator=generator, requires_grad=True)
    tokens = torch.tensor([[0, 2, 6]]).expand(5, -1)
    legal = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]]).bool()
    log_probs = child_log_probs(logits, tokens, legal)
    assert (log_probs[~legal] == -torch.inf).all()
    weights = torch.randn(5, 3, generator=generator)
    (weights * log_probs.masked_fill(~legal, 0.0)).sum().backward()
    assert logits.grad is not None
    dense = logits.detach().clone().requires_grad_()
    total = torch.zeros(())
    for row in range(5):
        kept = [m for m in range(3) if legal[row, m]]
        normaliser = sum((dense[row, tokens[row, m]].exp() for m in kept), torch.zeros(()))
        for m in kept:
            total = total + weights[row, m] * (dense[row, tokens[row, m]] - normaliser.log())
    total.backward()
    torch.testing.assert_close(logits.grad, dense.grad)
    assert (logits.grad[3] == 0).all() and (logits.grad[:, [1, 3, 4, 5]] == 0).all()


def test_half_precision_is_normalised_in_float32() -> None:
    logits = torch.tensor([[3.0, 1.0, -2.0]], dtype=torch.bfloat16)
    legal = torch.tensor([[True, False, True]])
    got = child_log_probs(logits, torch.arange(3)[None], legal)
    assert got.dtype == torch.float32
    assert got[0, 2].item() == pytest.approx(-5.0 - math.log1p(math.exp(-5.0)), rel=1e-6)


def test_gradient_of_an_unknown_id_that_was_vouched_for_is_zero_and_its_value_minus_inf() -> None:
    trie = CatalogueTrie.build(torch.tensor([[0, 1], [2, 2]]), (3, 3))
    codes = torch.tensor([[0, 1], [0, 2]])
    logits = [torch.zeros(2, 3, requires_grad=True) for _ in range(2)]
    with pytest.raises(ValueError, match=r"\(0, 2\) \(row 1\)"):
        sequence_log_probs(logits, codes, trie)
    got = sequence_log_probs(logits, codes, trie, known=True)
    assert got[1, 1] == -torch.inf and got[0].isfinite().all()
    got[got.isfinite()].sum().backward()
    assert all(level.grad is not None and level.grad.isfinite().all() for level in logits)
