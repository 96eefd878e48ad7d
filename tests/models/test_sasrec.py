"""SASRec against loops, and the properties that it shares with every sequence model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from configs.models import SASRecConfig
from models.base import TableSpec
from models.batch import JaggedBatch
from models.layers.transformer_block import TransformerBlock
from models.sasrec import SASRec
from tests.models.sequences import make_batch, take, tokens_of

NUM_ITEMS, MAX_LENGTH = 50, 20
CONFIG = SASRecConfig(width=8, num_layers=2, num_heads=2, feedforward_width=12, dropout=0.3)


def build(config: SASRecConfig = CONFIG) -> SASRec:
    torch.manual_seed(0)
    model = SASRec(config, (TableSpec("item", NUM_ITEMS + 1, config.width, 0.02),), MAX_LENGTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model


def table() -> Tensor:
    rows = torch.randn(NUM_ITEMS + 1, 8, generator=torch.Generator().manual_seed(1))
    rows[0] = 0
    return rows


def query(model: SASRec, batch: JaggedBatch, step_seed: int = 0) -> Tensor:
    return model(batch, {"item": table()[batch.item_ids]}, step_seed)


def norm(layer: nn.LayerNorm, row: Tensor) -> Tensor:
    centred = row - row.mean()
    scaled = centred / torch.sqrt((centred**2).mean() + layer.eps)
    return scaled * layer.weight.double() + layer.bias.double()


def linear(layer: nn.Linear, row: Tensor) -> Tensor:
    return layer.weight.double() @ row + layer.bias.double()


def block_by_loops(block: TransformerBlock, x: list[Tensor]) -> list[Tensor]:
    """One layer over one sequence, position by position and head by head, in float64."""
    width, heads = CONFIG.width, CONFIG.num_heads
    inner = width // heads
    projected = [linear(block.qkv, norm(block.attention_norm, row)) for row in x]
    out = []
    for i, row in enumerate(x):
        attended = []
        for head in range(heads):
            own = slice(head * inner, (head + 1) * inner)
            q = projected[i][:width][own]
            logits = [q @ p[width : 2 * width][own] / math.sqrt(inner) for p in projected[: i + 1]]
            weights = [math.exp(float(logit)) for logit in logits]
            values = [p[2 * width :][own] for p in projected[: i + 1]]
            mixed = sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros(inner))
            attended.append(mixed / sum(weights))
        row = row + linear(block.output, torch.cat(attended))
        hidden = linear(block.expand, norm(block.feedforward_norm, row)).clamp(min=0)
        out.append(row + linear(block.contract, hidden))
    return out


@pytest.mark.parametrize("normalize", [True, False])
def test_model_equals_loops(normalize: bool) -> None:
    model = build(CONFIG.model_copy(update={"normalize": normalize})).eval()
    batch = make_batch([7, 0, 1, 12], NUM_ITEMS)
    actual = query(model, batch)
    with torch.no_grad():
        for b in range(batch.num_sequences):
            rows = table()[tokens_of(batch, batch.item_ids, b)].double() * math.sqrt(8)
            rows = rows + model.sequence_input.positions[: len(rows)].double()
            x = list(rows)
            for block in model.blocks:
                assert isinstance(block, TransformerBlock)
                x = block_by_loops(block, x)
            x = [norm(model.final_norm, row) for row in x]
            if normalize:
                x = [row / row.norm() for row in x]
            got = tokens_of(batch, actual, b)
            expected = torch.stack(x).float() if x else got
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@given(
    lengths=st.lists(st.integers(0, MAX_LENGTH), min_size=1, max_size=6),
    training=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=25)
def test_a_sequence_does_not_see_its_batch(
    lengths: list[int], training: bool, data: st.DataObject
) -> None:
    model = build().train(training)
    batch = make_batch(lengths, NUM_ITEMS)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    whole, part = query(model, batch, 9), query(model, take(batch, chosen), 9)
    expected = [tokens_of(batch, whole, b) for b in chosen]
    torch.testing.assert_close(part, torch.cat([whole[:0], *expected]), atol=2e-6, rtol=0)


def test_future_events_are_not_seen() -> None:
    model, batch = build().eval(), make_batch([10], NUM_ITEMS)
    before = query(model, batch)
    batch.item_ids[6:] = batch.item_ids[6:] % NUM_ITEMS + 1
    after = query(model, batch)
    torch.testing.assert_close(before[:6], after[:6], atol=1e-6, rtol=0)
    assert (before[6:] - after[6:]).abs().amax(dim=1).min() > 1e-3


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_without_data_every_parameter_takes_part(lengths: list[int]) -> None:
    model = build().train()
    queries = query(model, make_batch(lengths, NUM_ITEMS))
    assert queries.shape == (0, 8)
    queries.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_every_dropout_site_has_its_own_mask() -> None:
    salts = [build().sequence_input.salt]
    for block in build().blocks:
        assert isinstance(block, TransformerBlock)
        salts += [block.salt, block.salt + 1, block.salt + 2]
    assert len(set(salts)) == len(salts) == 1 + 3 * CONFIG.num_layers


def test_longest_sequence_fits_and_a_longer_one_is_refused() -> None:
    model = build().eval()
    assert query(model, make_batch([MAX_LENGTH], NUM_ITEMS)).isfinite().all()
    with pytest.raises(ValueError, match=r"max_length"):
        query(model, make_batch([MAX_LENGTH + 1], NUM_ITEMS))


def test_keys_follow_normalize() -> None:
    assert torch.equal(
        build(CONFIG.model_copy(update={"normalize": False})).item_keys(table()), table()
    )
    torch.testing.assert_close(build().item_keys(table())[1:].norm(dim=-1), torch.ones(NUM_ITEMS))


def test_flops_count_the_products() -> None:
    model, lengths = build().eval(), [3, 17, 1, 9]
    batch = make_batch(lengths, NUM_ITEMS)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        query(model, batch)
    counts = counter.get_flop_counts()["Global"]
    projections = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    pairs = sum(i + 1 for length in lengths for i in range(length))
    total = projections + CONFIG.num_layers * pairs * 2 * 2 * CONFIG.width
    mean_length = sum(n * n for n in lengths) / sum(lengths)
    assert model.flops_per_token(mean_length) * sum(lengths) == pytest.approx(total)
