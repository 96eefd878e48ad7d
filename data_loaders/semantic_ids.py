"""The item → semantic id table as a hashed artifact: Parquet parts parallel to the items' parts.

Its fingerprint goes into every checkpoint of a model that reads or writes semantic ids: codes of
another table mean other items, so a mismatch is refused.

Shape legend: V items of the catalogue, n items of a part, L code levels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from configs import storage
from configs.base import Config
from configs.tokenize import TokenizerConfig
from data_loaders.items import item_parts
from data_loaders.manifest import (
    MANIFEST,
    FileEntry,
    Sealed,
    read_manifest,
    read_sealed,
    seal,
    verify_shard,
    write_manifest,
)
from data_loaders.shards import read_table, write_table

MEND = "run `tandem tokenize RECIPE --force` to write the semantic ids anew"


class ColdStart(Config):
    """How the table continues one that an earlier data set was given."""

    semantic_ids: str
    """Fingerprint of the earlier table."""
    known_items: NonNegativeInt
    """Items that kept their codes."""
    new_items: NonNegativeInt
    """Items that got codes from the frozen tokenizer."""
    retired_items: NonNegativeInt
    """Items of the earlier table that the data set lacks; no new item gets their codes."""


class SemanticIdManifest(Sealed):
    """Semantic ids of all items of a prepared data set."""

    format: Literal[1] = 1
    data: str
    """Fingerprint of the data set whose items these are."""
    tokenizer: str
    """Hash of the tokenizer: its settings, its inputs' hashes and its trained weights."""
    settings: TokenizerConfig | None = None
    """None where the ids were made elsewhere; such a table cannot be continued."""
    request: str = ""
    """Hash of all that decided the table; the stage is not run again where it is the same."""
    quantizer: tuple[FileEntry, ...] = ()
    """Files of the fitted quantizer, below the table's directory."""
    width: NonNegativeInt = 0
    """Of the embeddings that the quantizer reads."""
    num_items: PositiveInt
    codebook_sizes: tuple[PositiveInt, ...]
    """Codes of each level, the disambiguating digit's included where there is one."""
    parts: tuple[FileEntry, ...]
    """In the order of the items' ids; part i has the items of the data set's items part i."""
    retired: tuple[FileEntry, ...] = ()
    """Items of earlier data sets, whose codes stay taken."""
    cold_start: ColdStart | None = None
    report: dict[str, Any]
    """Metrics of the tokenizer (see `trainer.tokenize`); JSON, the same on every machine."""


@dataclass(frozen=True)
class SemanticIds:
    """The whole table in memory: 4·L bytes an item."""

    codes: Tensor
    """[V+1, L] int32; row i is item i, and row 0 (no item) holds zeros."""
    codebook_sizes: tuple[int, ...]
    fingerprint: str
    """Of the manifest; travels with checkpoints."""
    continues: str | None
    """Fingerprint of the earlier table whose codes it keeps, if there is one."""


def read_semantic_ids(url: str, *, data_fingerprint: str) -> SemanticIds:
    """The semantic ids in directory `url`, every file checked against its hash.

    Args:
        data_fingerprint: of the data set that they are used with.

    Raises:
        ValueError: there are none, a file is damaged, or they belong to another data set.
    """
    manifest = read_semantic_id_manifest(url)
    if manifest.data != data_fingerprint:
        raise ValueError(
            f"the semantic ids in {url} were made for the data set {manifest.data[:12]}…, not for "
            f"{data_fingerprint[:12]}…, so their codes would mean other items; run `tandem "
            "tokenize RECIPE` on this data set (tokenizer.frozen keeps the codes of known items)"
        )
    try:
        codes = np.zeros((manifest.num_items + 1, len(manifest.codebook_sizes)), np.int32)
    except MemoryError as error:
        raise ValueError(
            f"the semantic ids of {manifest.num_items:,} items in {url} do not fit into memory"
        ) from error
    first = 1
    for entry in manifest.parts:
        verify_shard(url, entry, MEND)
        if entry.rows:
            place = storage.join(url, entry.path)
            codes[first : first + entry.rows] = _read_part(
                place, first, entry.rows, manifest.codebook_sizes
            )
            first += entry.rows
    assert first == manifest.num_items + 1, "parts hold all items: the manifest was checked"
    return SemanticIds(
        codes=torch.from_numpy(codes),
        codebook_sizes=manifest.codebook_sizes,
        fingerprint=manifest.fingerprint,
        continues=None if manifest.cold_start is None else manifest.cold_start.semantic_ids,
    )


