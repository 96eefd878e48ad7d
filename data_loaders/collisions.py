"""Items with equal codes, made distinct by workers that each hold the ids of one hash.

Rows come staged by items part (`coded_rows`), are exchanged by a hash of their codes, so that items
which could clash meet in one partition, and go back to the items' parts. The result depends on the
rows alone, not on parts or partitions.

Shape legend: n rows of a partition, L code levels, G groups, C candidates.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from configs import storage
from data_loaders.exchange import PARTITION, Progress, Report, exchange
from data_loaders.items import ItemPart
from data_loaders.manifest import FileEntry
from data_loaders.semantic_ids import code_lists, codes_of, write_codes
from data_loaders.shards import read_table, staged, write_table
from models.ops.hashing import mix64

Policy = Literal["extra_digit", "next_best", "keep"]
FREE = -1
"""Digit of a row that has none yet."""


@dataclass(frozen=True)
class Resolved:
    """The finished table's parts and what collided on the way."""

    parts: tuple[FileEntry, ...]
    retired: tuple[FileEntry, ...]
    codebook_sizes: tuple[int, ...]
    collisions: dict[str, Any]
    """`groups`: power of two b → ids that b ≤ items < 2b share, before the policy; `unique_before`,
    `unique_after`: shares of items whose id no other item has; `largest`; `moved`; `remaining`."""
    usage: list[np.ndarray]
    """Items of each code, int64 [K_l] a level."""


def coded_rows(
    item_ids: np.ndarray,
    raw_ids: pa.ChunkedArray | pa.Array,
    codes: np.ndarray,
    *,
    candidates: np.ndarray | None = None,
    distances: np.ndarray | None = None,
    digits: np.ndarray | None = None,
    fixed: bool = False,
) -> pa.Table:
    """Rows to resolve.

    Args:
        item_ids: int64 [n]; 0 for items that the data set lacks but whose ids stay taken.
        raw_ids: string [n].
        codes: [n, L].
        candidates: [n, C] codes of the last level, nearest first (the item's own is the first).
        distances: float32 [n] to the own code: of several items the closest keeps it.
        digits: [n] extra digits of fixed rows.
        fixed: whether these ids must not change.
    """
    n = len(item_ids)
    columns = {
        "item_id": pa.array(item_ids.astype(np.int64)),
        "item": raw_ids,
        "codes": code_lists(codes),
        "digit": pa.array(np.full(n, FREE) if digits is None else digits, pa.int64()),
        "fixed": pa.array(np.full(n, fixed)),
        "distance": pa.array(np.zeros(n) if distances is None else distances, pa.float32()),
        "candidates": code_lists(np.zeros((n, 0), np.int32) if candidates is None else candidates),
    }
    return pa.table(columns)


def fixed_rows(
    item_ids: np.ndarray, raw_ids: pa.ChunkedArray | pa.Array, codes: np.ndarray, levels: int
) -> pa.Table:
    """Rows of an earlier table, whose `codes` [n, L or L + 1] stay; beyond `levels` is a digit."""
    digits = codes[:, levels].astype(np.int64) if codes.shape[1] > levels else None
    return coded_rows(item_ids, raw_ids, codes[:, :levels], digits=digits, fixed=True)


def resolve(
    urls: Sequence[str],
    parts: Sequence[ItemPart],
    policy: Policy,
    codebook_sizes: Sequence[int],
    *,
    reserve: int,
    least_digits: int,
    staging_url: str,
    output_url: str,
    partitions: int,
    progress: Progress,
) -> Resolved:
    """Apply a policy to all staged rows and write the table's parts.

    Args:
        urls: staged `coded_rows`, together all items of `parts`, in any order.
        codebook_sizes: of the codes as the quantizer gave them.
        reserve: codes of the extra digit to keep free.
        least_digits: size that the extra digit's codebook has at least (an earlier table's).
    """
    keys = len(codebook_sizes) - (policy == "next_best")
    settle = functools.partial(_settle_step, policy, codebook_sizes[-1], staging_url, output_url)
    load = functools.partial(_load_rows, keys, partitions)
    reports = exchange("collisions", progress, list(urls), load, settle, partitions)
    sizes = tuple(codebook_sizes)
    if policy == "extra_digit":
        largest_digit = max(report["digits"] for report in reports)
        fits = 0 < largest_digit <= least_digits  # then the earlier table's reserve is spent
        sizes += (least_digits if fits else largest_digit + reserve,)
    settled = [
        storage.join(staging_url, staged("settled", report[PARTITION]))
        for report in reports
        if report["items"]
    ]
    starts = np.array([part.first_id for part in parts])
    written = exchange(
        "write codes",
        progress,
        settled,
        functools.partial(_load_settled, starts),
        functools.partial(_write_step, output_url, parts, sizes),
        len(parts),
    )
    entries = {report[PARTITION]: FileEntry(**report["entry"]) for report in written}
    for index, part in enumerate(parts):
        if not part.rows:
            entries[index] = _write_empty(output_url, index, part.first_id, sizes)
    return Resolved(
        parts=tuple(entries[index] for index in range(len(parts))),
        retired=tuple(FileEntry(**r["retired"]) for r in reports if r["retired"]),
        codebook_sizes=sizes,
        collisions=_totals(reports),
        usage=[
            np.sum([report["usage"][level] for report in written], axis=0)
            for level in range(len(sizes))
        ],
    )


