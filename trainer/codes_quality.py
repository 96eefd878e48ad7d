"""What a tokenizer's codes are worth, on a bounded sample of items that depends on no sharding.

Shape legend: n sampled items, D width, L code levels.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from data_loaders.exchange import Report
from models.ops.hashing import mix64
from models.tokenizers.quality import neighbour_agreement, relative_error, squared_errors
from models.tokenizers.quantizer import Quantizer
from models.tokenizers.residual_quantizer import ResidualQuantizer
from models.tokenizers.shards import Shard, Shards

SAMPLED_ITEMS = 1 << 15
HASH_BITS = 32
DIGITS = 6


@dataclass(frozen=True)
class Quality:
    """Numbers of a sample, rounded so that they are the same on every machine."""

    items: int
    """n"""
    reconstruction: list[float]
    """Squared error over variance after each level (ordered levels), or of all digits together."""
    neighbours: dict[str, float]
    """`models.tokenizers.quality.NeighbourAgreement` in the sample."""


def measure_quality(shards: Shards, quantizer: Quantizer, seed: int) -> Quality:
    """Measure the codes that fitting gave to the shards' items."""
    total = sum(shards.map(count_rows))
    share = min(SAMPLED_ITEMS / total, 1.0)
    parts = shards.map(sample_codes, seed, int(share * (1 << HASH_BITS)))
    rows, codes = (torch.cat([part[index] for part in parts]) for index in (0, 1))
    agreement = neighbour_agreement(rows, codes, seed=seed)
    return Quality(
        items=len(rows),
        reconstruction=[round(e, DIGITS) for e in _errors(quantizer.to("cpu"), rows, codes)],
        neighbours={name: round(value, DIGITS) for name, value in asdict(agreement).items()},
    )


def new_items_error(reports: Sequence[Report]) -> dict[str, Any]:
    """What a frozen quantizer makes of items that it was not fitted to, from `stage_new`'s reports.

    Returns:
        `items`, and `reconstruction`: their squared error over their variance, None for fewer than
        two, which have none.
    """
    new = [report for report in reports if report["sums"] is not None]
    counts = [report["rows"] - report["known"] for report in new]
    parts = [
        (error, square, torch.tensor(total, dtype=torch.float64), count)
        for (error, square, total), count in zip((r["sums"] for r in new), counts, strict=True)
    ]
    error = round(relative_error(parts), DIGITS) if sum(counts) > 1 else None
    return {"items": sum(counts), "reconstruction": error}


def count_rows(shard: Shard) -> int:
    """Task: items of a shard."""
    return len(shard.rows)


def sample_codes(shard: Shard, seed: int, threshold: int) -> tuple[Tensor, Tensor]:
    """Task: embeddings [n, D] and codes [n, L] of the items whose hash is below `threshold`."""
    hashed = mix64(mix64(shard.row_ids) + seed + 1) & ((1 << HASH_BITS) - 1)
    chosen = hashed < threshold
    return shard.rows[chosen].cpu(), shard.codes[chosen].cpu()


def _errors(quantizer: Quantizer, rows: Tensor, codes: Tensor) -> list[float]:
    """Relative error after 1, 2, … L levels, or of all digits where they have no order."""
    levels = range(1, len(quantizer.codebook_sizes) + 1)
    if not isinstance(quantizer, ResidualQuantizer):
        return [relative_error([squared_errors(rows, quantizer.decode(codes))])]
    return [
        relative_error([squared_errors(rows, _first_levels(quantizer, level).decode(codes))])
        for level in levels
    ]


def _first_levels(quantizer: ResidualQuantizer, levels: int) -> ResidualQuantizer:
    """The quantizer without what later levels add."""
    shorter = copy.deepcopy(quantizer)
    with torch.no_grad():
        for codebook in list(shorter.codebooks)[levels:]:
            codebook.zero_()
    return shorter
