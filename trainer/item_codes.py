"""From a fitted quantizer to staged codes, part by part, ready for the collision policy.

Shape legend: n items of a part, D width, L code levels, K codes of the last level, C candidates.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from configs import storage
from data_loaders.cold_start import known_codes
from data_loaders.collisions import coded_rows, fixed_rows
from data_loaders.exchange import Report
from data_loaders.items import ItemPart
from data_loaders.shards import staged, write_table
from models.tokenizers.quality import squared_errors
from models.tokenizers.quantizer import Quantizer
from models.tokenizers.shards import Shard
from trainer.item_embeddings import ItemEmbeddings

CODED = "coded"
"""Name of the staged table."""
MOST_CANDIDATES = 256
"""Codes of the last level that an item may move to by nearness; up to this size of it, all."""
ROWS_AT_ONCE = 4096


def stage_shard(
    shard: Shard, parts: Sequence[ItemPart], staging_url: str, quantizer: Quantizer, ranked: bool
) -> None:
    """Task: stage the codes that fitting gave to the shard's items.

    `ranked` adds what next_best needs: candidates of the last level and distances.
    """
    for index, part in enumerate(parts):
        begin = part.first_id - 1 - shard.first_row
        if part.rows and 0 <= begin < len(shard.rows):
            rows = slice(begin, begin + part.rows)
            ids = np.arange(part.first_id, part.first_id + part.rows)
            raw = part.column("item")
            table = _coded(ids, raw, shard.rows[rows], shard.codes[rows], quantizer, ranked)
            write_table(staging_url, staged(CODED, index), table)


def stage_new(
    embeddings: ItemEmbeddings, quantizer: Quantizer, ranked: bool, levels: int, part: int
) -> Report:
    """Stage a part's items: known ones with their earlier ids, new ones with fresh codes.

    Returns:
        `rows`, `known`, and of the new ones `sums`: those of `quality.squared_errors`, but for
        their number, which is `rows` less `known`.
    """
    items, staging = embeddings.parts[part], embeddings.staging_url
    if not items.rows:
        return {"rows": 0, "known": 0, "sums": None}
    raw = items.column("item").combine_chunks()
    known_ids, codes = known_codes(staging, part)
    is_new = np.ones(items.rows, bool)
    is_new[known_ids - items.first_id] = False
    tables, sums = [], None
    if len(known_ids):
        names = raw.take(pa.array(known_ids - items.first_id))
        tables.append(fixed_rows(known_ids, names, codes, levels))
    if is_new.any():
        x = embeddings.matrix(part)[torch.from_numpy(is_new)]
        ids = items.first_id + np.flatnonzero(is_new)
        names = raw.filter(pa.array(is_new))
        fresh = quantizer.encode(x)
        tables.append(_coded(ids, names, x, fresh, quantizer, ranked))
        error, square, total, _ = squared_errors(x, quantizer.decode(fresh))
        sums = [error, square, total.tolist()]
    write_table(staging, staged(CODED, part), pa.concat_tables(tables))
    return {"rows": items.rows, "known": len(known_ids), "sums": sums}


def staged_codes(parts: Sequence[ItemPart], staging_url: str) -> list[str]:
    """URLs of what the two functions above staged."""
    filled = [index for index, part in enumerate(parts) if part.rows]
    return [storage.join(staging_url, staged(CODED, index)) for index in filled]


def _coded(
    ids: np.ndarray,
    raw: pa.Array | pa.ChunkedArray,
    x: Tensor,
    codes: Tensor,
    quantizer: Quantizer,
    ranked: bool,
) -> pa.Table:
    more: dict[str, Any] = {}
    if ranked:
        blocks = zip(x.split(ROWS_AT_ONCE), codes.split(ROWS_AT_ONCE), strict=True)
        rankings = [_candidates(quantizer, *block) for block in blocks]
        errors = (x - quantizer.decode(codes)).square().sum(1)
        more = {"candidates": torch.cat(rankings).cpu().numpy(), "distances": errors.cpu().numpy()}
    return coded_rows(ids, raw, codes.cpu().numpy(), **more)


def _candidates(quantizer: Quantizer, x: Tensor, codes: Tensor) -> Tensor:
    """Codes of the last level from nearest to farthest, the own one first: [n, C]."""
    ranking = quantizer.ranked_last_level(x, codes)
    # Balanced codes need not be the nearest.
    own_first = (ranking != codes[:, -1:]).to(torch.int8).argsort(dim=1, stable=True)
    return ranking.gather(1, own_first)[:, :MOST_CANDIDATES]