def read_semantic_id_manifest(url: str) -> SemanticIdManifest:
    """The manifest of the semantic ids in directory `url`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    absent = "so no semantic ids were written there; run `tandem tokenize RECIPE`"
    manifest = read_sealed(url, SemanticIdManifest, absent=absent, mend=MEND)
    if sum(entry.rows for entry in manifest.parts) != manifest.num_items:
        raise ValueError(f"{url} is damaged: its parts do not hold all items; {MEND}")
    return manifest


def write_semantic_ids(
    url: str,
    data_url: str,
    codes: Tensor,
    codebook_sizes: Sequence[int],
    *,
    tokenizer: str,
    report: Mapping[str, Any] | None = None,
) -> SemanticIdManifest:
    """Write a whole table at once: ids made elsewhere, or of a catalogue that fits one process.

    The stage `tokenize` writes the same files part by part.

    Args:
        data_url: the prepared data set.
        codes: [V+1, L] integers; row 0 is not looked at.
        tokenizer: hash of what made them.

    Raises:
        ValueError: the table has not one row an item, or a code lies outside its codebook.
    """
    data = read_manifest(data_url)
    if tuple(codes.shape) != (data.num_items + 1, len(codebook_sizes)):
        raise ValueError(
            f"codes have shape {tuple(codes.shape)}, but {data.num_items} items of "
            f"{len(codebook_sizes)} levels need {(data.num_items + 1, len(codebook_sizes))}"
        )
    storage.remove(storage.join(url, MANIFEST))
    table = codes.cpu().numpy()
    entries = [
        write_codes(url, index, first, raw, table[first : first + len(raw)], codebook_sizes)
        for index, (first, raw) in enumerate(_raw_items(data_url))
    ]
    manifest = seal(
        SemanticIdManifest,
        data=data.fingerprint,
        tokenizer=tokenizer,
        num_items=data.num_items,
        codebook_sizes=tuple(codebook_sizes),
        parts=tuple(entries),
        report=dict(report or {}),
    )
    write_manifest(url, manifest)
    return manifest


def _raw_items(data_url: str) -> Iterator[tuple[int, pa.ChunkedArray]]:
    for part in item_parts(data_url):
        yield part.first_id, part.column("item")


def code_part(index: int) -> str:
    """Path of a part below the table's directory."""
    return f"codes/part-{index:05d}.parquet"


def write_codes(
    url: str,
    index: int,
    first_id: int,
    raw_ids: pa.ChunkedArray | pa.Array,
    codes: np.ndarray,
    codebook_sizes: Sequence[int],
) -> FileEntry:
    """Write the codes [n, L] of the items first_id … first_id + n - 1 as part `index`.

    Raises:
        ValueError: a code lies outside its codebook.
    """
    outside = (codes < 0) | (codes >= np.asarray(codebook_sizes))
    if outside.any():
        row, level = np.argwhere(outside)[0]
        raise ValueError(
            f"item {first_id + row} has code {codes[row, level]} at level {level}, whose codebook "
            f"has {codebook_sizes[level]} codes"
        )
    ids = pa.array(np.arange(first_id, first_id + len(codes), dtype=np.int64))
    table = pa.table({"item_id": ids, "item": raw_ids, "codes": code_lists(codes)})
    return write_table(url, code_part(index), table)


def code_lists(codes: np.ndarray) -> pa.ListArray:
    """Rows of codes [n, L] as list<int32> [n]."""
    n, levels = codes.shape
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * levels)
    return pa.ListArray.from_arrays(offsets, pa.array(codes.astype(np.int32).reshape(-1)))


def codes_of(lists: pa.ChunkedArray) -> np.ndarray:
    """list<int32> [n ≥ 1] of equal lengths as int32 [n, L]."""
    values = lists.combine_chunks()
    return values.flatten().to_numpy().reshape(len(values), -1)


def _read_part(url: str, first: int, rows: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Codes of the items `first`…, int32 [rows, L].

    Raises:
        ValueError: the part holds other items, or codes that are none.
    """
    table = read_table(url, ["item_id", "codes"])
    lists = table["codes"]
    whole = pa.types.is_list(lists.type) and lists.type.value_type == pa.int32()
    if not whole or pc.unique(pc.list_value_length(lists)).to_pylist() != [len(sizes)]:
        raise ValueError(f"{url} is damaged (its codes are no {len(sizes)} int32 an item); {MEND}")
    if not np.array_equal(table["item_id"].to_numpy(), np.arange(first, first + rows)):
        raise ValueError(f"{url} is damaged (it holds other items than {first:,} and on); {MEND}")
    codes = codes_of(lists)
    if (codes < 0).any() or (codes >= np.array(sizes)).any():
        raise ValueError(f"{url} is damaged (codes outside codebooks of {list(sizes)}); {MEND}")
    return codes
