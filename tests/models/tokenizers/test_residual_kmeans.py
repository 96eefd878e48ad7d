"""Residual k-means against a loop, over shards, balanced, and with normalised residuals."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.tokenizers import ResidualKMeansConfig
from models.tokenizers.fit import fit_quantizer
from models.tokenizers.residual_kmeans import ResidualKMeans
from models.tokenizers.shards import LocalShards, take_codes
from tests.models.tokenizers.clouds import clouds

SETTINGS = [
    ResidualKMeansConfig(codebook_size=8, iterations=6),
    ResidualKMeansConfig(codebook_size=(6, 4, 3), iterations=6, normalize_residuals=True),
    ResidualKMeansConfig(codebook_size=8, iterations=4, balanced=True),
    ResidualKMeansConfig(
        num_levels=2, codebook_size=5, iterations=4, balanced=True, normalize_residuals=True
    ),
]


def fit(data: Tensor, config: ResidualKMeansConfig, shards: int = 1) -> tuple:
    where = LocalShards.of(data, shards)
    model = fit_quantizer(where, data.shape[1], config, seed=3)
    return model, torch.cat(where.map(take_codes))


def loop_encode(model: ResidualKMeans, row: Tensor) -> list[int]:
    """c_l = argmin ½‖r_l − e‖² + price; r_{l+1} = r_l − e."""
    residual, codes = row.double(), []
    for book, prices in zip(model.codebooks, model.prices, strict=True):
        if model.normalize:
            residual = residual / residual.norm().clamp(min=1e-6)
        far = [
            float((residual - book[k].double()).square().sum() / 2 + prices[k].double())
            for k in range(len(book))
        ]
        codes.append(min(range(len(book)), key=far.__getitem__))
        residual = residual - book[codes[-1]].double()
    return codes


@pytest.mark.parametrize("config", SETTINGS)
def test_encode_and_rank_equal_the_loop(config: ResidualKMeansConfig) -> None:
    data = clouds(120, 6, 9, seed=1)
    model, fitted = fit(data, config)
    codes = model.encode(data)
    assert codes.tolist() == [loop_encode(model, row) for row in data]
    assert codes.dtype == torch.int64 and codes.shape == (120, config.num_levels)
    if not config.balanced:
        assert torch.equal(codes, fitted)
    ranked = model.ranked_last_level(data, codes)
    assert torch.equal(ranked[:, 0], codes[:, -1])
    assert torch.equal(ranked.sort(1).values, torch.arange(ranked.shape[1]).expand_as(ranked))


@pytest.mark.parametrize("config", SETTINGS)
def test_shards_give_the_bits_of_one(config: ResidualKMeansConfig) -> None:
    data = clouds(700, 6, 9, seed=2)
    one, codes = fit(data, config)
    for count in (2, 5):
        many, same = fit(data, config, count)
        assert torch.equal(codes, same)
        for name, value in one.state_dict().items():
            assert torch.equal(value, many.state_dict()[name]), name


@pytest.mark.parametrize("config", SETTINGS)
def test_balanced_levels_have_equal_sizes(config: ResidualKMeansConfig) -> None:
    data = clouds(203, 5, 9, seed=3)
    model, codes = fit(data, config, 2)
    for level, size in enumerate(config.codebook_sizes):
        counts = torch.bincount(codes[:, level], minlength=size)
        even = set(counts.tolist()) <= {203 // size, -(-203 // size)}
        assert even == config.balanced
    if config.balanced:  # frozen prices keep what they were fitted to nearly even
        first = model.encode(data)[:, 0]
        assert (first == codes[:, 0]).float().mean() > 0.7


@given(cuts=st.lists(st.integers(0, 2500), max_size=4), seed=st.integers(0, 50))
@settings(max_examples=10)
def test_a_row_is_coded_alike_in_any_company(cuts: list[int], seed: int) -> None:
    data = clouds(2500, 7, 9, seed)
    model = ResidualKMeans(ResidualKMeansConfig(codebook_size=9), 7)
    for level, book in enumerate(model.codebooks):
        book.copy_(clouds(9, 7, 9, seed + level))
    bounds = [0, *sorted(cuts), 2500]
    codes = model.encode(data)
    parts = [model.encode(data[a:b]) for a, b in pairwise(bounds)]
    assert torch.equal(torch.cat(parts), codes)
    ranked = model.ranked_last_level(data, codes)
    parts = [model.ranked_last_level(data[a:b], codes[a:b]) for a, b in ((0, 3), (3, 2500))]
    assert torch.equal(torch.cat(parts), ranked)


def test_reconstruction_improves_with_levels() -> None:
    data = clouds(600, 8, 30, seed=4)
    errors = []
    for levels in (1, 2, 3):
        config = ResidualKMeansConfig(num_levels=levels, codebook_size=16, iterations=10)
        model, codes = fit(data, config)
        errors.append(float((model.decode(codes) - data).square().sum(1).mean()))
    assert errors[1] < 0.8 * errors[0] and errors[2] < 0.9 * errors[1]
    book = model.codebooks
    rebuilt = [sum(book[level][row[level]] for level in range(3)) for row in codes[:20]]
    torch.testing.assert_close(model.decode(codes[:20]), torch.stack(rebuilt))


def test_normalised_residuals_are_decoded_with_mean_lengths() -> None:
    data = clouds(400, 8, 30, seed=5) * 10
    config = ResidualKMeansConfig(codebook_size=16, normalize_residuals=True)
    model, codes = fit(data, config)
    torch.testing.assert_close(
        float(model.lengths[0]), float(data.norm(dim=1).mean()), rtol=1e-5, atol=0
    )
    one = codes[0].tolist()
    inner = model.codebooks[2][one[2]] * model.lengths[2]
    middle = (model.codebooks[1][one[1]] + inner) * model.lengths[1]
    expected = (model.codebooks[0][one[0]] + middle) * model.lengths[0]
    torch.testing.assert_close(model.decode(codes[:1])[0], expected)
    assert (model.decode(codes) - data).square().sum() < 0.5 * (data - data.mean(0)).square().sum()


def test_other_embeddings_are_refused_and_none_are_fine() -> None:
    model = ResidualKMeans(ResidualKMeansConfig(), 6)
    assert model.encode(torch.empty(0, 6)).shape == (0, 3)
    assert model.decode(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 6)
    for wrong in (torch.zeros(4, 5), torch.zeros(4, 6).double(), torch.zeros(6)):
        with pytest.raises(ValueError, match="embeddings of width 6"):
            model.encode(wrong)


def test_progress_counts_all_levels() -> None:
    seen: list[tuple[int, int]] = []
    config = ResidualKMeansConfig(num_levels=2, codebook_size=4, iterations=3, balanced=True)
    where = LocalShards.of(clouds(60, 4, 5, seed=6))
    fit_quantizer(where, 4, config, progress=lambda step, total, loss: seen.append((step, total)))
    assert seen == [(step, 8) for step in range(1, 9)]
