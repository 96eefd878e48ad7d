"""HSTU against loops written from algorithms' formula, and what a sequence model must never do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from configs.models import HSTUConfig
from models.base import TableSpec
from models.batch import JaggedBatch
from models.hstu import HSTU
from models.layers.hstu_block import HSTUBlock
from tests.models.sequences import make_batch, take, tokens_of

NUM_ITEMS, MAX_LENGTH = 50, 20
CONFIG = HSTUConfig(
    width=8, num_layers=2, num_heads=2, qk_width=4, v_width=3, dropout=0.3, attention_slack=3
)


def build(config: HSTUConfig = CONFIG, seed: int = 0) -> HSTU:
    torch.manual_seed(seed)
    names = ["item", *(f"user_{n}" for n in config.user_features)]
    names += [f"side_{n}" for n in config.side_features]
    specs = tuple(TableSpec(name, NUM_ITEMS + 1, config.width, 0.02) for name in names)
    model = HSTU(config, specs, MAX_LENGTH)
    with torch.no_grad():  # large weights, so that no term is too small to be seen missing
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model


def table(width: int = CONFIG.width, seed: int = 0) -> Tensor:
    rows = torch.randn(NUM_ITEMS + 1, width, generator=torch.Generator().manual_seed(seed))
    rows[0] = 0
    return rows


def query(model: HSTU, batch: JaggedBatch, step_seed: int = 0) -> Tensor:
    ids = model.input_ids(batch)
    embeddings = {name: table(seed=n)[ids[name]] for n, name in enumerate(ids)}
    return model(batch, embeddings, step_seed)


def plain_norm(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    variance = sum((x - mean) ** 2 for x in row) / len(row)
    return [(x - mean) / math.sqrt(variance + 1e-6) for x in row]


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def times(row: list[float], matrix: list[list[float]]) -> list[float]:
    return [
        sum(x * line[c] for x, line in zip(row, matrix, strict=True)) for c in range(len(matrix[0]))
    ]


def block_by_loops(
    block: HSTUBlock, x: list[list[float]], ts: list[int], following: list[int]
) -> list[list[float]]:
    """One layer over one sequence, number by number, in Python's float64."""
    heads, qk, v = CONFIG.num_heads, CONFIG.qk_width, CONFIG.v_width
    matrix, limit = block.uvqk.double().tolist(), block.max_length
    position, time = block.position_bias.double().tolist(), block.time_bias.double().tolist()
    projected = [[silu(y) for y in times(plain_norm(row), matrix)] for row in x]
    starts = {"u": 0, "v": heads * v, "q": 2 * heads * v, "k": 2 * heads * v + heads * qk}
    out = []
    for i, row in enumerate(x):
        attended = [0.0] * (heads * v)
        for head in range(heads):
            for j in range(i + 1):
                product = sum(
                    projected[i][starts["q"] + head * qk + c]
                    * projected[j][starts["k"] + head * qk + c]
                    for c in range(qk)
                )
                elapsed = max(abs(following[i] - ts[j]), 1)
                bucket = min(max(math.floor(math.log(elapsed) / 0.301), 0), 128)
                weight = silu(product + position[j - i + limit - 1] + time[bucket]) / limit
                for c in range(v):
                    attended[head * v + c] += weight * projected[j][starts["v"] + head * v + c]
        gated = [u * o for u, o in zip(projected[i], plain_norm(attended), strict=False)]
        turned = times(gated, block.output.weight.double().T.tolist())
        bias = block.output.bias.double().tolist()
        out.append([a + b + c for a, b, c in zip(turned, bias, row, strict=True)])
    return out


def test_model_equals_loops() -> None:
    model = build().eval()
    batch = make_batch([7, 0, 1, 12], NUM_ITEMS)
    actual = query(model, batch)
    for b in range(batch.num_sequences):
        ts, following, ids = (
            tokens_of(batch, x, b).tolist()
            for x in (batch.timestamps, batch.next_timestamps, batch.item_ids)
        )
        positions = model.sequence_input.positions.double().tolist()
        x = [
            [e * math.sqrt(8) + p for e, p in zip(table()[i].tolist(), positions[t], strict=True)]
            for t, i in enumerate(ids)
        ]
        for block in model.blocks:
            assert isinstance(block, HSTUBlock)
            x = block_by_loops(block, x, ts, following)
        norms = [max(math.sqrt(sum(e * e for e in row)), 1e-6) for row in x]
        expected = [[e / n for e in row] for row, n in zip(x, norms, strict=True)]
        got = tokens_of(batch, actual, b)
        torch.testing.assert_close(got, torch.tensor(expected).view(got.shape), atol=3e-6, rtol=0)


@given(
    lengths=st.lists(st.integers(0, MAX_LENGTH), min_size=1, max_size=6),
    training=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=25)
