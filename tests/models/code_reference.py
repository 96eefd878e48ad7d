"""Code decoders in plain loops, straight from the formulas: per request, position, head and token.

Weights are double copies of a model's, so that gradients can be compared as well.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.base import CodeDecoder
from models.batch import JaggedBatch
from models.layers.code_embedding import EventFeatures, last_request_times, time_buckets
from models.layers.code_writer import CodeBlock, CodeWriter
from models.layers.decoder_attention import CodeSelfAttention, ContextAttention
from models.layers.experts import Experts
from models.layers.feedforward import GatedFeedForward
from models.layers.norms import LAYER_NORM_EPS, RMSNorm
from models.layers.pathways import PathwayNetwork
from tests.models.decoders import dwell_row, dwell_times

SIZES = (7, 5, 6)
"""Codebook sizes of the tests' catalogue."""


def coded(batch: JaggedBatch, num_actions: int = 0) -> JaggedBatch:
    """The batch with codes that depend on the item alone, ratings, dwell times, perhaps actions."""
    codes = torch.stack(
        [(batch.item_ids * (3 + 2 * level)) % size for level, size in enumerate(SIZES)]
    )
    actions = (batch.item_ids * 7) % (num_actions + 1) if num_actions else None
    ratings = ((batch.item_ids * 5) % 9).float() / 2 + 1
    return replace(
        batch,
        item_codes=codes.t(),
        ratings=ratings,
        action_ids=actions,
        dwell_times=dwell_times(batch.item_ids),
    )


