"""Attention of code decoders against loops over requests, positions and heads."""

import math

import pytest
import torch
from torch import Tensor

from models.layers.decoder_attention import (
    CodeSelfAttention,
    ContextAttention,
    ContextKeys,
    KeyValueProjection,
    context_keys,
)
from models.ops.jagged import lengths_to_offsets

WIDTH, HEADS, HEAD_WIDTH = 10, 4, 3


class LoopCache:
    """A cache as plain lists: per layer and position the rows of all beams, and their parents."""

    def __init__(self) -> None:
        self.rows: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.parents: list[Tensor] = []

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.rows.setdefault(layer, []).append((keys, values))

    def written(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        return self.rows[layer]

    @property
    def ancestors(self) -> Tensor:
        (rows,) = self.rows.values()  # one layer
        requests, beams = rows[-1][0].shape[:2]
        paths = torch.empty(requests, beams, len(rows), dtype=torch.int64)
        for n in range(requests):
            for w in range(beams):
                at = w
                for level in range(len(rows) - 1, -1, -1):
                    paths[n, w, level] = at
                    if level:
                        at = int(self.parents[level - 1][n, at])
        return paths


def head_by_head(
    queries: list[Tensor], keys: list[Tensor], values: list[Tensor], bias: Tensor
) -> Tensor:
    """Attention of one query with H heads over some tokens; heads share the keys of their group."""
    out = []
    for head, query in enumerate(queries):
        group = head * keys[0].shape[0] // len(queries)
        logits = [
            query @ key[group] / math.sqrt(HEAD_WIDTH) + bias[head, j] for j, key in enumerate(keys)
        ]
        total = sum(logit.exp() for logit in logits)
        mixed = [
            logit.exp() / total * value[group] for logit, value in zip(logits, values, strict=True)
        ]
        out.append(torch.stack(mixed).sum(0))
    return torch.cat(out)


def self_attention_by_loops(layer: CodeSelfAttention, x: Tensor, bias: Tensor | None) -> Tensor:
    requests, positions = x.shape[:2]
    groups, rows = layer.groups, []
    for n in range(requests):
        q: list[Tensor] = []
        k: list[Tensor] = []
        v: list[Tensor] = []
        for p in range(positions):
            projected = layer.qkv.weight @ x[n, p]
            cut = [HEADS * HEAD_WIDTH, groups * HEAD_WIDTH, groups * HEAD_WIDTH]
            for kind, part in zip((q, k, v), projected.split(cut), strict=True):
                kind.append(part.view(-1, HEAD_WIDTH))
        for p in range(positions):
            extra = torch.zeros(HEADS, p + 1) if bias is None else bias[:, p]
            attended = head_by_head(list(q[p]), k[: p + 1], v[: p + 1], extra)
            rows.append(layer.output.weight @ attended)
    return torch.stack(rows).view(x.shape)


def context(
    project: KeyValueProjection, tokens: Tensor, offsets: Tensor, longest: int
) -> ContextKeys:
    keys, values = project(tokens)
    return context_keys(keys, values, offsets, longest)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_self_attention_equals_loops_forward_and_backward(groups: int, biased: bool) -> None:
    torch.manual_seed(0)
    layer = CodeSelfAttention(WIDTH, HEADS, HEAD_WIDTH, groups).double()
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(HEADS, 4, 4, dtype=torch.float64, requires_grad=True) if biased else None
    wanted = [x, *layer.parameters(), *([bias] if bias is not None else [])]
    upstream = torch.randn(x.shape, dtype=torch.float64)
    actual, expected = layer(x, bias), self_attention_by_loops(layer, x, bias)
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(actual, wanted, upstream)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, wanted, upstream))


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_steps_with_a_cache_equal_teacher_forcing(groups: int, biased: bool) -> None:
    """Beams branch and are reordered between steps; each equals its own path taken at once."""
    torch.manual_seed(1)
    layer, requests = CodeSelfAttention(WIDTH, HEADS, HEAD_WIDTH, groups), 3
    bias = torch.randn(HEADS, 4, 4) if biased else None
    cache, paths = LoopCache(), torch.zeros(requests, 1, 0, WIDTH)
    for position, beams in enumerate((1, 5, 3, 6)):
        if position:
            parents = torch.randint(0, paths.shape[1], (requests, beams))
            cache.parents.append(parents)
            paths = torch.stack([paths[n, parents[n]] for n in range(requests)])
        newest = torch.randn(requests, beams, WIDTH)
        paths = torch.cat([paths, newest[:, :, None]], dim=2)
        row = None if bias is None else bias[:, position, : position + 1]
        stepped = layer.step(newest, cache, 0, row)
        here = None if bias is None else bias[:, : position + 1, : position + 1]
        whole = layer(paths.flatten(0, 1), here)[:, -1].view(stepped.shape)
        torch.testing.assert_close(stepped, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_context_attention_equals_loops_forward_and_backward(groups: int) -> None:
    torch.manual_seed(2)
    layer = ContextAttention(WIDTH, HEADS, HEAD_WIDTH).double()
    project = KeyValueProjection(WIDTH, groups, HEAD_WIDTH).double()
    offsets = lengths_to_offsets(torch.tensor([2, 5, 1]))
    tokens = torch.randn(8, WIDTH, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    actual = layer(x, context(project, tokens, offsets, 5))
    rows = []
    for n in range(3):
        own = tokens[offsets[n] : offsets[n + 1]]
        both = [(project.projection.weight @ t).view(2, groups, HEAD_WIDTH) for t in own]
        for query in x[n]:
            heads = list((layer.query.weight @ query).view(HEADS, HEAD_WIDTH))
            zero = torch.zeros(HEADS, len(own))
            mixed = head_by_head(heads, [kv[0] for kv in both], [kv[1] for kv in both], zero)
            rows.append(layer.output.weight @ mixed)
    expected = torch.stack(rows).view(x.shape)
    torch.testing.assert_close(actual, expected)
    wanted = [tokens, x, *layer.parameters(), *project.parameters()]
    upstream = torch.randn(x.shape, dtype=torch.float64)
    grads = torch.autograd.grad(actual, wanted, upstream)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, wanted, upstream))


def test_an_empty_context_reads_as_zero() -> None:
    layer, project = ContextAttention(WIDTH, 4, 3), KeyValueProjection(WIDTH, 2, 3)
    offsets = lengths_to_offsets(torch.tensor([0, 2]))
    read = layer(torch.randn(2, 3, WIDTH), context(project, torch.randn(2, WIDTH), offsets, 2))
    assert not read[0].any() and read[1].all()


def test_without_requests_every_parameter_takes_part() -> None:
    cross, project = ContextAttention(WIDTH, 4, 3), KeyValueProjection(WIDTH, 2, 3)
    own = CodeSelfAttention(WIDTH, 4, 3)
    nothing = torch.zeros(1, dtype=torch.int64)
    empty = context(project, torch.zeros(0, WIDTH), nothing, 0)
    out = own(cross(torch.zeros(0, 4, WIDTH), empty))
    assert out.shape == (0, 4, WIDTH)
    out.sum().backward()
    for layer in (cross, project, own):
        for parameter in layer.parameters():
            assert parameter.grad is not None and not parameter.grad.any()


def test_heads_that_do_not_group_are_refused() -> None:
    with pytest.raises(ValueError, match="3 key-value heads"):
        CodeSelfAttention(WIDTH, 4, 3, 3)
