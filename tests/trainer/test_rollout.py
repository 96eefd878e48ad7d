"""Items are sampled from the policy's own softmax, whatever the strategy."""

import math

import pytest
import torch
from torch import Tensor

from configs.generation import AncestralConfig, BeamConfig, GenerationConfig, GumbelTopKConfig
from models.generation.search import generate
from sharding.process_group import DistributedContext
from sharding.retrieval import Catalogue
from tests.models.generation.plain import Catalogue as Codes
from tests.models.generation.plain import TinyDecoder, exact_log_probs
from trainer.rollout import draw_odds, expectation_weights, sample_items

ALONE = DistributedContext(0, 1, torch.device("cpu"))
KEYS = torch.tensor([[0.5], [-1.0], [2.0], [0.0]])


def catalogue() -> Catalogue:
    return Catalogue.from_keys(ALONE, lambda ids: KEYS[ids - 1], len(KEYS), 64)


def test_beams_are_the_best() -> None:
    items, _ = sample_items(
        catalogue(), torch.tensor([[1.0], [-1.0]]), torch.arange(2), BeamConfig(beams=5), 0.1
    )
    assert items.tolist() == [[3, 1, 4, 2, 0], [2, 4, 1, 3, 0]]


def test_samples_follow_policy_and_generation_temperature() -> None:
    """χ² with 3 degrees of freedom; 1 in 10^5 exceeds 25.9."""
    users, samples = 500, 40
    queries, keys = torch.ones(users, 1), torch.arange(users) * 13
    config = AncestralConfig(samples=samples, temperature=2.0)
    items, _ = sample_items(catalogue(), queries, keys, config, 0.6)
    assert items.shape == (users, samples)
    expected = users * samples * (KEYS[:, 0] / 1.2).softmax(0)
    counts = torch.bincount(items.flatten() - 1, minlength=4)
    assert float(((counts - expected).square() / expected).sum()) < 25.9
    repeats = (items[:, 1:] == items[:, :1]).float().mean()
    collision = (KEYS[:, 0] / 1.2).softmax(0).square().sum()
    assert abs(float(repeats - collision)) < 0.03  # samples of a user are independent
    few, _ = sample_items(
        catalogue(), queries, keys, AncestralConfig(samples=3, temperature=2.0), 0.6
    )
    assert torch.equal(few, items[:, :3])


def test_gumbel_top_k_repeats_nothing() -> None:
    queries, keys = torch.ones(50, 1), torch.arange(50)
    items, _ = sample_items(catalogue(), queries, keys, GumbelTopKConfig(samples=3), 1.0)
    assert all(len(set(row)) == 3 for row in items.tolist())


DRAWS = [
    GumbelTopKConfig(samples=16),
    GumbelTopKConfig(samples=16, temperature=1.5),
    AncestralConfig(samples=16, temperature=1.2),
    AncestralConfig(samples=16),
]


@pytest.mark.parametrize("config", DRAWS)
def test_weighed_draws_of_items_measure_entropy_and_divergence(config: GenerationConfig) -> None:
    """Against exact values; a plain mean over 16 draws without replacement is far off both."""
    users, size = 2000, 200
    generator = torch.Generator().manual_seed(0)
    log_probs = (2.5 * torch.randn(size, generator=generator)).log_softmax(0)
    reference = (log_probs + 0.5 * torch.randn(size, generator=generator)).log_softmax(0)
    whole = Catalogue.from_keys(ALONE, lambda ids: log_probs[ids - 1, None], size, 64)
    items, odds = sample_items(whole, torch.ones(users, 1), torch.arange(users), config, 1.0)
    drawn, other = log_probs[items - 1], reference[items - 1]
    weights = expectation_weights(drawn, odds)
    ratio = other - drawn
    measured = {"entropy": -drawn, "kl": ratio.exp() - ratio - 1.0}
    p = log_probs.exp()
    exact = {"entropy": -(p * log_probs).sum(), "kl": (p * (log_probs - reference)).sum()}
    for name, values in measured.items():
        found = (values if weights is None else values * weights).mean()
        assert float(found) == pytest.approx(float(exact[name]), rel=0.05), name
        if isinstance(config, GumbelTopKConfig):
            assert float(values.mean()) > 1.5 * float(exact[name])
    assert (weights is None) == (config == AncestralConfig(samples=16))


@pytest.mark.parametrize("samples", [4, 6, 9])
def test_weighed_draws_of_codes_measure_the_entropy(samples: int) -> None:
    """Of six ids; exactly, whatever was drawn, where nine were asked for."""
    ids = [[0, 0, 1], [0, 2, 0], [1, 1, 1], [1, 1, 2], [2, 0, 0], [2, 0, 2]]
    codes, number = Codes(torch.tensor(ids), (3, 3, 3)), 4000
    decoder = TinyDecoder(codes.sizes, seed=8, sharpness=0.2)
    context = decoder.contexts(1, seed=8)
    shares = list(exact_log_probs(decoder, context[0], codes.ids(), 1.0).values())
    config = GumbelTopKConfig(samples=samples)
    contexts, keys = context.expand(number, -1), torch.arange(number)
    found = generate(decoder, contexts, number, codes.trie, config, keys=keys)
    odds = draw_odds(config, found.sampling_log_probs, found.scores)
    weights = expectation_weights(found.log_probs, odds)
    assert weights is not None
    torch.testing.assert_close(weights.sum(1), found.valid.sum(1).float())
    each = _mean(-found.log_probs, weights, found.valid)
    exact = -sum(math.exp(share) * share for share in shares)
    assert float(each.mean()) == pytest.approx(exact, rel=0.05)
    if samples == 9:
        torch.testing.assert_close(each, torch.full_like(each, exact), rtol=1e-4, atol=1e-5)


def _mean(values: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    return (values.where(valid, 0.0) * weights).sum(1) / valid.sum(1)


def test_beams_and_a_nucleus_weigh_nothing() -> None:
    nothing = torch.zeros(1, 2)
    for config in (BeamConfig(), AncestralConfig(top_p=0.9), AncestralConfig()):
        assert draw_odds(config, nothing, nothing) is None
    assert expectation_weights(nothing, None) is None
