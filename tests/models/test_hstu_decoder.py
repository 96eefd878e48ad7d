"""HSTU over semantic ids: its decoder against loops, its reading against plain HSTU."""

import math
from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from configs.decoders import HSTUDecoderConfig
from models.base import TableSpec
from models.batch import JaggedBatch
from models.hstu_decoder import HSTUDecoder, WritingBlock
from models.layers.hstu_block import HSTUBlock
from models.ops.hstu_attention import TIME_THRESHOLDS
from tests.models import decoders
from tests.models.decoders import SIZES, coded_batch, randomised, rms, softmax_mix

CONFIG = HSTUDecoderConfig(
    width=8,
    num_layers=2,
    num_heads=2,
    qk_width=4,
    v_width=3,
    dropout=0.3,
    attention_slack=3,
    decoder_layers=2,
    decoder_heads=2,
    decoder_feedforward=10,
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
LEVELS, STARTS = 3, [0, 5, 12]


def build(config: HSTUDecoderConfig = CONFIG) -> HSTUDecoder:
    names = ["item"] if config.item_table else []
    names += [f"user_{n}" for n in config.user_features]
    names += [f"side_{n}" for n in config.side_features]
    specs = tuple(TableSpec(name, 60, config.width, 0.02) for name in names)
    return randomised(HSTUDecoder(config, specs, SIZES, decoders.MAX_LENGTH))


def plain_norm(row: Tensor) -> Tensor:
    centred = row - row.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt()


def hstu_block_by_loops(
    block: HSTUBlock, x: list[Tensor], times: list[int], following: list[int]
) -> list[Tensor]:
    """algorithms §1, steps 2 to 5, pair by pair."""
    divisor, heads, out = block.max_length, CONFIG.num_heads, []
    projected = [torch.nn.functional.silu(plain_norm(row) @ block.uvqk) for row in x]
    for i, row in enumerate(x):
        u, _, q, _ = projected[i].split(block.widths)
        mixed = torch.zeros(block.widths[1], dtype=row.dtype)
        for j in range(i + 1):
            _, v, _, k = projected[j].split(block.widths)
            bucket = sum(abs(following[i] - times[j]) >= t for t in TIME_THRESHOLDS)
            bias = block.position_bias[j - i + divisor - 1] + block.time_bias[bucket]
            parts = []
            for head in range(heads):
                logit = q.view(heads, -1)[head] @ k.view(heads, -1)[head] + bias
                weight = torch.nn.functional.silu(logit) / divisor
                parts.append(weight * v.view(heads, -1)[head])
            mixed = mixed + torch.cat(parts)
        out.append(block.output.weight @ (u * plain_norm(mixed)) + block.output.bias + row)
    return out


def writing_block_by_loops(block: WritingBlock, x: list[Tensor]) -> list[Tensor]:
    own, out = block.attention, []
    projected = [own.qkv.weight @ rms(block.attention_norm.weight, row) for row in x]
    for i, row in enumerate(x):
        heads = []
        for head in range(2):
            q, k, v = (slice(at + head * 4, at + head * 4 + 4) for at in (0, 8, 16))
            logits = [projected[i][q] @ projected[j][k] / 2 for j in range(i + 1)]
            heads.append(softmax_mix(logits, [projected[j][v] for j in range(i + 1)]))
        row = row + own.output.weight @ torch.cat(heads)
        normed = rms(block.feedforward_norm.weight, row)
        hidden = (block.feedforward.expand.weight @ normed).clamp(min=0)
        out.append(row + block.feedforward.contract.weight @ hidden)
    return out


def model_by_loops(model: HSTUDecoder, batch: JaggedBatch, rows: dict[str, Tensor]) -> list[Tensor]:
    """Logits after every event: L tensors [T, K_l], in the model's float64."""
    out: list[list[Tensor]] = [[] for _ in range(LEVELS)]
    codes, targets = decoders.item_codes(batch.item_ids), decoders.item_codes(batch.target_ids)
    features, scale = model.features, math.sqrt(8)
    for b, (start, end) in enumerate(decoders.spans(batch)):
        x = []
        for t in range(start, end):
            total = torch.zeros(8, dtype=torch.float64)
            for level in range(LEVELS):
                if batch.item_ids[t] > 0:
                    total = total + model.codes.rows[STARTS[level] + codes[t, level]]
            if rows:
                assert features.actions is not None and features.times is not None
                assert batch.action_ids is not None
                total = total + rows["item"][t] + rows["user_age"][b] + rows["side_device"][t]
                total = total + features.actions.weight[batch.action_ids[t]]
                elapsed = int(batch.next_timestamps[t] - batch.timestamps[t])
                total = total + features.times.weight[elapsed.bit_length() if elapsed > 0 else 0]
                assert features.dwell_times is not None and batch.dwell_times is not None
                seconds = float(batch.dwell_times[t])
                total = total + decoders.dwell_row(features.dwell_times.weight, seconds)
            x.append(total * scale + model.positions.weight[t - start])
        times = batch.timestamps[start:end].tolist()
        following = batch.next_timestamps[start:end].tolist()
        for block in model.blocks:
            assert isinstance(block, HSTUBlock)
            x = hstu_block_by_loops(block, x, times, following)
        for t, row in zip(range(start, end), x, strict=True):
            hidden = rms(model.hidden_norm.weight, row)
            y = [hidden]
            for level in range(LEVELS - 1):
                y.append(hidden + model.written.rows[STARTS[level] + targets[t, level]] * scale)
            for written in model.decoder:
                assert isinstance(written, WritingBlock)
                y = writing_block_by_loops(written, y)
            for level, (_, head) in enumerate(model.heads.named_parameters()):
                out[level].append(head @ rms(model.decoder_norm.weight, y[level]))
    return [torch.stack(level) for level in out]


@pytest.mark.parametrize("config", [CONFIG, FEATURED])
def test_model_equals_loops_forward_and_backward(config: HSTUDecoderConfig) -> None:
    model, batch = build(config).double().eval(), coded_batch([3, 0, 1, 6])
    decoders.check_gradients(model, batch, "every", lambda rows: model_by_loops(model, batch, rows))


def test_float32_kernels_equal_float64() -> None:
    model, batch = build(FEATURED).eval(), coded_batch([3, 1, 9, 6])
    codes = decoders.requested_codes(batch, "every")
    fast = decoders.logits_of(model, batch, codes, "every")
    plain = decoders.logits_of(model.double(), batch, codes, "every")
    for mine, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_last_position_is_one_of_every(training: bool) -> None:
    model, batch = build(FEATURED).train(training), coded_batch([3, 1, 9])
    every = decoders.logits_of(model, batch, decoders.requested_codes(batch, "every"), "every")
    last = decoders.logits_of(model, batch, decoders.requested_codes(batch, "last"), "last")
    for mine, whole in zip(last, every, strict=True):
        torch.testing.assert_close(mine, whole[batch.offsets[1:] - 1], atol=1e-5, rtol=1e-5)


def test_future_events_are_not_seen() -> None:
    model, batch = build(FEATURED).eval(), coded_batch([10])
    codes = decoders.requested_codes(batch, "every")
    before = decoders.logits_of(model, batch, codes, "every")
    assert batch.item_codes is not None
    batch.item_codes[6:] = (batch.item_codes[6:] + 1) % 4
    batch.timestamps[6:] += 10**7
    batch.next_timestamps[6:] += 10**7
    after = decoders.logits_of(model, batch, codes, "every")
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one[:6], two[:6], atol=1e-6, rtol=1e-6)
        assert (one[6:] - two[6:]).abs().amax(dim=1).min() > 1e-4