def extra_digits(codes: np.ndarray, digits: np.ndarray, item_ids: np.ndarray) -> np.ndarray:
    """Number the rows of equal codes: int64 [n].

    Rows that have a digit keep it; the others follow in the order of their item ids, from the
    group's highest digit on, so that ids given before never move.
    """
    _, group = np.unique(codes, axis=0, return_inverse=True)
    group = group.reshape(-1)
    free = digits == FREE
    next_digit = np.zeros(group.max(initial=-1) + 1, np.int64)
    np.maximum.at(next_digit, group[~free], digits[~free] + 1)
    order = np.lexsort([item_ids, group])
    order = order[free[order]]
    sizes = np.bincount(group[order], minlength=len(next_digit))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    result = digits.copy()
    result[order] = next_digit[group[order]] + rank
    return result


def next_best(
    codes: np.ndarray,
    candidates: np.ndarray,
    distances: np.ndarray,
    fixed: np.ndarray,
    item_ids: np.ndarray,
    size: int,
) -> tuple[np.ndarray, int]:
    """Move items of equal codes to free codes of the last level: int [n, L], rows that found none.

    Round r offers each item that has no place its r-th nearest code; of several that want a free
    code the closest to its first choice gets it, then the lowest id. Whoever finds none among its
    candidates takes the lowest of the last level's `size` codes that is free, and keeps its own
    where none is. The ids of fixed rows stay theirs.
    """
    _, group = np.unique(codes[:, :-1], axis=0, return_inverse=True)
    slots = group.reshape(-1).astype(np.int64) * size
    taken = np.unique(slots[fixed] + codes[fixed, -1])
    placed = codes.copy()
    pending = np.flatnonzero(~fixed)
    pending = pending[np.lexsort([item_ids[pending], distances[pending]])]
    for choice in range(candidates.shape[1]):
        if not len(pending):
            break
        wanted = slots[pending] + candidates[pending, choice]
        free = ~np.isin(wanted, taken)
        # The first of each slot: `pending` is in the order of precedence.
        claims, first = np.unique(wanted[free], return_index=True)
        winners = np.flatnonzero(free)[first]
        placed[pending[winners], -1] = candidates[pending[winners], choice]
        taken = np.union1d(taken, claims)
        pending = np.delete(pending, winners)
    places = _lowest_free(slots[pending] // size, taken, size)
    found = places >= 0
    placed[pending[found], -1] = places[found]
    return placed, int((~found).sum())


def _lowest_free(groups: np.ndarray, taken: np.ndarray, size: int) -> np.ndarray:
    """A code of its own for each row of these groups, in order: int [n], -1 where none is left.

    `taken` are the slots group · size + code that are not free.
    """
    known, group = np.unique(groups, return_inverse=True)
    is_free = np.ones((len(known), size), bool)  # groups that ran out of candidates are large: few
    here = np.isin(taken // size, known)
    is_free[np.searchsorted(known, taken[here] // size), taken[here] % size] = False
    counts, (_, codes) = is_free.sum(1), np.nonzero(is_free)
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group, minlength=len(known))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    first = np.cumsum(counts) - counts
    result = np.full(len(group), -1)
    fits = rank < counts[group]
    result[fits] = codes[first[group[fits]] + rank[fits]]
    return result


def _load_rows(keys: int, partitions: int, url: str) -> Iterator[pa.Table]:
    """Staged rows with the partition of their first `keys` codes."""
    rows = read_table(url)
    if not rows.num_rows:
        return
    codes = torch.from_numpy(codes_of(rows["codes"])[:, :keys].astype(np.int64))
    hashed = torch.zeros(len(codes), dtype=torch.int64)
    for level in range(keys):
        hashed = mix64(hashed + codes[:, level] + 1)
    partition = (hashed.numpy().view(np.uint64) % np.uint64(partitions)).astype(np.int64)
    yield rows.append_column(PARTITION, pa.array(partition))


def _settle_step(
    policy: Policy, size: int, staging_url: str, output_url: str, partition: int, rows: pa.Table
) -> Report:
    """Make the ids of a partition distinct and stage them; what stays taken is written.

    `size` is that of the last level.
    """
    rows = rows.sort_by([("item_id", "ascending"), ("item", "ascending")])
    ids, codes = rows["item_id"].to_numpy(), codes_of(rows["codes"])
    digits, fixed = rows["digit"].to_numpy(), rows["fixed"].to_numpy()
    present = ids > 0
    report: Report = {"rows": rows.num_rows, "items": int(present.sum()), "digits": 0}
    report |= {"retired": None, **_groups(codes[present])}
    final = codes
    if policy == "extra_digit":
        digits = extra_digits(codes, digits, ids)
        final = np.concatenate([codes, digits[:, None].astype(np.int32)], axis=1)
        report["digits"] = int(digits.max()) + 1
    elif policy == "next_best":
        final, _ = next_best(codes, _rankings(rows), rows["distance"].to_numpy(), fixed, ids, size)
    report["moved"] = int((final[:, : codes.shape[1]] != codes).any(1)[present].sum())
    after = _groups(final[present])
    report |= {"unique_after": after["unique"], "remaining": report["items"] - after["distinct"]}
    table = pa.table({"item_id": ids, "item": rows["item"], "codes": code_lists(final)})
    write_table(staging_url, staged("settled", partition), table.filter(pa.array(present)))
    if not present.all():
        gone = table.filter(pa.array(~present)).drop_columns(["item_id"])
        report["retired"] = write_table(output_url, staged("retired", partition), gone).model_dump()
    return report


def _rankings(rows: pa.Table) -> np.ndarray:
    """Candidates [n, C] of each row; fixed rows, which have none, hold zeros."""
    free = ~rows["fixed"].to_numpy()
    if not free.any():
        return np.zeros((len(free), 0), np.int32)
    of_free = codes_of(rows["candidates"].filter(pa.array(free)))
    rankings = np.zeros((len(free), of_free.shape[1]), np.int32)
    rankings[free] = of_free
    return rankings


def _groups(codes: np.ndarray) -> Report:
    """How many rows [n, L] share an id with how many others."""
    sizes = np.unique(codes, axis=0, return_counts=True)[1] if len(codes) else np.zeros(0, int)
    exponents = np.frexp(sizes.astype(np.float64))[1] - 1
    bins, counts = np.unique(exponents, return_counts=True)
    return {
        "groups": {1 << int(b): int(n) for b, n in zip(bins, counts, strict=True)},
        "unique": int((sizes == 1).sum()),
        "distinct": len(sizes),
        "largest": int(sizes.max(initial=0)),
    }


def _totals(reports: Sequence[Report]) -> dict[str, Any]:
    groups: Counter[int] = Counter()
    for report in reports:
        groups.update({int(size): count for size, count in report["groups"].items()})
    items = sum(report["items"] for report in reports)
    return {
        "groups": {str(size): groups[size] for size in sorted(groups)},
        "unique_before": sum(report["unique"] for report in reports) / items,
        "unique_after": sum(report["unique_after"] for report in reports) / items,
        "distinct_before": sum(report["distinct"] for report in reports) / items,
        "largest": max(report["largest"] for report in reports),
        "moved": sum(report["moved"] for report in reports),
        "remaining": sum(report["remaining"] for report in reports),
    }


def _load_settled(starts: np.ndarray, url: str) -> Iterator[pa.Table]:
    rows = read_table(url)
    partition = np.searchsorted(starts, rows["item_id"].to_numpy(), side="right") - 1
    yield rows.append_column(PARTITION, pa.array(partition))


def _write_step(
    output_url: str,
    parts: Sequence[ItemPart],
    codebook_sizes: Sequence[int],
    partition: int,
    rows: pa.Table,
) -> Report:
    part = parts[partition]
    rows = rows.sort_by("item_id")
    ids, codes = rows["item_id"].to_numpy(), codes_of(rows["codes"])
    wanted = np.arange(part.first_id, part.first_id + part.rows)
    assert np.array_equal(ids, wanted), "each item of the part has one row"
    entry = write_codes(output_url, partition, part.first_id, rows["item"], codes, codebook_sizes)
    usage = [np.bincount(codes[:, i], minlength=k).tolist() for i, k in enumerate(codebook_sizes)]
    return {"rows": part.rows, "entry": entry.model_dump(), "usage": usage}


def _write_empty(url: str, index: int, first_id: int, sizes: Sequence[int]) -> FileEntry:
    codes = np.zeros((0, len(sizes)), np.int32)
    return write_codes(url, index, first_id, pa.array([], pa.string()), codes, sizes)
