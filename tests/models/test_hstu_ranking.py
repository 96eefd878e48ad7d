"""HSTU ranking against loops over tokens written from algorithms §2, and what it must never do."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from configs.models import HSTURankingConfig
from models.base import TableSpec
from models.batch import JaggedBatch
from models.hstu_ranking import HSTURanking
from models.layers.stu_block import STUBlock
from models.layers.swish_mlp import SwishMLP
from models.ops.hstu_attention import TIME_THRESHOLDS
from tests.models.sequences import make_batch, take

ITEMS, MAX_LENGTH, LABELS, TASKS = 50, 9, 3, 2
CONFIG = HSTURankingConfig(
    width=8,
    num_layers=2,
    num_heads=2,
    qk_width=4,
    v_width=3,
    dropout=0.3,
    mlp_width=10,
    action_width=5,
    head_width=16,
    user_features=("age", "place"),
    side_features=("tab",),
)


def build(config: HSTURankingConfig = CONFIG, p_score: bool = False) -> HSTURanking:
    torch.manual_seed(0)
    names = ["item", *(f"user_{n}" for n in config.user_features)]
    names += [f"side_{n}" for n in config.side_features]
    specs = tuple(TableSpec(name, ITEMS + 1, config.width, 0.02) for name in names)
    model = HSTURanking(config, specs, MAX_LENGTH, LABELS, TASKS, p_score)
    with torch.no_grad():  # large weights, so that no term is too small to be seen missing
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model.double()


def table(seed: int = 0, width: int = CONFIG.width) -> Tensor:
    rows = torch.randn(ITEMS + 1, width, generator=torch.Generator().manual_seed(seed)).double()
    rows[0] = 0
    return rows


def batch_of(lengths: list[int], seed: int = 0) -> JaggedBatch:
    batch = make_batch(lengths, ITEMS, seed, 1.0, {"age": 5, "place": 4}, {"tab": 4})
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2**LABELS, (batch.num_tokens,), generator=draw)
    return replace(batch, labels=labels)


def logits(
    model: HSTURanking, batch: JaggedBatch, candidates: Tensor, longest: int, step_seed: int = 0
) -> Tensor:
    ids = model.input_ids(batch)
    embeddings = {name: table(n)[ids[name]] for n, name in enumerate(ids)}
    return model(batch, embeddings, table()[candidates], longest, step_seed)


# -- the reference ----------------------------------------------------------------------------


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-6) * layer.weight + layer.bias


def mlp(layer: SwishMLP, x: Tensor) -> Tensor:
    inner = layer.first.weight @ x + layer.first.bias
    inner = inner * torch.sigmoid(norm(layer.swish.norm, inner))
    return norm(layer.norm, layer.second.weight @ inner + layer.second.bias)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def bucket(seconds: int) -> int:
    return sum(max(abs(seconds), 1) >= threshold for threshold in TIME_THRESHOLDS)


def block_by_loops(block: STUBlock, tokens: list[Tensor], sees: list[list[bool]]) -> list[Tensor]:
    heads, qk, dv = CONFIG.num_heads, CONFIG.qk_width, CONFIG.v_width
    projected = [block.uvqk.weight @ norm(block.norm, x) + block.uvqk.bias for x in tokens]
    parts = [p.split([heads * dv, heads * dv, heads * qk, heads * qk]) for p in projected]
    divisor = len(CONFIG.user_features) + MAX_LENGTH + 1
    out = []
    for i, x in enumerate(tokens):
        attended = torch.zeros(heads * dv).double()
        for head in range(heads):
            own_q = parts[i][2][head * qk : (head + 1) * qk]
            for j in range(len(tokens)):
                if sees[i][j]:
                    product = (own_q * parts[j][3][head * qk : (head + 1) * qk]).sum()
                    weight = silu(product / math.sqrt(qk)) / divisor
                    value = parts[j][1][head * dv : (head + 1) * dv]
                    attended[head * dv : (head + 1) * dv] += weight * value
        u = silu(parts[i][0])
        joined = torch.cat([u, attended, u * norm(block.attended_norm, attended)])
        out.append(block.output.weight @ joined + block.output.bias + x)
    return out


def by_loops(model: HSTURanking, batch: JaggedBatch, b: int, candidates: list[int]) -> Tensor:
    """Logits [G, K] of one request: every token in one list, with one mask."""
    root = math.sqrt(CONFIG.width)
    start, stop = batch.offsets[b : b + 2].tolist()
    tables = [table(n) for n in range(4)]  # item, age, place, tab
    context = [
        root * mlp(model.context[n], tables[1 + n][batch.user_features[name][b]])
        for n, name in enumerate(CONFIG.user_features)
    ]
    history = []
    for t in range(start, stop):
        row = tables[0][batch.item_ids[t]] + tables[3][batch.side_features["tab"][t]]
        mask = int(batch.labels[t])  # type: ignore[index]
        bits = [model.action_rows.weight[:, a] for a in range(LABELS) if mask >> a & 1]
        done = mlp(model.actions, sum(bits, torch.zeros(CONFIG.action_width).double()))
        gap = int(batch.next_timestamps[stop - 1] - batch.timestamps[t])
        place = model.positions.weight[stop - t] + model.elapsed.weight[bucket(gap)]
        history.append(root * (mlp(model.content, row) + done) + place)
    now = model.positions.weight[0] + model.elapsed.weight[0]
    asked = [
        root * (mlp(model.content, tables[0][c]) + model.placeholder) + now for c in candidates
    ]
    tokens = [*context, *history, *asked]
    first, behind = len(context), len(context) + len(history)

    def seen(i: int, j: int) -> bool:
        if j >= behind:
            return i == j
        return i >= behind or i < first or j <= i

    sees = [[seen(i, j) for j in range(len(tokens))] for i in range(len(tokens))]
    for block in model.blocks:
        tokens = block_by_loops(block, tokens, sees)
    rows = []
    for out, item in zip(tokens[behind:], candidates, strict=True):
        both = norm(model.output_norm, out) * mlp(model.item_side, tables[0][item])
        linear, swish = model.head.hidden
        inner = linear.weight @ both + linear.bias
        inner = inner * torch.sigmoid(norm(swish.norm, inner))
        rows.append(model.head.tasks.weight @ inner + model.head.tasks.bias)
    return torch.stack(rows)


def test_every_logit_is_that_of_the_loops() -> None:
    model, lengths = build().eval(), [4, 0, 1, MAX_LENGTH]
    batch = batch_of(lengths)
    candidates = torch.randint(1, ITEMS + 1, (4, 3), generator=torch.Generator().manual_seed(1))
    found = logits(model, batch, candidates, MAX_LENGTH + 2)
    for b in range(len(lengths)):
        expected = by_loops(model, batch, b, candidates[b].tolist())
        torch.testing.assert_close(found[b], expected.float(), rtol=1e-5, atol=1e-5)
    assert found.std() > 0.3


def test_the_p_score_is_fed_by_every_tower() -> None:
    model = build(p_score=True).eval()
    batch, candidates = batch_of([5]), torch.tensor([[3, 4]])
    found = logits(model, batch, candidates, 5)
    assert found.shape == (1, 2, TASKS + 1)
    head = model.head
    x = torch.randn(CONFIG.width).double()
    shared = head.hidden[0].weight @ x + head.hidden[0].bias
    shared = shared * torch.sigmoid(norm(head.hidden[1].norm, shared))
    towers = silu(head.towers.weight @ shared + head.towers.bias)
    own = towers.split(len(towers) // TASKS)
    logit = [(own[k] * head.task_weight[k]).sum() + head.task_bias[k] for k in range(TASKS)]
    inner = head.joined[0].weight @ torch.cat([towers, shared]) + head.joined[0].bias
    inner = inner * torch.sigmoid(norm(head.joined[1].norm, inner))
    expected = torch.stack([*logit, (head.score.weight @ inner + head.score.bias)[0]])
    torch.testing.assert_close(head(x), expected)


@given(st.lists(st.integers(0, MAX_LENGTH), min_size=1, max_size=4), st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_neither_batch_nor_padding_nor_other_candidates_change_a_score(
    lengths: list[int], more: int
) -> None:
    model, batch = build().eval(), batch_of(lengths)
    candidates = torch.randint(1, ITEMS + 1, (len(lengths), 4))
    together = logits(model, batch, candidates, max(*lengths, 1) + more)
    for b, length in enumerate(lengths):
        alone = replace(take(batch, [b]), labels=batch.labels[batch.offsets[b] :][:length])  # type: ignore[index]
        few = logits(model, alone, candidates[b : b + 1, 1:3], max(length, 1))
        torch.testing.assert_close(few[0], together[b, 1:3], rtol=1e-6, atol=1e-6)


def test_dropout_depends_on_sample_and_place_alone() -> None:
    model, batch = build().train(), batch_of([4, 7])
    candidates = torch.tensor([[1, 2], [3, 4]])
    first = logits(model, batch, candidates, 7, step_seed=5)
    wide = logits(model, batch, candidates, 9, step_seed=5)
    torch.testing.assert_close(first, wide, rtol=1e-6, atol=1e-6)
    alone = replace(take(batch, [1]), labels=batch.labels[4:])  # type: ignore[index]
    torch.testing.assert_close(logits(model, alone, candidates[1:], 7, 5)[0], first[1])
    assert (first - logits(model, batch, candidates, 7, step_seed=6)).abs().max() > 1e-3
    assert (first - logits(model.eval(), batch, candidates, 7)).abs().max() > 1e-3


def test_what_users_did_and_when_they_ask_matter() -> None:
    model, batch = build().eval(), batch_of([6])
    candidates = torch.tensor([[1, 2, 3]])
    before = logits(model, batch, candidates, 6)
    assert batch.labels is not None
    later = batch.next_timestamps.clone()
    later[-1] += 10_000_000
    for changed in (
        replace(batch, labels=batch.labels ^ 1),
        replace(batch, next_timestamps=later),
        replace(batch, item_ids=batch.item_ids.flip(0)),
    ):
        assert (logits(model, changed, candidates, 6) - before).abs().max() > 1e-3


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_without_data_every_parameter_still_takes_part(lengths: list[int]) -> None:
    model, batch = build(p_score=True).train(), batch_of(lengths)
    candidates = torch.zeros(len(lengths), 3, dtype=torch.int64)
    logits(model, batch, candidates, 1).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []


def test_flops_are_those_that_are_counted() -> None:
    config = CONFIG.model_copy(update={"user_features": (), "side_features": ()})
    model, length = build(config).eval(), MAX_LENGTH
    batch = batch_of([length] * 3)
    with FlopCounterMode(display=False) as counter:
        logits(model, batch, torch.ones(3, 1, dtype=torch.int64), length)
    counted, told = counter.get_total_flops(), model.flops_per_token(length) * batch.num_tokens
    assert 0.5 < told / counted < 1.5  # the last layer's history and the head are left out
