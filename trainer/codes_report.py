"""What is told of a table of semantic ids: numbers for its manifest, a summary for the terminal."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from data_loaders.semantic_ids import SemanticIdManifest
from models.tokenizers.quality import QUERIES, level_use

POINTS = 128
"""Most points that the sizes of a level's codes are kept with."""
DIGITS = 6


def usage_report(usage: Sequence[np.ndarray]) -> dict[str, Any]:
    """Use of each level from the items of each of its codes, int64 [K_l].

    Returns:
        `levels`: a dict each, of `codes`, the fields of `LevelUse`, and `sizes`: items of the codes
        from the largest on, at most `POINTS` of them, evenly spaced by rank.
    """
    levels = []
    for counts in usage:
        use = {
            name: _rounded(value)
            for name, value in asdict(level_use(torch.from_numpy(counts))).items()
        }
        ordered = np.sort(counts)[::-1]
        chosen = np.unique(np.linspace(0, len(ordered) - 1, POINTS).round().astype(np.int64))
        ranks = [int(rank) for rank in chosen]
        levels.append(
            {"codes": len(counts), **use, "ranks": ranks, "sizes": ordered[chosen].tolist()}
        )
    return {"levels": levels}


def _rounded(value: float | int) -> float | int:
    return value if isinstance(value, int) else round(value, DIGITS)


def summarize_codes(manifest: SemanticIdManifest) -> str:
    """Lines for the terminal, without a final line break."""
    report = manifest.report
    collisions = report["collisions"]
    lines = [f"{manifest.num_items:,} items, codes {' × '.join(map(str, manifest.codebook_sizes))}"]
    for number, level in enumerate(report["levels"], 1):
        lines.append(
            f"  level {number}: {level['utilisation']:7.1%} of {level['codes']:,} codes used, "
            f"entropy {level['normalized_entropy']:.3f}, Gini {level['gini']:.3f}, items a code "
            f"{level['smallest']:,} to {level['largest']:,}"
        )
    lines.append(
        f"  items with an id of their own: {collisions['unique_before']:.1%} as quantized, "
        f"{collisions['unique_after']:.1%} in the table; largest group {collisions['largest']:,}"
    )
    if collisions["moved"]:
        lines.append(f"  {collisions['moved']:,} items moved to their next-best free code")
    if collisions["remaining"]:
        lines.append(f"  {collisions['remaining']:,} items share an id with an earlier one")
    if "sample" in report:
        sample = report["sample"]
        errors = ", ".join(f"{error:.4f}" for error in sample["reconstruction"])
        as_quantized = " as quantized" if collisions["moved"] else ""
        near, chance = (sample["neighbours"][k] for k in ("first_code", "random_first_code"))
        lines.append(
            f"  reconstruction error over variance {errors}{as_quantized}, of "
            f"{sample['items']:,} items; "
            f"{near:.1%} of the nearest neighbours of {min(sample['items'], QUERIES):,} share the "
            f"first code ({chance:.1%} by chance)"
        )
    if manifest.cold_start is not None:
        cold = manifest.cold_start
        lines.append(
            f"  {cold.known_items:,} items keep their ids, {cold.new_items:,} are new, "
            f"{cold.retired_items:,} retired"
        )
        if (error := report["new_items"]["reconstruction"]) is not None:
            lines.append(
                f"  reconstruction error over variance {error:.4f} of the new items; far above "
                "that of the items which the tokenizer was fitted to, they need another fit"
            )
    lines.append(f"  semantic ids {manifest.fingerprint[:12]}, tokenizer {manifest.tokenizer[:12]}")
    return "\n".join(lines)
