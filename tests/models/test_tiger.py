"""TIGER against loops over requests, positions and heads, and what a code decoder must never do."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from configs.decoders import TIGERConfig
from models.base import TableSpec
from models.batch import JaggedBatch
from models.layers.t5_bias import RelativeBias
from models.layers.t5_block import DecoderBlock, EncoderBlock
from models.tiger import TIGER
from tests.models import decoders
from tests.models.decoders import SIZES, coded_batch, randomised, rms, softmax_mix

CONFIG = TIGERConfig(
    width=8,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_heads=2,
    head_width=3,
    feedforward_width=10,
    dropout=0.3,
    history=6,
    relative_buckets=8,
    relative_distance=10,
)
FEATURED = CONFIG.model_copy(
    update={
        "item_table": True,
        "user_features": ("age",),
        "side_features": ("device",),
        "actions": True,
        "times": True,
        "dwell_times": True,
    }
)
HEADS, HEAD_WIDTH, LEVELS = 2, 3, 3


def build(config: TIGERConfig = CONFIG) -> TIGER:
    names = ["item"] if config.item_table else []
    names += [f"user_{n}" for n in config.user_features]
    names += [f"side_{n}" for n in config.side_features]
    specs = tuple(TableSpec(name, 60, config.width, 0.02) for name in names)
    return randomised(TIGER(config, specs, SIZES))


def bucket(relative: int, count: int, most: int, bidirectional: bool) -> int:
    """T5's bucket of key place − query place."""
    offset = 0
    if bidirectional:
        count //= 2
        offset = count if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = count // 2
    if distance < exact:
        return offset + distance
    scaled = math.log(distance / exact) / math.log(most / exact) * (count - exact)
    return offset + min(exact + int(scaled + 1e-9), count - 1)


def attend(
    queries: list[Tensor], keys: list[Tensor], values: list[Tensor], bias: Tensor | None, i: int
) -> Tensor:
    """Query i's heads over all given keys; `bias` is the table [R, H] and a causal flag's rule."""
    heads = []
    for head in range(HEADS):
        own = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        logits = [queries[i][own] @ key[own] / math.sqrt(HEAD_WIDTH) for key in keys]
        if bias is not None:
            logits = [logit + bias[j, head] for j, logit in enumerate(logits)]
        heads.append(softmax_mix(logits, [value[own] for value in values]))
    return torch.cat(heads)


def bias_row(layer: RelativeBias, i: int, count: int, bidirectional: bool) -> Tensor:
    buckets = [bucket(j - i, 8, 10, bidirectional) for j in range(count)]
    return torch.stack([layer.buckets_to_heads.weight[b] for b in buckets])


def encoder_by_loops(model: TIGER, x: list[Tensor]) -> list[Tensor]:
    inner = HEADS * HEAD_WIDTH
    for block in model.encoder:
        assert isinstance(block, EncoderBlock)
        projected = [block.qkv.weight @ rms(block.attention_norm.weight, row) for row in x]
        q, k, v = ([row[at : at + inner] for row in projected] for at in (0, inner, 2 * inner))
        out = []
        for i, row in enumerate(x):
            bias = bias_row(model.encoder_bias, i, len(x), True)
            row = row + block.output.weight @ attend(q, k, v, bias, i)
            normed = rms(block.feedforward_norm.weight, row)
            hidden = (block.feedforward.expand.weight @ normed).clamp(min=0)
            out.append(row + block.feedforward.contract.weight @ hidden)
        x = out
    return [rms(model.encoder_norm.weight, row) for row in x]


def decoder_by_loops(model: TIGER, encoded: list[Tensor], codes: list[int]) -> list[Tensor]:
    inner, scale = HEADS * HEAD_WIDTH, math.sqrt(8)
    starts = [0, 5, 12]
    x = [model.begin.weight[0] * scale]
    x += [model.codes.rows[starts[at] + codes[at]] * scale for at in range(LEVELS - 1)]
    for layer, block in enumerate(model.decoder):
        assert isinstance(block, DecoderBlock)
        own, read = block.self_attention, block.context_attention
        projected = [own.qkv.weight @ rms(block.self_norm.weight, row) for row in x]
        q, k, v = ([row[at : at + inner] for row in projected] for at in (0, inner, 2 * inner))
        both = [model.projections[layer].projection.weight @ row for row in encoded]  # type: ignore[union-attr, operator]
        out = []
        for i, row in enumerate(x):
            bias = bias_row(model.decoder_bias, i, i + 1, False)
            row = row + own.output.weight @ attend(q, k[: i + 1], v[: i + 1], bias, i)
            asked = [read.query.weight @ rms(block.context_norm.weight, row)]
            mixed = attend(asked, [b[:inner] for b in both], [b[inner:] for b in both], None, 0)
            row = row + read.output.weight @ mixed
            normed = rms(block.feedforward_norm.weight, row)
            hidden = (block.feedforward.expand.weight @ normed).clamp(min=0)
            out.append(row + block.feedforward.contract.weight @ hidden)
        x = out
    heads = [p for _, p in model.heads.named_parameters()]
    return [head @ rms(model.decoder_norm.weight, row) for head, row in zip(heads, x, strict=True)]


