"""Sampling against exact enumeration on tiny catalogues, and independence of the batch."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from configs.generation import AncestralConfig, GenerationConfig, GumbelTopKConfig
from models.generation.noise import gumbels, sample_streams, uniforms
from models.generation.search import Generated, generate
from tests.models.generation.plain import Catalogue, TinyDecoder, exact_log_probs

CATALOGUE = Catalogue(
    torch.tensor([[0, 0, 1], [0, 2, 0], [1, 1, 1], [1, 1, 2], [2, 0, 0], [2, 0, 2], [0, 0, 1]]),
    (3, 3, 3),
)
DRAWS = 20_000


def draw(
    config: GenerationConfig, keys: Tensor, temperature: float = 1.0
) -> tuple[Generated, list]:
    """Ids of equal requests that differ in their keys, and exact probabilities by leaf."""
    decoder = TinyDecoder(CATALOGUE.sizes, seed=8, sharpness=0.2)
    context = decoder.contexts(1, seed=8)
    exact = exact_log_probs(decoder, context[0], CATALOGUE.ids(), temperature)
    contexts = context.expand(keys.numel(), -1)
    found = generate(decoder, contexts, keys.numel(), CATALOGUE.trie, config, keys=keys)
    return found, [math.exp(exact[codes]) for codes in CATALOGUE.ids()]


def assert_frequencies(observed: Tensor, expected: list[float], draws: int) -> None:
    for count, share in zip(observed.tolist(), expected, strict=True):
        deviation = (draws * share * (1 - share)) ** 0.5
        assert count == pytest.approx(draws * share, abs=5 * deviation + 5)  # + 5: rare events


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gumbel_top_k_draws_without_replacement(temperature: float) -> None:
    """Ordered triples have the probabilities of successive draws: p_i p_j/(1-p_i) …"""
    config = GumbelTopKConfig(samples=3, temperature=temperature)
    found, shares = draw(config, torch.arange(DRAWS), temperature)
    assert found.valid.all()
    triples = found.states @ torch.tensor([36, 6, 1])
    observed = torch.bincount(triples, minlength=216).view(6, 6, 6)
    for i, j, k in itertools.product(range(6), repeat=3):
        if len({i, j, k}) < 3:
            assert observed[i, j, k] == 0
    order = list(itertools.permutations(range(6), 3))
    expected = [
        shares[i] * shares[j] / (1 - shares[i]) * shares[k] / (1 - shares[i] - shares[j])
        for i, j, k in order
    ]
    assert_frequencies(torch.stack([observed[place] for place in order]), expected, DRAWS)
    included = torch.bincount(found.states.flatten(), minlength=6)
    inclusion = [
        sum(p for p, place in zip(expected, order, strict=True) if leaf in place)
        for leaf in range(6)
    ]
    assert_frequencies(included, inclusion, DRAWS)


def test_gumbel_scores_are_gumbel_variables_of_their_ids() -> None:
    """With all ids drawn, score - log p of each is standard Gumbel: mean γ, variance π²/6."""
    found, shares = draw(GumbelTopKConfig(samples=6), torch.arange(DRAWS) + 10**6)
    assert torch.equal(found.states.sort(dim=1).values, torch.arange(6).expand(DRAWS, -1))
    log_shares = torch.tensor(shares).log()
    torch.testing.assert_close(found.log_probs, log_shares[found.states], rtol=1e-4, atol=1e-5)
    noise = found.scores - found.sampling_log_probs
    by_leaf = torch.zeros_like(noise).scatter(1, found.states, noise).double()
    spread = (math.pi**2 / 6) ** 0.5
    assert by_leaf.mean(0).tolist() == pytest.approx([0.5772157] * 6, abs=5 * spread / DRAWS**0.5)
    assert by_leaf.var(0).tolist() == pytest.approx([spread**2] * 6, rel=0.08)
    correlation = torch.corrcoef(by_leaf.T) - torch.eye(6)
    assert correlation.abs().max() < 5 / DRAWS**0.5


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ancestral_frequencies(temperature: float) -> None:
    config = AncestralConfig(samples=4, temperature=temperature)
    found, shares = draw(config, torch.arange(DRAWS // 4), temperature)
    assert found.valid.all()
    assert_frequencies(torch.bincount(found.states.flatten(), minlength=6), shares, DRAWS)
    first = torch.bincount(found.states[:, 0] * 6 + found.states[:, 1], minlength=36)
    pairs = [p * q for p, q in itertools.product(shares, shares)]
    assert_frequencies(first, pairs, DRAWS // 4)
    torch.testing.assert_close(
        found.sampling_log_probs, torch.tensor(shares).log()[found.states], rtol=1e-4, atol=1e-5
    )


def test_top_p_draws_among_the_fewest_codes_that_hold_it() -> None:
    decoder = TinyDecoder((4,), seed=0)
    context = torch.zeros(1, 6)
    decoder.head = [torch.zeros(6, 4)]
    probabilities = torch.tensor([0.1, 0.45, 0.25, 0.2])
    decoder.step = lambda *_: probabilities.log().expand(1, 1, 4)  # type: ignore[method-assign]
    trie = Catalogue(torch.arange(4)[:, None], (4,)).trie
    for top_p, kept in ((0.4, {1}), (0.5, {1, 2}), (0.75, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        config = AncestralConfig(samples=2000, top_p=top_p)
        found = generate(decoder, context, 1, trie, config, keys=torch.tensor([9]))
        assert set(found.states.flatten().tolist()) == kept
        shares = torch.where(torch.tensor([leaf in kept for leaf in range(4)]), probabilities, 0.0)
        shares = shares / shares.sum()
        torch.testing.assert_close(found.sampling_log_probs, shares.log()[found.states])
        torch.testing.assert_close(found.log_probs, probabilities.log()[found.states])


@pytest.mark.parametrize("config", [GumbelTopKConfig(samples=4), AncestralConfig(samples=4)])
def test_draws_are_a_function_of_the_key_alone(config: GenerationConfig) -> None:
    keys = torch.tensor([5, -3, 5, 2**62])
    together, _ = draw(config, keys)
    assert torch.equal(together.codes[0], together.codes[2])
    for row in range(4):
        alone, _ = draw(config, keys[row : row + 1])
        assert torch.equal(alone.codes[0], together.codes[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row])
    again, _ = draw(config, keys + 1)
    assert not torch.equal(again.codes, together.codes)


def test_more_samples_keep_the_first_ones() -> None:
    few, _ = draw(AncestralConfig(samples=3), torch.arange(50))
    many, _ = draw(AncestralConfig(samples=8), torch.arange(50))
    assert torch.equal(few.codes, many.codes[:, :3])
    few, _ = draw(GumbelTopKConfig(samples=2), torch.arange(50))
    many, _ = draw(GumbelTopKConfig(samples=5), torch.arange(50))
    assert torch.equal(few.codes, many.codes[:, :2])


def test_noise_is_uniform_gumbel_and_finite() -> None:
    streams = sample_streams(torch.arange(200), 50)[..., None]
    values = uniforms(streams, torch.arange(20))
    assert values.min() > 0 and values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / values.numel()) ** 0.5)
    for left, right in ((values[1:], values[:-1]), (values[..., 1:], values[..., :-1])):
        pair = torch.stack([left.flatten(), right.flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() < 5 / pair.shape[1] ** 0.5
    noise = gumbels(streams, torch.arange(20))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=5 * 1.2825 / noise.numel() ** 0.5)