def randomized(model: CodeDecoder, std: float = 0.4) -> CodeDecoder:
    """The model with weights that leave nothing at a special value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        for name, buffer in model.named_buffers():
            if name.endswith("balance"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model


def doubled(model: CodeDecoder) -> CodeDecoder:
    """A copy whose parameters are double and take gradients of their own."""
    twin = copy.deepcopy(model).double()
    twin.zero_grad()
    return twin


def step_by_step(model: CodeDecoder, context: object, codes: Tensor) -> list[Tensor]:
    """Logits of every position of one known item a request, written code by code with the cache."""
    cache = model.new_cache(context)
    only = torch.zeros(codes.shape[0], 1, dtype=torch.int64)
    logits = []
    for level in range(codes.shape[1]):
        tokens = codes[:, level - 1 : level] if level else None
        logits.append(model.step(context, cache, level, tokens)[:, 0])
        if level + 1 < codes.shape[1]:
            cache.select(only)
    return logits


def rms(norm: nn.Module, row: Tensor) -> Tensor:
    assert isinstance(norm, RMSNorm)
    return row / torch.sqrt((row * row).sum() / len(row) + LAYER_NORM_EPS) * norm.weight


def linear(layer: nn.Module, row: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    out = layer.weight @ row
    return out if layer.bias is None else out + layer.bias


def read(queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """One query [H, Dh] over keys and values [G, Dh] each: [H·Dh]."""
    heads, width = queries.shape
    out = []
    for head in range(heads):
        group = head // (heads // keys[0].shape[0])
        weights = [torch.exp(queries[head] @ k[group] / math.sqrt(width)) for k in keys]
        total = sum(weights, torch.zeros(()).double())
        mixed = [w / total * v[group] for w, v in zip(weights, values, strict=True)]
        out.append(torch.stack(mixed).sum(0))
    return torch.cat(out)


def read_context(
    layer: nn.Module, row: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> Tensor:
    assert isinstance(layer, ContextAttention)
    queries = linear(layer.query, row).unflatten(0, (layer.num_heads, -1))
    return linear(layer.output, read(queries, keys, values))


def read_codes(layer: nn.Module, rows: Sequence[Tensor]) -> list[Tensor]:
    assert isinstance(layer, CodeSelfAttention)
    queries, keys, values = [], [], []
    for row in rows:
        q, k, v = linear(layer.qkv, row).split(
            [n * layer.head_width for n in (layer.num_heads, layer.groups, layer.groups)]
        )
        queries.append(q.unflatten(0, (layer.num_heads, -1)))
        keys.append(k.unflatten(0, (layer.groups, -1)))
        values.append(v.unflatten(0, (layer.groups, -1)))
    return [
        linear(layer.output, read(queries[p], keys[: p + 1], values[: p + 1]))
        for p in range(len(rows))
    ]


def feed_forward(layer: nn.Module, row: Tensor) -> Tensor:
    if isinstance(layer, GatedFeedForward):
        gate, up = linear(layer.gate_up, row).chunk(2)
        return linear(layer.down, gate * torch.sigmoid(gate) * up)
    assert isinstance(layer, Experts)
    assert layer.config.gate == "softmax"
    scores = torch.softmax(layer.router @ row, 0)
    out = torch.zeros_like(row) if layer.shared is None else feed_forward(layer.shared, row)
    for e in torch.argsort(scores + layer.balance, descending=True)[: layer.config.top_k].tolist():
        gate, up = (row @ layer.gate_up[e]).chunk(2)
        out = out + scores[e] * (gate * torch.sigmoid(gate) * up @ layer.down[e])
    return out


def pathway(network: nn.Module, row: Tensor) -> Tensor:
    assert isinstance(network, PathwayNetwork)
    hidden = linear(network.expand, row)
    return linear(network.contract, torch.where(hidden > 0, hidden, 0.01 * hidden))


def event_rows(
    writer: CodeWriter, features: EventFeatures, batch: JaggedBatch, embeddings: dict[str, Tensor]
) -> list[Tensor]:
    """Codes and what else each event of the batch carries."""
    assert batch.item_codes is not None
    elapsed = last_request_times(batch) - batch.timestamps
    rows = []
    for t in range(batch.num_tokens):
        row = torch.zeros(writer.norm.weight.shape[0]).double()
        for level, code in enumerate(batch.item_codes[t].tolist()):
            if batch.item_ids[t] > 0:
                row = row + code_row(writer, level, code)
        for name in features.event_tables:
            row = row + embeddings[name][t]
        if features.actions is not None:
            assert batch.action_ids is not None
            row = row + rows_of(features.actions)[batch.action_ids[t]]
        if features.times is not None:
            row = row + rows_of(features.times)[time_buckets(elapsed[t : t + 1])[0]]
        if features.dwell_times is not None:
            assert batch.dwell_times is not None
            row = row + dwell_row(rows_of(features.dwell_times), float(batch.dwell_times[t]))
        rows.append(row)
    return rows


def rows_of(table: nn.Module | Tensor) -> Tensor:
    return table.weight if isinstance(table, nn.Embedding) else table  # type: ignore[return-value]


def code_row(writer: CodeWriter, level: int, code: int) -> Tensor:
    return writer.embedding.rows[sum(SIZES[:level]) + code]


def write(
    writer: CodeWriter, reads: Sequence[tuple[list[Tensor], list[Tensor]]], codes: Sequence[int]
) -> list[Tensor]:
    """Logits of every position; block i reads keys and values `reads[i]`, [G, Dh] a token."""
    rows = []
    for place in range(writer.num_positions):
        row = rows_of(writer.places)[place]
        if place:
            row = row + code_row(writer, (place - 1) % writer.levels, codes[place - 1])
        rows.append(row)
    for block, (keys, values) in zip(writer.blocks, reads, strict=True):
        assert isinstance(block, CodeBlock)
        if block.shape.cross_first:
            rows = _from_context(block, rows, keys, values)
            rows = _from_codes(block, rows)
        else:
            rows = _from_codes(block, rows)
            rows = _from_context(block, rows, keys, values)
        rows = [
            row + feed_forward(block.feedforward, rms(block.feedforward_norm, row)) for row in rows
        ]
    return [
        linear(writer.heads[place % writer.levels], rms(writer.norm, row))
        for place, row in enumerate(rows)
    ]


def _from_context(
    block: CodeBlock, rows: list[Tensor], keys: list[Tensor], values: list[Tensor]
) -> list[Tensor]:
    normed = [rms(block.context_norm, row) for row in rows]
    return [
        row + read_context(block.context, n, keys, values)
        for row, n in zip(rows, normed, strict=True)
    ]


def _from_codes(block: CodeBlock, rows: list[Tensor]) -> list[Tensor]:
    seen = read_codes(block.codes, [rms(block.code_norm, row) for row in rows])
    return [row + out for row, out in zip(rows, seen, strict=True)]
