"""Cross entropy of codes against loops written from its definition."""

import math

import pytest
import torch
from torch import Tensor

from configs.objectives import NextCodeConfig
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.log_probs import sequence_log_probs
from trainer.objectives.next_code import code_losses

SIZES = (4, 3, 5)
CATALOGUE = torch.tensor([[0, 1, 2], [0, 1, 4], [0, 2, 2], [2, 0, 0], [3, 1, 1], [3, 1, 3]])
TARGETS = CATALOGUE[[1, 3, 0, 5]]


def some_logits(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(TARGETS), size, generator=generator) * 3 for size in SIZES]


def competitors(prefix: list[int], level: int, normalization: str) -> list[int]:
    """Codes that share the probability at a level after a prefix."""
    if normalization == "codebook":
        return list(range(SIZES[level]))
    rows = [row for row in CATALOGUE.tolist() if row[:level] == prefix]
    return sorted({row[level] for row in rows})


def loop(logits: list[Tensor], normalization: str, smoothing: float) -> list[list[float]]:
    losses = []
    for n, codes in enumerate(TARGETS.tolist()):
        row = []
        for level, code in enumerate(codes):
            among = competitors(codes[:level], level, normalization)
            scores = {c: float(logits[level][n, c]) for c in among}
            log_z = math.log(sum(math.exp(s) for s in scores.values()))
            right = log_z - scores[code]
            spread = sum(log_z - s for s in scores.values()) / len(among)
            row.append((1 - smoothing) * right + smoothing * spread)
        losses.append(row)
    return losses


@pytest.mark.parametrize("normalization", ["codebook", "catalogue"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_the_loop(normalization: str, smoothing: float) -> None:
    objective = NextCodeConfig.model_validate(
        {"normalization": normalization, "label_smoothing": smoothing}
    )
    trie = CatalogueTrie.build(CATALOGUE, SIZES)
    losses = code_losses(some_logits(), TARGETS, objective, trie)
    expected = torch.tensor(loop(some_logits(), normalization, smoothing))
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def test_over_the_catalogue_it_is_what_generation_scores() -> None:
    trie = CatalogueTrie.build(CATALOGUE, SIZES)
    objective = NextCodeConfig(normalization="catalogue")
    losses = code_losses(some_logits(), TARGETS, objective, trie)
    torch.testing.assert_close(-losses, sequence_log_probs(some_logits(), TARGETS, trie))


def test_gradients_stay_inside_the_legal_codes() -> None:
    logits = [scores.requires_grad_() for scores in some_logits()]
    trie = CatalogueTrie.build(CATALOGUE, SIZES)
    objective = NextCodeConfig(normalization="catalogue", label_smoothing=0.2)
    code_losses(logits, TARGETS, objective, trie).sum().backward()
    for level, scores in enumerate(logits):
        assert scores.grad is not None and scores.grad.isfinite().all()
        for n, codes in enumerate(TARGETS.tolist()):
            legal = competitors(codes[:level], level, "catalogue")
            touched = scores.grad[n].abs() > 1e-7
            assert set(touched.nonzero().flatten().tolist()) <= set(legal)
            assert float(scores.grad[n].sum()) == pytest.approx(0.0, abs=1e-5)


def test_an_id_that_no_item_has_costs_infinitely_much() -> None:
    trie = CatalogueTrie.build(CATALOGUE, SIZES)
    objective = NextCodeConfig(normalization="catalogue", label_smoothing=0.2)
    logits = [scores.requires_grad_() for scores in some_logits()]
    strange = torch.tensor([[0, 0, 2], [1, 0, 0], [0, 1, 2], [3, 1, 2]])
    losses = code_losses(logits, strange, objective, trie)
    leaves = [[False, True, True], [True] * 3, [False] * 3, [False, False, True]]
    assert losses.isinf().tolist() == leaves
    torch.where(losses.isinf(), 0.0, losses).sum().backward()
    assert all(scores.grad is not None and scores.grad.isfinite().all() for scores in logits)