def test_a_sequence_does_not_see_its_batch(
    lengths: list[int], training: bool, data: st.DataObject
) -> None:
    """Queries, dropout included, depend on the sequence alone, in any order and micro batch."""
    model = build().train(training)
    batch = make_batch(lengths, NUM_ITEMS)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    whole, part = query(model, batch, 9), query(model, take(batch, chosen), 9)
    expected = [tokens_of(batch, whole, b) for b in chosen]
    torch.testing.assert_close(part, torch.cat([whole[:0], *expected]), atol=1e-6, rtol=0)


def test_dropout_follows_the_step_and_stops_in_evaluation() -> None:
    model, batch = build(), make_batch([15, 15], NUM_ITEMS)
    model.train()
    assert torch.equal(query(model, batch, 1), query(model, batch, 1))
    assert (query(model, batch, 1) - query(model, batch, 2)).abs().max() > 0.01
    model.eval()
    assert torch.equal(query(model, batch, 1), query(model, batch, 2))


def test_future_events_are_not_seen() -> None:
    model, batch = build().eval(), make_batch([10], NUM_ITEMS)
    before = query(model, batch)
    batch.item_ids[6:] = batch.item_ids[6:] % NUM_ITEMS + 1
    batch.timestamps[6:] += 10**7
    batch.next_timestamps[6:] += 10**7
    after = query(model, batch)
    assert torch.equal(before[:6], after[:6])
    assert (before[6:] - after[6:]).abs().amax(dim=1).min() > 1e-3


def test_the_request_time_is_seen() -> None:
    model, batch = build().eval(), make_batch([10], NUM_ITEMS)
    before = query(model, batch)
    batch.next_timestamps[9] += 10**7
    after = query(model, batch)
    assert torch.equal(before[:9], after[:9])
    assert (before[9] - after[9]).abs().max() > 1e-4


def test_features_are_added_at_their_places() -> None:
    """A model with features equals one without whose item rows hold the sum."""
    config = CONFIG.model_copy(update={"user_features": ("age",), "side_features": ("device",)})
    featured, plain = build(config).eval(), build().eval()
    plain.load_state_dict(featured.state_dict())
    batch = make_batch([4, 0, 6], NUM_ITEMS, user_features={"age": 5}, side_features={"device": 7})
    assert list(featured.input_ids(batch)) == ["item", "user_age", "side_device"]
    ages = torch.repeat_interleave(batch.user_features["age"], batch.lengths)
    rows = table(seed=0)[batch.item_ids] + table(seed=1)[ages]
    rows = rows + table(seed=2)[batch.side_features["device"]]
    torch.testing.assert_close(query(featured, batch), plain(batch, {"item": rows}, 0))


def test_a_feature_that_the_data_lack_is_named() -> None:
    config = CONFIG.model_copy(update={"user_features": ("age",)})
    with pytest.raises(ValueError, match="user_age"):
        build(config).input_ids(make_batch([3], NUM_ITEMS))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_without_data_every_parameter_takes_part(lengths: list[int]) -> None:
    model = build().train()
    queries = query(model, make_batch(lengths, NUM_ITEMS))
    assert queries.shape == (0, 8)
    queries.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_every_parameter_learns() -> None:
    model = build().train()
    (query(model, make_batch([9, 14], NUM_ITEMS)) @ torch.randn(8)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_longest_sequence_fits_and_a_longer_one_is_refused() -> None:
    model = build().eval()
    assert query(model, make_batch([MAX_LENGTH + 3], NUM_ITEMS)).isfinite().all()
    with pytest.raises(ValueError, match=r"max_length"):
        query(model, make_batch([MAX_LENGTH + 4], NUM_ITEMS))


def test_bfloat16_is_near_float32() -> None:
    model, batch = build().eval(), make_batch([12, 5], NUM_ITEMS)
    exact = query(model, batch)
    rough = query(model.bfloat16(), batch)
    assert rough.dtype == torch.float32
    assert ((exact * rough).sum(-1) > 0.99).all()


def test_queries_and_keys_have_unit_length() -> None:
    model, batch = build().eval(), make_batch([12, 5], NUM_ITEMS)
    torch.testing.assert_close(query(model, batch).norm(dim=-1), torch.ones(17))
    keys = model.item_keys(table())
    torch.testing.assert_close(keys[1:].norm(dim=-1), torch.ones(NUM_ITEMS))
    assert not keys[0].any()


def test_flops_count_the_products() -> None:
    """Against a counter of matrix products, and pairs of attention counted one by one."""
    model, lengths = build().eval(), [3, 17, 1, 9]
    batch = make_batch(lengths, NUM_ITEMS)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        query(model, batch)
    counts = counter.get_flop_counts()["Global"]
    projections = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    pairs = sum(i + 1 for length in lengths for i in range(length))
    per_pair = 2 * CONFIG.num_heads * (CONFIG.qk_width + CONFIG.v_width)
    total = projections + CONFIG.num_layers * pairs * per_pair
    mean_length = sum(n * n for n in lengths) / sum(lengths)
    assert model.flops_per_token(mean_length) * sum(lengths) == pytest.approx(total)
