"""Items are sampled from the policy's own softmax, whatever the strategy."""

import torch

from configs.generation import AncestralConfig, BeamConfig, GumbelTopKConfig
from sharding.process_group import DistributedContext
from sharding.retrieval import Catalogue
from trainer.rollout import sample_items

ALONE = DistributedContext(0, 1, torch.device("cpu"))
KEYS = torch.tensor([[0.5], [-1.0], [2.0], [0.0]])


def catalogue() -> Catalogue:
    return Catalogue.from_keys(ALONE, lambda ids: KEYS[ids - 1], len(KEYS), 64)


def test_beams_are_the_best() -> None:
    items = sample_items(
        catalogue(), torch.tensor([[1.0], [-1.0]]), torch.arange(2), BeamConfig(beams=5), 0.1
    )
    assert items.tolist() == [[3, 1, 4, 2, 0], [2, 4, 1, 3, 0]]


def test_samples_follow_policy_and_generation_temperature() -> None:
    """χ² with 3 degrees of freedom; 1 in 10^5 exceeds 25.9."""
    users, samples = 500, 40
    queries, keys = torch.ones(users, 1), torch.arange(users) * 13
    config = AncestralConfig(samples=samples, temperature=2.0)
    items = sample_items(catalogue(), queries, keys, config, 0.6)
    assert items.shape == (users, samples)
    expected = users * samples * (KEYS[:, 0] / 1.2).softmax(0)
    counts = torch.bincount(items.flatten() - 1, minlength=4)
    assert float(((counts - expected).square() / expected).sum()) < 25.9
    repeats = (items[:, 1:] == items[:, :1]).float().mean()
    collision = (KEYS[:, 0] / 1.2).softmax(0).square().sum()
    assert abs(float(repeats - collision)) < 0.03  # samples of a user are independent
    few = sample_items(catalogue(), queries, keys, AncestralConfig(samples=3, temperature=2.0), 0.6)
    assert torch.equal(few, items[:, :3])


def test_gumbel_top_k_repeats_nothing() -> None:
    queries, keys = torch.ones(50, 1), torch.arange(50)
    items = sample_items(catalogue(), queries, keys, GumbelTopKConfig(samples=3), 1.0)
    assert all(len(set(row)) == 3 for row in items.tolist())
