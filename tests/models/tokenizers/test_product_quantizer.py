"""Product quantization against a loop; the rotation of OPQ."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from configs.tokenizers import ProductQuantizerConfig
from models.tokenizers.fit import fit_quantizer
from models.tokenizers.product_quantizer import ProductQuantizer
from models.tokenizers.shards import LocalShards, take_codes
from tests.models.tokenizers.clouds import clouds

PLAIN = ProductQuantizerConfig(num_levels=4, codebook_size=8, rotation=False, iterations=10)
TURNED = PLAIN.model_copy(update={"rotation": True, "rotation_rounds": 20})


def correlated(rows: int, seed: int) -> Tensor:
    """Points whose spread lies in few directions, across the slices."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    spread = torch.tensor([5.0, 4.0, 3.0, 2.0, 0.1, 0.1, 0.1, 0.1])
    return (torch.randn(rows, 8, generator=generator) * spread) @ turn


def error(data: Tensor, config: ProductQuantizerConfig) -> float:
    model = fit_quantizer(LocalShards.of(data), 8, config)
    return float((model.decode(model.encode(data)) - data).square().sum(1).mean())


@pytest.mark.parametrize("config", [PLAIN, TURNED])
def test_encode_decode_and_rank_equal_the_loop(config: ProductQuantizerConfig) -> None:
    data = clouds(200, 8, 20, seed=1)
    model = fit_quantizer(LocalShards.of(data), 8, config)
    assert isinstance(model, ProductQuantizer) and not model.ordered
    codes = model.encode(data)
    for row, digits in zip(data[:30], codes.tolist(), strict=False):
        turned, pieces = row @ model.rotation, []
        for digit, book in enumerate(model.codebooks):
            part = turned[2 * digit : 2 * digit + 2]
            far = [float((part - e).square().sum()) for e in book]
            assert digits[digit] == min(range(8), key=far.__getitem__)
            pieces.append(book[digits[digit]])
        rebuilt = model.decode(torch.tensor([digits]))[0]
        torch.testing.assert_close(rebuilt, torch.cat(pieces) @ model.rotation.T)
    ranked = model.ranked_last_level(data, codes)
    assert torch.equal(ranked[:, 0], codes[:, -1])
    assert ranked.sort(1).values.tolist() == [list(range(8))] * 200


def test_the_rotation_is_orthogonal_and_pays() -> None:
    data = correlated(800, seed=2)
    model = fit_quantizer(LocalShards.of(data), 8, TURNED)
    rotation = model.state_dict()["rotation"].double()
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(8).double(), atol=1e-6, rtol=0)
    assert (rotation - torch.eye(8)).abs().max() > 0.1
    assert error(data, TURNED) < 0.9 * error(data, PLAIN)


def test_the_rotation_has_settled_by_default() -> None:
    """Where the start is poor: coordinates in the order of their variance."""
    generator = torch.Generator().manual_seed(5)
    data = torch.randn(600, 32, generator=generator) * 0.85 ** torch.arange(32)
    config = ProductQuantizerConfig(num_levels=8, codebook_size=16, iterations=10)

    def lost(rounds: int) -> float:
        chosen = config.model_copy(update={"rotation_rounds": rounds})
        model = fit_quantizer(LocalShards.of(data), 32, chosen)
        return float((model.decode(model.encode(data)) - data).square().sum())

    assert lost(config.rotation_rounds) < 0.6 * lost(20)


def test_no_alternation_raises_the_error() -> None:
    losses: list[float] = []
    fit_quantizer(
        LocalShards.of(correlated(500, seed=3)), 8, TURNED,
        progress=lambda step, total, loss: losses.append(loss),
    )  # fmt: skip
    rounds = losses[: TURNED.rotation_rounds]
    assert len(rounds) == 20 and rounds[-1] < rounds[0]
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(rounds))


@pytest.mark.parametrize("config", [PLAIN, TURNED])
def test_shards_give_the_bits_of_one(config: ProductQuantizerConfig) -> None:
    data = clouds(900, 8, 20, seed=4)
    one = LocalShards.of(data)
    first = fit_quantizer(one, 8, config)
    codes = one.map(take_codes)[0]
    assert torch.equal(codes, first.encode(data))
    assert torch.equal(torch.cat([first.encode(data[:7]), first.encode(data[7:])]), codes)
    many = LocalShards.of(data, 3)
    second = fit_quantizer(many, 8, config)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert torch.equal(torch.cat(many.map(take_codes)), codes)
    assert all(shard.work is shard.rows for shard in many.shards)


def test_uneven_slices_are_refused() -> None:
    with pytest.raises(ValueError, match="width 9 cannot be cut into num_levels=4"):
        fit_quantizer(LocalShards.of(torch.randn(50, 9)), 9, PLAIN)
