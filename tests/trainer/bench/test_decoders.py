"""The naive decoder-only model and what `tandem bench decoders` claims."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.code_reference import feed_forward, linear, read, rms
from trainer.bench.decoders import PAPER, Shape, _fitted, _naive, bench_decoders
from trainer.bench.naive_decoder import NaiveBlock, NaiveDecoder

SHAPE = Shape(width=16, layers=2, heads=2, levels=3, codes=8, history=12)


def build() -> NaiveDecoder:
    torch.manual_seed(0)
    return NaiveDecoder((8, 8, 8), history=4, width=6, num_layers=2, num_heads=2, inner=5)


def by_loops(model: NaiveDecoder, events: torch.Tensor, codes: torch.Tensor) -> list[torch.Tensor]:
    """Logits of one request, token by token."""
    rows = [
        sum((model.embedding.rows[8 * level + code] for level, code in enumerate(event)), 0.0)
        for event in events.tolist()
    ]
    rows.append(torch.zeros(6))  # BOS: its place alone
    rows += [model.embedding.rows[8 * at + code] for at, code in enumerate(codes[:-1].tolist())]
    rows = [row + model.places.weight[at] for at, row in enumerate(rows)]
    for block in model.blocks:
        assert isinstance(block, NaiveBlock)
        parts = [linear(block.qkv, rms(block.attention_norm, x)).view(3, 2, 3) for x in rows]
        keys, values = [p[1] for p in parts], [p[2] for p in parts]
        rows = [
            x + linear(block.output, read(p[0], keys[: at + 1], values[: at + 1]).float())
            for at, (x, p) in enumerate(zip(rows, parts, strict=True))
        ]
        rows = [x + feed_forward(block.feedforward, rms(block.feedforward_norm, x)) for x in rows]
    return [
        linear(head, rms(model.norm, x)) for head, x in zip(model.heads, rows[-3:], strict=True)
    ]


def test_naive_decoder_equals_loops() -> None:
    model = build()
    events, codes = torch.randint(0, 8, (2, 4, 3)), torch.randint(0, 8, (2, 3))
    with torch.no_grad():
        actual = model(events, codes)
        for n in range(2):
            for got, wanted in zip(actual, by_loops(model, events[n], codes[n]), strict=True):
                torch.testing.assert_close(got[n], wanted, atol=1e-5, rtol=1e-5)


def test_naive_flops_count_the_products() -> None:
    model = build()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 8, (2, 4, 3)), torch.randint(0, 8, (2, 3)))
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    pairs = 7 * 8 // 2
    assert model.flops() * 2 == products + 2 * 2 * pairs * 2 * 2 * 6


def test_bench_compares_equals_and_leaves_a_file(tmp_path: Path) -> None:
    lines: list[str] = []
    rows = bench_decoders(str(tmp_path), SHAPE, batch=2, repeats=1, seed=0, say=lines.append)
    assert [row.name for row in rows] == list(PAPER)
    counts = [row.parameters for row in rows]
    assert max(counts) < 1.03 * min(counts)
    assert rows[0].gflops < rows[1].gflops < rows[2].gflops
    for row in rows:  # our formulas at 1B land where the paper's figures are
        assert row.gflops_1b == pytest.approx(row.paper_gflops_1b, rel=0.3)
        assert row.ms > 0
        assert any(row.name in line for line in lines)
    saved = json.loads((tmp_path / "decoders.json").read_text())
    assert [row["gflops"] for row in saved["rows"]] == [row.gflops for row in rows]


def test_rivals_that_cannot_be_fitted_are_refused() -> None:
    with pytest.raises(ValueError, match="narrowest rival is larger"):
        _fitted(partial(_naive, SHAPE), target=10)
    with pytest.raises(ValueError, match="--heads 3 must divide --width 16"):
        bench_decoders("nowhere", replace(SHAPE, heads=3), batch=2, repeats=1, seed=0, say=print)
