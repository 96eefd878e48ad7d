"""`tandem bench decoders`: what a training sample costs, by architecture, at equal parameters.

Lazy decoder, encoder-decoder (OneRec-V1's, its short-term pathway alone) and naive decoder-only see
the same histories, one token an event, and learn the newest item alone. The lazy decoder sets the
number of parameters; the others' feed-forward widths are fitted to it.

Shape legend: N requests, S events of each history, L code levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from configs import storage
from configs.decoders import LazyDecoderConfig, OneRecConfig
from models.base import CatalogueSizes, CodeDecoder
from models.batch import JaggedBatch
from models.lazy_decoder import LazyDecoder
from models.onerec import OneRec
from trainer.bench.measure import best_of, machine, table
from trainer.bench.naive_decoder import NaiveDecoder

ITEMS = 1000
PAPER = {"lazy decoder": 18.9, "encoder-decoder": 296.0, "naive decoder-only": 635.0}
"""GFLOPs of a sample, forward and backward, at 1B parameters (arXiv 2508.20900, section 3)."""
PAPER_SHAPE = {"width": 2048, "layers": 24, "heads": 16, "levels": 3, "codes": 8192}
PAPER_HISTORY = 100
"""Context tokens at which the paper's figure of naive decoder-only is 6 × parameters × tokens."""


@dataclass(frozen=True)
class Shape:
    """Sizes that the contenders share."""

    width: int
    layers: int
    heads: int
    levels: int
    codes: int
    history: int

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_1 … K_L."""
        return (self.codes,) * self.levels


@dataclass(frozen=True)
class DecoderRow:
    """One architecture."""

    name: str
    parameters: int
    gflops: float
    """Of a sample, forward and backward, counted by PyTorch."""
    ms: float
    """Of a sample, forward and backward."""
    gflops_1b: float
    """The same at 1B parameters, from the architectures' formulas (tested against counts)."""
    paper_gflops_1b: float


def bench_decoders(
    output: str, shape: Shape, *, batch: int, repeats: int, seed: int, say: Callable[[str], None]
) -> list[DecoderRow]:
    """Measure, print, and leave `decoders.json` below `output` (any URL).

    Raises:
        ValueError: sizes at which the parameters cannot be made equal.
    """
    if shape.width % shape.heads:
        raise ValueError(f"--heads {shape.heads} must divide --width {shape.width}")
    torch.manual_seed(seed)
    events = torch.randint(0, shape.codes, (batch, shape.history, shape.levels))
    targets = torch.randint(0, shape.codes, (batch, shape.levels))
    at_1b = _formulas(Shape(**PAPER_SHAPE, history=PAPER_HISTORY))
    rows = []
    for name, model in _contenders(shape).items():
        run = partial(_train, model, events, targets)
        run()  # warm
        with FlopCounterMode(display=False) as counter:
            run()
        gflops = counter.get_total_flops() / batch / 1e9
        seconds, _ = best_of(run, repeats, budget_s=60.0)
        parameters, ms = _count(model), seconds / batch * 1e3
        rows.append(DecoderRow(name, parameters, gflops, ms, at_1b[name], PAPER[name]))
    for line in _report(rows, shape):
        say(line)
    document: dict[str, Any] = {"shape": asdict(shape), "batch": batch, "seed": seed}
    document |= {"machine": machine(), "rows": [asdict(row) for row in rows]}
    storage.write_json(storage.join(output, "decoders.json"), document)
    return rows


def _contenders(shape: Shape) -> dict[str, nn.Module]:
    """The three at equal parameters, on the default device."""
    lazy = _lazy(shape)
    target = _count(lazy)
    fitted = {
        "encoder-decoder": _fitted(partial(_encoder_decoder, shape), target),
        "naive decoder-only": _fitted(partial(_naive, shape), target),
    }
    return {"lazy decoder": lazy, **fitted}


def _lazy(shape: Shape) -> LazyDecoder:
    config = LazyDecoderConfig(
        width=shape.width,
        num_layers=shape.layers,
        num_heads=shape.heads,
        feedforward_width=2 * shape.width,
        dropout=0.0,
        history=shape.history,
    )
    return LazyDecoder(config, (), _catalogue(shape))