def tiger_by_loops(model: TIGER, batch: JaggedBatch, rows: dict[str, Tensor]) -> list[Tensor]:
    """Logits of every request: L tensors [N, K_l], in the model's float64."""
    out: list[list[Tensor]] = [[] for _ in range(LEVELS)]
    codes, features, starts = decoders.item_codes(batch.item_ids), model.features, [0, 5, 12]
    for b, (start, end) in enumerate(decoders.spans(batch)):
        tokens = []
        for t in range(max(start, end - CONFIG.history), end):
            extra = torch.zeros(8, dtype=torch.float64)
            if rows:
                assert features.actions is not None and features.times is not None
                assert batch.action_ids is not None
                extra = rows["item"][t] + rows["user_age"][b] + rows["side_device"][t]
                extra = extra + features.actions.weight[batch.action_ids[t]]
                elapsed = int(batch.next_timestamps[end - 1] - batch.timestamps[t])
                extra = extra + features.times.weight[elapsed.bit_length() if elapsed > 0 else 0]
                assert features.dwell_times is not None and batch.dwell_times is not None
                seconds = float(batch.dwell_times[t])
                extra = extra + decoders.dwell_row(features.dwell_times.weight, seconds)
            for level in range(LEVELS):
                code = model.codes.rows[starts[level] + codes[t, level]]
                known = float(batch.item_ids[t] > 0)
                tokens.append((code * known + extra) * math.sqrt(8))
        encoded = encoder_by_loops(model, tokens)
        target = decoders.item_codes(batch.target_ids[end - 1]).tolist()
        for level, logits in enumerate(decoder_by_loops(model, encoded, target)):
            out[level].append(logits)
    return [torch.stack(level) for level in out]


@pytest.mark.parametrize("config", [CONFIG, FEATURED])
def test_model_equals_loops_forward_and_backward(config: TIGERConfig) -> None:
    model, batch = build(config).double().eval(), coded_batch([3, 1, 9])
    decoders.check_gradients(model, batch, "last", lambda rows: tiger_by_loops(model, batch, rows))


def test_float32_kernels_equal_float64() -> None:
    """The fast paths of float32 against the plain ones that float64 takes."""
    model, batch = build(FEATURED).eval(), coded_batch([3, 1, 9, 6])
    codes = decoders.requested_codes(batch, "last")
    fast = decoders.logits_of(model, batch, codes, "last")
    plain = decoders.logits_of(model.double(), batch, codes, "last")
    for mine, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_steps_with_a_cache_equal_teacher_forcing() -> None:
    decoders.check_steps_equal_teacher_forcing(build(FEATURED), coded_batch([3, 1, 9]), "last")


def test_beam_search_equals_scoring_every_item() -> None:
    model = randomised(build(FEATURED), 0.3)
    decoders.check_beam_search_equals_scoring_every_item(model, coded_batch([3, 1, 9]), "last")


@pytest.mark.parametrize("training", [True, False])
def test_a_request_does_not_see_its_batch(training: bool) -> None:
    decoders.check_independence_of_the_batch(build(FEATURED), "last", training)


def test_dropout_follows_the_step() -> None:
    model, batch = build().train(), coded_batch([5, 5])
    codes = decoders.requested_codes(batch, "last")
    one, again, two = (decoders.logits_of(model, batch, codes, "last", s)[2] for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert (one - two).abs().max() > 0.01


def test_without_data_every_parameter_takes_part() -> None:
    decoders.check_without_data(build(FEATURED), "last")


def test_every_parameter_learns() -> None:
    decoders.check_every_parameter_learns(build(FEATURED), "last")


def test_bfloat16_autocast() -> None:
    decoders.check_bfloat16(randomised(build(FEATURED), 0.2), "last")


def test_only_the_last_position_can_be_asked() -> None:
    with pytest.raises(ValueError, match="last event"):
        build().encode(coded_batch([3]), {}, 0, "every")


def test_codes_and_actions_that_are_missing_are_named() -> None:
    model, batch = build(), decoders.make_batch([3], 20)
    with pytest.raises(ValueError, match="tandem tokenize"):
        model.encode(batch, {}, 0, "last")
    no_actions = decoders.CatalogueSizes(9, 9, {}, {}, (4, 4))
    with pytest.raises(ValueError, match=r"model\.actions"):
        TIGER(CONFIG.model_copy(update={"actions": True}), (), no_actions)
    with pytest.raises(ValueError, match=r"model\.dwell_times is on.*map a column to `dwell`"):
        TIGER(CONFIG.model_copy(update={"dwell_times": True}), (), no_actions)


def test_flops_count_the_products() -> None:
    """Against a counter of the products over packed tokens, and attention counted by pairs."""
    model, length, requests = build().eval(), 5, 4
    batch = coded_batch([length] * requests)
    codes = decoders.requested_codes(batch, "last")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoders.logits_of(model, batch, codes, "last")
    counts = counter.get_flop_counts()["Global"]
    total = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    inner, tokens = HEADS * HEAD_WIDTH, length * LEVELS
    pairs = 2 * tokens * tokens + 2 * (LEVELS * tokens + LEVELS * (LEVELS + 1) // 2)
    total += requests * pairs * 4 * inner
    assert model.flops_per_token(length) * length * requests == pytest.approx(total)
