"""Batches with codes and checks that all code decoders share."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from torch import Tensor

from configs.generation import BeamConfig
from models.base import CatalogueSizes, CodeDecoder
from models.batch import JaggedBatch
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.log_probs import sequence_log_probs
from models.generation.search import generate
from models.ops.jagged import segment_ids
from tests.models.sequences import make_batch, take, tokens_of

M = TypeVar("M", bound=CodeDecoder)
NUM_ITEMS, MAX_LENGTH = 50, 12
CODEBOOKS = (5, 7, 4)
SIZES = CatalogueSizes(
    num_items=NUM_ITEMS,
    num_users=30,
    user_features={"age": 5},
    side_features={"device": 7},
    codebook_sizes=CODEBOOKS,
    num_actions=3,
    has_dwell_times=True,
)


def item_codes(items: Tensor) -> Tensor:
    """A fixed semantic id for each item: [...] → [..., L]."""
    drawn = torch.Generator().manual_seed(5)
    levels = [torch.randint(0, k, (NUM_ITEMS + 1,), generator=drawn) for k in CODEBOOKS]
    table = torch.stack(levels, dim=1)
    table[0] = 0
    return table[items]


def dwell_times(items: Tensor) -> Tensor:
    """Seconds from 2^-6 to 2^16 that depend on the item; those of some are unknown."""
    return torch.where(items % 7 == 0, torch.nan, 1.5 * 2.0 ** (items % 23 - 6))


def dwell_row(table: Tensor, seconds: float) -> Tensor:
    """The row of a dwell time, from the definition: 1 + ⌊log2⌋ counted from 2^-4 seconds on."""
    if math.isnan(seconds):
        return table[0]
    return table[max(1, min(math.floor(math.log2(seconds)) + 6, 20))]


def coded_batch(lengths: list[int], seed: int = 0) -> JaggedBatch:
    """A batch with codes, actions, dwell times, features and one unknown item."""
    batch = make_batch(lengths, NUM_ITEMS, seed, 1.0, {"age": 5}, {"device": 7})
    if batch.num_tokens > 1:
        batch.item_ids[1] = 0
    return replace(
        batch,
        item_codes=item_codes(batch.item_ids),
        action_ids=batch.item_ids % 4,
        dwell_times=dwell_times(batch.item_ids),
    )


def part_of(batch: JaggedBatch, sequences: list[int]) -> JaggedBatch:
    """Some of the sequences, with their codes, actions and dwell times."""
    assert batch.item_codes is not None and batch.action_ids is not None
    assert batch.dwell_times is not None
    none = batch.item_ids[:0]
    return replace(
        take(batch, sequences),
        item_codes=torch.cat(
            [item_codes(none), *(tokens_of(batch, batch.item_codes, b) for b in sequences)]
        ),
        action_ids=torch.cat([none, *(tokens_of(batch, batch.action_ids, b) for b in sequences)]),
        dwell_times=torch.cat(
            [none.float(), *(tokens_of(batch, batch.dwell_times, b) for b in sequences)]
        ),
    )


def embeddings_of(model: CodeDecoder, batch: JaggedBatch) -> dict[str, Tensor]:
    """Rows of random tables, another for each name; rows of id 0 are 0."""
    rows = {}
    for at, spec in enumerate(model.table_specs()):
        table = torch.randn(60, spec.width, generator=torch.Generator().manual_seed(at))
        table[0] = 0
        rows[spec.name] = table.to(next(model.parameters()).dtype)
    return {name: rows[name][ids] for name, ids in model.input_ids(batch).items()}


def randomised(model: M, scale: float = 0.5) -> M:
    """Large parameters, so that no term is too small to be seen missing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * scale)
    return model


def logits_of(
    model: CodeDecoder,
    batch: JaggedBatch,
    codes: Tensor,
    positions: Literal["every", "last"],
    step_seed: int = 0,
) -> list[Tensor]:
    """Teacher-forced logits of `codes` [N, L]."""
    context = model.encode(batch, embeddings_of(model, batch), step_seed, positions)
    return model.teacher_forced(context, codes)