@pytest.mark.parametrize("positions", ["every", "last"])
def test_steps_with_a_cache_equal_teacher_forcing(positions: Literal["every", "last"]) -> None:
    decoders.check_steps_equal_teacher_forcing(build(FEATURED), coded_batch([3, 1, 9]), positions)


def test_beam_search_equals_scoring_every_item() -> None:
    model = randomised(build(FEATURED), 0.3)
    decoders.check_beam_search_equals_scoring_every_item(model, coded_batch([3, 1, 9]), "every")


@pytest.mark.parametrize("training", [True, False])
def test_a_request_does_not_see_its_batch(training: bool) -> None:
    decoders.check_independence_of_the_batch(build(FEATURED), "every", training)


def test_without_data_every_parameter_takes_part() -> None:
    decoders.check_without_data(build(FEATURED), "every")


def test_every_parameter_learns() -> None:
    decoders.check_every_parameter_learns(build(FEATURED), "every")


def test_bfloat16_autocast() -> None:
    decoders.check_bfloat16(randomised(build(FEATURED), 0.2), "every")


def test_a_longer_sequence_is_refused() -> None:
    assert build().longest_history == decoders.MAX_LENGTH
    with pytest.raises(ValueError, match="max_length"):
        build().encode(coded_batch([decoders.MAX_LENGTH + 4]), {}, 0, "every")


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValidationError, match="decoder_heads=3"):
        HSTUDecoderConfig(width=64, decoder_heads=3)


def test_flops_count_the_products() -> None:
    model, lengths = build().eval(), [3, 7, 1, 9]
    batch = coded_batch(lengths)
    codes = decoders.requested_codes(batch, "every")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoders.logits_of(model, batch, codes, "every")
    counts = counter.get_flop_counts()["Global"]
    total = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    pairs = sum(i + 1 for length in lengths for i in range(length))
    total += CONFIG.num_layers * pairs * 2 * CONFIG.num_heads * (CONFIG.qk_width + CONFIG.v_width)
    total += CONFIG.decoder_layers * sum(lengths) * LEVELS * (LEVELS + 1) // 2 * 4 * CONFIG.width
    mean_length = sum(n * n for n in lengths) / sum(lengths)
    assert model.flops_per_token(mean_length) * sum(lengths) == pytest.approx(total)