def _encoder_decoder(shape: Shape, inner: int) -> OneRec:
    """Half of the blocks encode, half decode, as in the paper's comparison."""
    config = OneRecConfig(
        width=shape.width,
        num_encoder_layers=shape.layers - shape.layers // 2,
        num_decoder_layers=shape.layers // 2,
        num_heads=shape.heads,
        feedforward_width=inner,
        dropout=0.0,
        history=shape.history,
    )
    return OneRec(config, (), _catalogue(shape))


def _naive(shape: Shape, inner: int) -> NaiveDecoder:
    return NaiveDecoder(
        shape.codebook_sizes, shape.history, shape.width, shape.layers, shape.heads, inner
    )


def _catalogue(shape: Shape) -> CatalogueSizes:
    return CatalogueSizes(ITEMS, 1, {}, {}, shape.codebook_sizes)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _fitted(build: Callable[[int], nn.Module], target: int) -> nn.Module:
    """The model whose feed-forward width comes closest to `target` parameters.

    Raises ValueError where even the narrowest has more.
    """
    with torch.device("meta"):
        one, two = _count(build(1)), _count(build(2))
    inner = round((target - one) / (two - one)) + 1  # parameters are linear in it
    if inner < 1:
        raise ValueError(
            f"with {one:,} parameters the narrowest rival is larger than the lazy decoder's "
            f"{target:,}; raise --layers or --width"
        )
    return build(inner)


def _train(model: nn.Module, events: Tensor, targets: Tensor) -> None:
    """Forward and backward of one batch."""
    model.zero_grad()
    if isinstance(model, CodeDecoder):
        context = model.encode(_requests(events), {}, 0, "last")
        logits = model.teacher_forced(context, targets)
    else:
        logits = model(events, targets)
    losses = [F.cross_entropy(scores, targets[:, at]) for at, scores in enumerate(logits)]
    torch.stack(losses).sum().backward()


def _requests(events: Tensor) -> JaggedBatch:
    """Histories of equal length with these codes [N, S, L]."""
    requests, history = events.shape[:2]
    tokens = torch.arange(requests * history)
    return JaggedBatch(
        sample_ids=torch.arange(requests),
        user_ids=torch.arange(requests) + 1,
        offsets=torch.arange(requests + 1) * history,
        item_ids=tokens % ITEMS + 1,
        timestamps=tokens,
        next_timestamps=tokens + 1,
        target_ids=torch.zeros_like(tokens),
        item_codes=events.flatten(0, 1),
    )


def _formulas(shape: Shape) -> dict[str, float]:
    """GFLOPs of a sample, forward and backward (twice the forward), without building weights."""
    with torch.device("meta"):
        models = _contenders(shape)
    forward = {
        name: model.flops()
        if isinstance(model, NaiveDecoder)
        else model.flops_per_token(shape.history) * shape.history  # type: ignore[operator]
        for name, model in models.items()
    }
    return {name: 3 * flops / 1e9 for name, flops in forward.items()}


def _report(rows: Sequence[DecoderRow], shape: Shape) -> list[str]:
    first = rows[0]
    header = (
        "",
        "parameters",
        "GFLOPs",
        "ratio",
        "ms",
        "ratio",
        "at 1B",
        "ratio",
        "paper",
        "ratio",
    )
    cells = [
        (
            row.name,
            f"{row.parameters:,}",
            f"{row.gflops:.3f}",
            f"{row.gflops / first.gflops:.1f}",
            f"{row.ms:.2f}",
            f"{row.ms / first.ms:.1f}",
            f"{row.gflops_1b:.1f}",
            f"{row.gflops_1b / first.gflops_1b:.1f}",
            f"{row.paper_gflops_1b:.1f}",
            f"{row.paper_gflops_1b / first.paper_gflops_1b:.1f}",
        )
        for row in rows
    ]
    return [
        f"a sample, forward and backward: {shape.history} events, {shape.levels} levels of "
        f"{shape.codes} codes, width {shape.width}, {shape.layers} blocks; ratios to the first",
        table(header, cells),
        f"at 1B: our formulas at width {PAPER_SHAPE['width']}, {PAPER_SHAPE['layers']} blocks, "
        f"{PAPER_HISTORY} events; paper: arXiv 2508.20900",
    ]