def requested_codes(batch: JaggedBatch, positions: Literal["every", "last"]) -> Tensor:
    """Codes of the targets of all tokens, or of last tokens."""
    targets = batch.target_ids
    return item_codes(targets if positions == "every" else targets[batch.offsets[1:] - 1])


def stepped_logits(model: CodeDecoder, context: object, codes: Tensor) -> list[Tensor]:
    """Logits along W given ids of each request, codes [N, W, L], by steps with a cache.

    Beams are permuted between levels, so that keys must be found by ancestry. [N, W, K_l] each.
    """
    requests, beams, levels = codes.shape
    cache = model.new_cache(context)
    first = model.step(context, cache, 0, None)
    assert first.shape[:2] == (requests, 1)
    out, order = [first.expand(-1, beams, -1)], None
    for level in range(1, levels):
        mixed = torch.stack([torch.randperm(beams) for _ in range(requests)])
        parents = torch.zeros_like(mixed)
        if order is not None:  # where in the last level's order each beam was
            parents = order.argsort(dim=1).gather(1, mixed)
        cache.select(parents)
        order = mixed
        logits = model.step(context, cache, level, codes[:, :, level - 1].gather(1, mixed))
        places = mixed.argsort(dim=1)[..., None].expand(-1, -1, logits.shape[2])
        out.append(logits.gather(1, places))
    return out


def check_steps_equal_teacher_forcing(
    model: CodeDecoder, batch: JaggedBatch, positions: Literal["every", "last"]
) -> None:
    """Three random ids per request, each written by steps and at once."""
    model.eval()
    context = model.encode(batch, embeddings_of(model, batch), 0, positions)
    requests = requested_codes(batch, positions).shape[0]
    codes = torch.stack([torch.randint(0, k, (requests, 3)) for k in CODEBOOKS], dim=2)
    stepped = stepped_logits(model, context, codes)
    for beam in range(3):
        forced = model.teacher_forced(context, codes[:, beam])
        for level, logits in enumerate(forced):
            assert logits.dtype == stepped[level].dtype == torch.float32
            torch.testing.assert_close(stepped[level][:, beam], logits, atol=2e-5, rtol=1e-4)


def check_beam_search_equals_scoring_every_item(
    model: CodeDecoder, batch: JaggedBatch, positions: Literal["every", "last"]
) -> None:
    """Beams as many as items give every id, in the order of its teacher-forced log π."""
    model.eval()
    codes = item_codes(torch.arange(1, NUM_ITEMS + 1)).unique(dim=0)
    trie = CatalogueTrie.build(codes, CODEBOOKS)
    context = model.encode(batch, embeddings_of(model, batch), 0, positions)
    requests, ids = requested_codes(batch, positions).shape[0], codes.shape[0]
    found = generate(model, context, requests, trie, BeamConfig(beams=ids))
    assert found.valid.all()
    scores = []
    for row in codes:
        wanted = row.expand(requests, -1)
        logits = model.teacher_forced(context, wanted)
        scores.append(sequence_log_probs(logits, wanted, trie).sum(1))
    every = torch.stack(scores, dim=1)
    torch.testing.assert_close(every.exp().sum(1), torch.ones(requests))
    expected = every.sort(dim=1, descending=True).values
    torch.testing.assert_close(found.log_probs, expected, atol=1e-4, rtol=1e-4)
    places = (found.codes[:, :, None] == codes).all(-1).long().argmax(-1)
    torch.testing.assert_close(found.log_probs, every.gather(1, places), atol=1e-4, rtol=1e-4)


