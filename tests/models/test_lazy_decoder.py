"""The lazy decoder against loops, and what the contract of code decoders asks."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from configs.decoders import ExpertsConfig, LazyDecoderConfig
from models.base import CatalogueSizes, TableSpec
from models.batch import JaggedBatch
from models.lazy_decoder import LazyDecoder
from tests.models.code_reference import (
    SIZES,
    coded,
    doubled,
    event_rows,
    pathway,
    randomized,
    rms,
    rows_of,
    step_by_step,
    write,
)
from tests.models.sequences import make_batch, take, tokens_of

WIDTH, HISTORY, ITEMS, AGES, ACTIONS = 12, 6, 30, 4, 3
SMALL = {
    "width": WIDTH,
    "num_layers": 3,
    "num_heads": 2,
    "feedforward_width": 10,
    "dropout": 0.3,
    "history": HISTORY,
    "dense_layers": 1,
    "experts": {"num_experts": 4, "top_k": 2, "num_shared": 1, "expert_width": 5},
    "times": True,
    "actions": True,
    "dwell_times": True,
    "user_features": ("age",),
    "side_features": ("shop",),
}
CATALOGUE = CatalogueSizes(ITEMS, 9, {"age": AGES}, {"shop": 5}, SIZES, ACTIONS, (), True)


def build(**changes: Any) -> LazyDecoder:
    settings = SMALL | changes
    if settings["experts"] is None:  # all blocks are dense
        settings = {name: value for name, value in settings.items() if name != "dense_layers"}
    config = LazyDecoderConfig.model_validate(settings)
    names = [f"user_{name}" for name in config.user_features]
    names += [f"side_{name}" for name in config.side_features]
    specs = tuple(TableSpec(name, 6, WIDTH, 0.02) for name in names)
    model = randomized(LazyDecoder(config, specs, CATALOGUE))
    assert isinstance(model, LazyDecoder)
    return model


def requests(lengths: list[int]) -> JaggedBatch:
    batch = make_batch(lengths, ITEMS, user_features={"age": AGES}, side_features={"shop": 5})
    return coded(batch, ACTIONS)


def rows_for(model: LazyDecoder, batch: JaggedBatch) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tables = {s.name: torch.randn(6, WIDTH, generator=generator) for s in model.table_specs()}
    return {name: tables[name][ids] for name, ids in model.input_ids(batch).items()}


def targets(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    draws = [torch.randint(0, size, (count,), generator=generator) for size in SIZES]
    return torch.stack(draws, dim=1)


def logits_of(model: LazyDecoder, batch: JaggedBatch, step_seed: int = 0) -> list[Tensor]:
    context = model.encode(batch, rows_for(model, batch), step_seed, "last")
    return model.teacher_forced(context, targets(batch.num_sequences))


def by_loops(model: LazyDecoder, batch: JaggedBatch) -> list[Tensor]:
    """`logits_of`, request by request."""
    embeddings = {name: rows.double() for name, rows in rows_for(model, batch).items()}
    events = event_rows(model.writer, model.features, batch, embeddings)
    config, processor = model.config, model.processor
    starts, written = batch.offsets.tolist(), []
    for b in range(batch.num_sequences):
        own = range(starts[b], starts[b + 1])
        tokens = [embeddings["user_age"][b]] if config.user_features else []
        recencies = rows_of(model.recencies)
        tokens += [events[t] + recencies[starts[b + 1] - 1 - t] for t in own]
        chunks = [pathway(processor.network, x).chunk(len(processor.norms)) for x in tokens]
        vectors = [
            [
                rms(norm, chunk).unflatten(0, (config.kv_heads, -1))
                for norm, chunk in zip(processor.norms, token, strict=True)
            ]
            for token in chunks
        ]
        reads = []
        for i in range(config.num_layers):
            at = i * config.kv_layers // config.num_layers * config.kv_split
            keys = [token[at] for token in vectors]
            values = [token[at + 1] for token in vectors] if config.kv_split == 2 else keys
            reads.append((keys, values))
        codes = targets(batch.num_sequences)[b].tolist()
        written.append(write(model.writer, reads, codes))
    return [torch.stack([request[level] for request in written]) for level in range(len(SIZES))]


SHAPES = [
    {},
    {"kv_layers": 2, "kv_split": 2, "kv_heads": 2},
    {"kv_layers": 3, "experts": None, "user_features": (), "actions": False, "times": False},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_logits_and_gradients_equal_loops(changes: dict[str, Any]) -> None:
    model = build(**changes).eval()
    twin = doubled(model)
    assert isinstance(twin, LazyDecoder)
    batch = requests([4, 1, 6])
    actual, expected = logits_of(model, batch), by_loops(twin, batch)
    generator = torch.Generator().manual_seed(5)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=2e-5)
    directions = [torch.randn(x.shape, generator=generator) for x in actual]
    sum((x * d).sum() for x, d in zip(actual, directions, strict=True)).backward()  # type: ignore[union-attr]
    sum((x * d).sum() for x, d in zip(expected, directions, strict=True)).backward()  # type: ignore[union-attr]
    for (name, parameter), copy in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None, name
        wanted = torch.zeros_like(copy) if copy.grad is None else copy.grad
        torch.testing.assert_close(parameter.grad.double(), wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("changes", SHAPES)
def test_teacher_forcing_equals_steps_with_the_cache(changes: dict[str, Any]) -> None:
    model, batch = build(**changes).eval(), requests([4, 1, 6])
    codes = targets(3)
    context = model.encode(batch, rows_for(model, batch), 0, "last")
    forced = model.teacher_forced(context, codes)
    for got, wanted in zip(step_by_step(model, context, codes), forced, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_beams_read_their_own_ancestors() -> None:
    model, batch = build().eval(), requests([4, 2])
    context = model.encode(batch, rows_for(model, batch), 0, "last")
    cache = model.new_cache(context)
    model.step(context, cache, 0, None)
    first = torch.tensor([[0, 3, 5], [1, 1, 6]])
    cache.select(torch.zeros(2, 3, dtype=torch.int64))
    model.step(context, cache, 1, first)
    parents, second = torch.tensor([[2, 0], [1, 1]]), torch.tensor([[4, 2], [0, 3]])
    cache.select(parents)
    actual = model.step(context, cache, 2, second)
    for beam in range(2):
        codes = torch.stack([first.gather(1, parents)[:, beam], second[:, beam], second[:, 0]], 1)
        expected = model.teacher_forced(context, codes)[2]
        torch.testing.assert_close(actual[:, beam], expected, atol=1e-5, rtol=1e-5)


def test_blocks_own_no_projection_of_keys_and_values_of_the_context() -> None:
    model = build()
    names = {
        name.split(".", 3)[3]: tuple(p.shape)
        for name, p in model.named_parameters()
        if name.startswith("writer.blocks.0.")
    }
    reading = {name: shape for name, shape in names.items() if name.startswith("context.")}
    assert reading == {
        "context.query.weight": (WIDTH, WIDTH),
        "context.output.weight": (WIDTH, WIDTH),
    }
    kv = sum(p.numel() for n, p in model.named_parameters() if n.startswith("processor."))
    head = WIDTH // 2
    assert kv == WIDTH * 10 + 10 + 10 * head + head + head  # one vector a token, its norm


@given(
    lengths=st.lists(st.integers(1, HISTORY), min_size=1, max_size=5),
    training=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=20)
def test_a_request_does_not_see_its_batch(
    lengths: list[int], training: bool, data: st.DataObject
) -> None:
    model = build().train(training)
    batch = requests(lengths)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
    part = coded(take(batch, chosen), ACTIONS)
    codes = targets(len(lengths))
    whole = model.teacher_forced(model.encode(batch, rows_for(model, batch), 9, "last"), codes)
    alone = model.encode(part, rows_for(model, part), 9, "last")
    for got, wanted in zip(model.teacher_forced(alone, codes[chosen]), whole, strict=True):
        torch.testing.assert_close(got, wanted[chosen], atol=1e-5, rtol=1e-5)


def test_dropout_falls_on_every_site_and_follows_the_step() -> None:
    model, batch = build().train(), requests([4, 1, 6])
    same, again, other = (logits_of(model, batch, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    salts = [0] + [block.salt + site for block in model.writer.blocks for site in range(3)]
    assert len(set(salts)) == len(salts)


def test_without_data_every_parameter_takes_part() -> None:
    model = build().train()
    logits = logits_of(model, requests([]))
    assert [x.shape for x in logits] == [(0, size) for size in SIZES]
    sum(x.sum() for x in logits).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    load = model.expert_load()
    assert load is not None and load.shape == (2, 4) and not load.any()


def test_last_code_is_not_read_and_first_ones_are() -> None:
    model, batch = build().eval(), requests([3, 5])
    context = model.encode(batch, rows_for(model, batch), 0, "last")
    codes = targets(2)
    before = model.teacher_forced(context, codes)
    codes[:, -1] = -1000
    assert all(map(torch.equal, before, model.teacher_forced(context, codes)))
    codes[:, 0] = (codes[:, 0] + 1) % SIZES[0]
    after = model.teacher_forced(context, codes)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_history_is_bounded() -> None:
    model = build()
    assert model.longest_history == HISTORY
    with pytest.raises(ValueError, match="exceeds the 6 that the model reads"):
        logits_of(model, requests([HISTORY + 1]))


def test_experts_are_loaded_and_balanced() -> None:
    model = build().train()
    logits_of(model, requests([4, 1, 6]))
    load = model.expert_load()
    assert load is not None
    assert load.sum(1).tolist() == [3 * len(SIZES) * 2] * 2  # requests, positions, top 2
    model.update_balance(load)
    assert not model.expert_load().any()  # type: ignore[union-attr]
    assert build(experts=None).expert_load() is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 5}, "must divide width"),
        ({"kv_heads": 3, "num_heads": 4}, "kv_heads=3 must divide"),
        ({"kv_layers": 4}, "exceeds num_layers"),
        ({"dense_layers": 3}, "leaves none"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LazyDecoderConfig.model_validate(SMALL | changes)


@pytest.mark.parametrize("changes", SHAPES)
def test_flops_count_the_products(changes: dict[str, Any]) -> None:
    model, length = build(**changes).eval(), 5
    batch = requests([length] * 4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits_of(model, batch)
    counts = counter.get_flop_counts()["Global"]
    attention = ("bmm", "scaled_dot_product", "attention")
    products = sum(n for op, n in counts.items() if not any(a in str(op) for a in attention))
    config, positions = model.config, len(SIZES)
    context = length + (1 if config.user_features else 0)
    pairs = positions * context + positions * (positions + 1) / 2
    total = products + 4 * config.num_layers * pairs * 2 * 2 * WIDTH
    assert model.flops_per_token(length) * 4 * length == pytest.approx(total)


def test_tokens_of_the_batch_are_ordered() -> None:
    """The latest event is told from the earliest: histories are no sets."""
    model = build(times=False).eval()
    batch = requests([5])
    before = logits_of(model, batch)[0]
    flipped = {"item_ids": batch.item_ids.flip(0), "action_ids": batch.action_ids.flip(0)}  # type: ignore[union-attr]
    swapped = coded(JaggedBatch(**{**batch.__dict__, **flipped}), ACTIONS)
    assert tokens_of(swapped, swapped.item_ids, 0).tolist() == batch.item_ids.flip(0).tolist()
    assert (logits_of(model, swapped)[0] - before).abs().max() > 1e-3


def test_bfloat16_is_close() -> None:
    model, batch = build().eval(), requests([4, 1, 6])
    plain = logits_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits_of(model, batch)
    for got, wanted in zip(mixed, plain, strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def test_experts_config_is_used_behind_the_dense_layers() -> None:
    kinds = [type(block.feedforward).__name__ for block in build(dense_layers=2).writer.blocks]
    assert kinds == ["GatedFeedForward", "GatedFeedForward", "Experts"]
    assert isinstance(build().config.experts, ExpertsConfig)
