"""OneRec against loops: pathways, encoder, decoder, sessions, and the contract of code decoders."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from configs.decoders import OneRecConfig
from models.base import CatalogueSizes, TableSpec
from models.batch import JaggedBatch
from models.layers.norms import RMSNorm
from models.layers.pathways import CompressionBlock, EncoderBlock
from models.onerec import EventPathway, OneRec
from tests.models.code_reference import (
    SIZES,
    coded,
    doubled,
    event_rows,
    feed_forward,
    linear,
    pathway,
    randomized,
    read,
    read_context,
    rms,
    rows_of,
    step_by_step,
    write,
)
from tests.models.sequences import make_batch, take

WIDTH, ITEMS, AGES, ACTIONS = 8, 30, 4, 3
LIFELONG = {"history": 9, "num_queries": 3, "num_layers": 2}
SMALL = {
    "width": WIDTH,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "feedforward_width": 10,
    "dropout": 0.3,
    "history": 4,
    "positive_history": 3,
    "positive_from": 3.5,
    "positive_actions": ("like",),
    "lifelong": LIFELONG,
    "experts": {"num_experts": 4, "top_k": 2, "expert_width": 5},
    "times": True,
    "dwell_times": True,
    "user_features": ("age",),
    "item_table": True,
}
ACTION_NAMES = ("click", "like", "share")
CATALOGUE = CatalogueSizes(ITEMS, 9, {"age": AGES}, {}, SIZES, ACTIONS, ACTION_NAMES, True)
ALONE = {
    "positive_history": None,
    "positive_actions": (),
    "lifelong": None,
    "user_features": (),
    "experts": None,
    "times": False,
    "dwell_times": False,
    "item_table": False,
}
SHAPES: list[dict[str, Any]] = [
    {},
    ALONE,
    {"session_items": 2, "lifelong": None},
    {"history": 9, "lifelong": None},
]
NAMES = ["all pathways", "short alone", "sessions", "short is longest"]


def build(**changes: Any) -> OneRec:
    settings = SMALL | changes
    if settings["positive_history"] is None:
        settings.pop("positive_from")
    config = OneRecConfig.model_validate(settings)
    names = ["item"] if config.item_table else []
    names += [f"user_{name}" for name in config.user_features]
    specs = tuple(TableSpec(name, ITEMS + 1, WIDTH, 0.02) for name in names)
    model = randomized(OneRec(config, specs, CATALOGUE))
    assert isinstance(model, OneRec)
    return model


def requests(lengths: list[int]) -> JaggedBatch:
    return coded(make_batch(lengths, ITEMS, user_features={"age": AGES}), ACTIONS)


def rows_for(model: OneRec, batch: JaggedBatch) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tables = {
        s.name: torch.randn(ITEMS + 1, WIDTH, generator=generator) for s in model.table_specs()
    }
    return {name: tables[name][ids] for name, ids in model.input_ids(batch).items()}


def targets(count: int, session_items: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    sizes = SIZES * session_items
    return torch.stack([torch.randint(0, k, (count,), generator=generator) for k in sizes], 1)


def logits_of(model: OneRec, batch: JaggedBatch, step_seed: int = 0) -> list[Tensor]:
    context = model.encode(batch, rows_for(model, batch), step_seed, "last")
    return model.teacher_forced(context, targets(batch.num_sequences, model.config.session_items))


def pathway_rows(part: EventPathway, events: list[Tensor], chosen: list[int]) -> list[Tensor]:
    """Rows of the chosen events, oldest first."""
    return [
        pathway(part.network, events[t]) + rows_of(part.recencies)[len(chosen) - 1 - at]
        for at, t in enumerate(chosen)
    ]


def is_positive(batch: JaggedBatch, t: int) -> bool:
    assert batch.ratings is not None and batch.action_ids is not None
    return bool(batch.ratings[t] >= 3.5) or int(batch.action_ids[t]) == 2


def compress(model: OneRec, tokens: list[Tensor]) -> list[Tensor]:
    assert model.compressor is not None
    rows = list(model.compressor.queries)
    for block in model.compressor.blocks:
        assert isinstance(block, CompressionBlock)
        pairs = [linear(block.history.projection, x).chunk(2) for x in tokens]
        keys = [k.unflatten(0, (block.history.num_kv_heads, -1)) for k, _ in pairs]
        values = [v.unflatten(0, (block.history.num_kv_heads, -1)) for _, v in pairs]
        rows = [
            x + read_context(block.reading, rms(block.reading_norm, x), keys, values) for x in rows
        ]
        rows = [x + feed_forward(block.feedforward, rms(block.feedforward_norm, x)) for x in rows]
    return rows


def encode(block: EncoderBlock, rows: list[Tensor]) -> list[Tensor]:
    heads = (3, block.num_heads, -1)
    parts = [linear(block.qkv, rms(block.attention_norm, x)).unflatten(0, heads) for x in rows]
    keys, values = [p[1] for p in parts], [p[2] for p in parts]
    rows = [
        x + linear(block.output, read(p[0], keys, values)) for x, p in zip(rows, parts, strict=True)
    ]
    return [x + feed_forward(block.feedforward, rms(block.feedforward_norm, x)) for x in rows]


def by_loops(model: OneRec, batch: JaggedBatch) -> list[Tensor]:
    """`logits_of`, request by request."""
    config = model.config
    embeddings = {name: rows.double() for name, rows in rows_for(model, batch).items()}
    events = event_rows(model.writer, model.features, batch, embeddings)
    starts, written = batch.offsets.tolist(), []
    codes = targets(batch.num_sequences, config.session_items).tolist()
    for b in range(batch.num_sequences):
        own = list(range(starts[b], starts[b + 1]))
        rows = [pathway(model.static, embeddings["user_age"][b])] if model.static else []
        rows += pathway_rows(model.short, events, own[-config.history :])
        if model.positive is not None:
            assert config.positive_history is not None
            liked = [t for t in own if is_positive(batch, t)][-config.positive_history :]
            rows += pathway_rows(model.positive, events, liked)
        if model.lifelong is not None:
            rows += compress(model, pathway_rows(model.lifelong, events, own[-9:]))
        for block in model.encoder:
            assert isinstance(block, EncoderBlock)
            rows = encode(block, rows)
        rows = [rms(model.encoder_norm, x) for x in rows]
        reads = []
        for part in model.context_projections:
            pairs = [linear(part.projection, x).chunk(2) for x in rows]
            keys = [k.unflatten(0, (config.num_heads, -1)) for k, _ in pairs]
            reads.append((keys, [v.unflatten(0, (config.num_heads, -1)) for _, v in pairs]))
        written.append(write(model.writer, reads, codes[b]))
    return [torch.stack(level) for level in zip(*written, strict=True)]


@pytest.mark.parametrize("changes", SHAPES, ids=NAMES)
def test_logits_and_gradients_equal_loops(changes: dict[str, Any]) -> None:
    model = build(**changes).eval()
    twin = doubled(model)
    assert isinstance(twin, OneRec)
    lengths = [min(n, model.longest_history) for n in (9, 1, 5)]
    batch = requests(lengths)
    actual, expected = logits_of(model, batch), by_loops(twin, batch)
    generator = torch.Generator().manual_seed(5)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=5e-5, rtol=5e-5)
    directions = [torch.randn(x.shape, generator=generator) for x in actual]
    torch.stack([(x * d).sum() for x, d in zip(actual, directions, strict=True)]).sum().backward()
    torch.stack([(x * d).sum() for x, d in zip(expected, directions, strict=True)]).sum().backward()
    for (name, parameter), copy in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None, name
        wanted = torch.zeros_like(copy) if copy.grad is None else copy.grad
        torch.testing.assert_close(
            parameter.grad.double(), wanted, atol=5e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("changes", SHAPES, ids=NAMES)
def test_teacher_forcing_equals_steps_with_the_cache(changes: dict[str, Any]) -> None:
    model, batch = build(**changes).eval(), requests([4, 1, 3])
    codes = targets(3, model.config.session_items)
    assert len(model.codebook_sizes) == codes.shape[1]
    context = model.encode(batch, rows_for(model, batch), 0, "last")
    forced = model.teacher_forced(context, codes)
    for got, wanted in zip(step_by_step(model, context, codes), forced, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_pathways_that_are_not_configured_do_not_exist() -> None:
    names = {name.split(".")[0] for name, _ in build(**ALONE).named_parameters()}
    assert names == {"short", "encoder", "encoder_norm", "context_projections", "writer"}
    everything = {name.split(".")[0] for name, _ in build().named_parameters()}
    assert everything - names == {"static", "positive", "lifelong", "compressor", "features"}


def test_longest_history_is_that_of_the_longest_pathway() -> None:
    assert build().longest_history == 9
    assert build(lifelong=None).longest_history == 4
    assert build(lifelong=None, positive_history=6).longest_history == 6


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
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
        torch.testing.assert_close(got, wanted[chosen], atol=2e-5, rtol=2e-5)


def test_dropout_sites_have_their_own_masks_and_follow_the_step() -> None:
    model, batch = build().train(), requests([4, 1, 6])
    same, again, other = (logits_of(model, batch, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert model.compressor is not None
    salts = [block.salt + site for block in model.compressor.blocks for site in (0, 1)]
    salts += [block.salt + site for block in model.encoder for site in (0, 1)]
    salts += [block.salt + site for block in model.writer.blocks for site in (0, 1, 2)]
    assert len(set(salts)) == len(salts) == 14


@pytest.mark.parametrize("changes", SHAPES, ids=NAMES)
def test_without_data_every_parameter_takes_part(changes: dict[str, Any]) -> None:
    model = build(**changes).train()
    logits = logits_of(model, requests([]))
    assert [x.shape for x in logits] == [(0, size) for size in model.codebook_sizes]
    torch.stack([x.sum() for x in logits]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_sessions_write_items_that_see_those_before() -> None:
    model, batch = build(session_items=2, lifelong=None).eval(), requests([3, 4])
    context = model.encode(batch, rows_for(model, batch), 0, "last")
    codes = targets(2, 2)
    before = model.teacher_forced(context, codes)
    codes[:, len(SIZES) - 1] = (codes[:, len(SIZES) - 1] + 1) % SIZES[-1]
    after = model.teacher_forced(context, codes)
    changed = [not torch.allclose(x, y) for x, y in zip(before, after, strict=True)]
    assert changed == [False] * len(SIZES) + [True] * len(SIZES)


def test_feedback_is_positive_by_rating_or_by_action() -> None:
    model, batch = build(), requests([9, 9, 9])
    actual = model.positive_events(batch).tolist()
    assert actual == [is_positive(batch, t) for t in range(27)]
    assert 0 < sum(actual) < 27
    ratings_alone = model.positive_events(replace(batch, action_ids=None))
    assert ratings_alone.tolist() == (batch.ratings >= 3.5).tolist()  # type: ignore[operator]
    actions_alone = model.positive_events(replace(batch, ratings=None))
    assert actions_alone.tolist() == (batch.action_ids == 2).tolist()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="needs feedback"):
        model.positive_events(replace(batch, ratings=None, action_ids=None))


def test_actions_that_the_data_lack_are_refused() -> None:
    with pytest.raises(ValueError, match="positive_actions names \\['buy'\\]"):
        build(positive_actions=("click", "buy"))
    with pytest.raises(ValueError, match="positive_history"):
        OneRecConfig(positive_actions=("click",))


@pytest.mark.parametrize("changes", SHAPES, ids=NAMES)
def test_flops_count_the_products(changes: dict[str, Any]) -> None:
    model, length = build(**changes, positive_from=0.0).eval().requires_grad_(False), 3
    batch = requests([length] * 4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits_of(model, batch)
    counts = counter.get_flop_counts()["Global"]
    attention = ("bmm", "attention")
    products = sum(n for op, n in counts.items() if not any(a in str(op) for a in attention))
    config, positions = model.config, len(model.codebook_sizes)
    queries = 0 if config.lifelong is None else config.lifelong.num_queries
    events = length * (1 if config.positive_history is None else 2)
    context = events + queries + len(config.user_features)
    pairs = config.num_encoder_layers * context**2
    pairs += config.num_decoder_layers * positions * context
    pairs += config.num_decoder_layers * positions * (positions + 1) // 2
    pairs += 0 if config.lifelong is None else config.lifelong.num_layers * queries * length
    total = products + 4 * pairs * 2 * 2 * WIDTH
    assert model.flops_per_token(length) * 4 * length == pytest.approx(total)


def test_norms_are_learned_and_ours() -> None:
    model = build()
    assert isinstance(model.encoder_norm, RMSNorm)
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())


def test_bfloat16_is_close() -> None:
    model, batch = build().eval(), requests([4, 1, 6])
    plain = logits_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits_of(model, batch)
    for got, wanted in zip(mixed, plain, strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).abs().mean() < 0.2 * wanted.abs().mean()