def check_independence_of_the_batch(
    model: CodeDecoder, positions: Literal["every", "last"], training: bool
) -> None:
    """Logits, dropout included, depend on the sequence alone, in any order and micro batch."""
    model.train(training)
    batch = coded_batch([3, 1, 12, 7])
    whole = logits_of(model, batch, requested_codes(batch, positions), positions, 9)
    for chosen in ([2], [3, 0], [1, 3, 2]):
        part = part_of(batch, chosen)
        got = logits_of(model, part, requested_codes(part, positions), positions, 9)
        sequences = torch.arange(4)
        if positions == "every":
            sequences = segment_ids(batch.offsets, batch.num_tokens)
        rows = torch.cat([(sequences == b).nonzero().squeeze(1) for b in chosen])
        for mine, all_of in zip(got, whole, strict=True):
            torch.testing.assert_close(mine, all_of[rows], atol=2e-5, rtol=1e-4)


def check_without_data(model: CodeDecoder, positions: Literal["every", "last"]) -> None:
    """No sequence: logits of no request, and zero gradients for every parameter."""
    model.train()
    batch = coded_batch([])
    logits = logits_of(model, batch, requested_codes(batch, positions), positions)
    assert [tuple(x.shape) for x in logits] == [(0, k) for k in CODEBOOKS]
    torch.cat([x.flatten() for x in logits]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def check_every_parameter_learns(model: CodeDecoder, positions: Literal["every", "last"]) -> None:
    """Each parameter has a gradient that is not zero."""
    model.train()
    batch = coded_batch([5, 12, 9])
    logits = logits_of(model, batch, requested_codes(batch, positions), positions)
    sum((x * torch.randn(x.shape)).sum() for x in logits).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def check_bfloat16(model: CodeDecoder, positions: Literal["every", "last"]) -> None:
    """Under autocast logits are float32 and near those of float32; gradients are finite."""
    model.train()
    batch = coded_batch([5, 12, 9])
    codes = requested_codes(batch, positions)
    exact = logits_of(model, batch, codes, positions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = logits_of(model, batch, codes, positions)
    for mine, other in zip(rough, exact, strict=True):
        assert mine.dtype == torch.float32
        error = (mine - other).norm() / other.norm()
        assert 0 < error < 0.05
    torch.cat([x.flatten() for x in rough]).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def check_gradients(
    model: CodeDecoder,
    batch: JaggedBatch,
    positions: Literal["every", "last"],
    reference: Callable[[dict[str, Tensor]], list[Tensor]],
) -> None:
    """Logits and all gradients of a float64 model equal those of `reference` (rows → logits)."""
    rows = {n: x.requires_grad_() for n, x in embeddings_of(model, batch).items()}
    wanted = [*model.parameters(), *rows.values()]
    context = model.encode(batch, rows, 0, positions)
    actual = model.teacher_forced(context, requested_codes(batch, positions))
    expected = reference(rows)
    upstream = [torch.randn(x.shape) for x in actual]
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other.float(), atol=1e-5, rtol=1e-5)
    grads = [
        torch.autograd.grad(
            sum((x * u).sum() for x, u in zip(logits, upstream, strict=True)),  # type: ignore[arg-type]
            wanted,
        )
        for logits in (actual, expected)
    ]
    names = [name for name, _ in model.named_parameters()] + list(rows)
    for name, mine, other in zip(names, *grads, strict=True):
        assert torch.allclose(mine, other, atol=1e-5, rtol=1e-4), name


def spans(batch: JaggedBatch) -> list[tuple[int, int]]:
    """First token and end of each sequence."""
    return list(pairwise(batch.offsets.tolist()))


def rms(weight: Tensor, row: Tensor) -> Tensor:
    """Root-mean-square norm of one row."""
    return row / (row.square().mean() + 1e-6).sqrt() * weight


def softmax_mix(logits: list[Tensor], values: list[Tensor]) -> Tensor:
    """Σ softmax(logits)_j values_j, term by term."""
    parts = [logit.exp() for logit in logits]
    total = sum(parts[1:], parts[0])
    mixed = [part / total * value for part, value in zip(parts, values, strict=True)]
    return sum(mixed[1:], mixed[0])
