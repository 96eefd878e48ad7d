"""Embeddings of a catalogue: several sources side by side, staged and read by part of the items.

Texts are encoded by tasks and staged; vectors are brought to their items and staged; collaborative
vectors are read from a checkpoint. A part's matrix is put together by the worker that wants it.

Shape legend: n items of a part, D width of all embeddings side by side, d of one of them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from configs import storage
from configs.layout import RunLayout, read_checkpoint_reference
from configs.tokenize import (
    CollaborativeEmbedding,
    ItemEmbedding,
    TextEmbedding,
    TokenizerConfig,
    VectorEmbedding,
)
from data_loaders.cold_start import known_codes
from data_loaders.exchange import PARTITION, Progress, Report, map_parts
from data_loaders.item_tables import (
    FLOAT_BYTES,
    TextTable,
    bytes_of,
    matrix_of,
    stage_by_part,
    staged_values,
    vector_table,
)
from data_loaders.items import ItemPart, item_parts
from data_loaders.manifest import read_manifest
from data_loaders.shards import staged, write_table
from data_loaders.sources import files_signature
from models.ops.hashing import GOLDEN_64, as_signed, mix64
from sharding.table_rows import CheckpointTable
from trainer.text_encoder import TextEncoder, check_encoder


@dataclass(frozen=True)
class Block:
    """One embedding of the catalogue, ready to be read by part."""

    embedding: ItemEmbedding
    width: int
    """d"""
    missing: int
    """Items without a vector."""
    source: str
    """Name of the staged table, or URL of the checkpoint."""
    identity: Any
    """JSON-able; changes when what the vectors came from does."""


@dataclass(frozen=True)
class ItemEmbeddings:
    """All embeddings of a catalogue; travels to workers, holds no vectors."""

    parts: tuple[ItemPart, ...]
    blocks: tuple[Block, ...]
    staging_url: str

    @property
    def width(self) -> int:
        """D."""
        return sum(block.width for block in self.blocks)

    def matrix(self, part: int) -> Tensor:
        """Embeddings of the items of a part: float32 [n, D]."""
        rows = self.parts[part].rows
        whole = np.zeros((rows, self.width), np.float32)
        known = np.zeros(rows, bool)
        first = 0
        for block in self.blocks:
            last = first + block.width
            known |= self._fill(block, part, whole[:, first:last])
            first = last
        result = torch.from_numpy(whole)
        if not known.all():
            raw = self.parts[part].column("item").filter(pa.array(~known))
            length = sum(block.embedding.weight**2 for block in self.blocks) ** 0.5
            result[torch.from_numpy(~known)] = drawn_directions(raw, self.width) * length
        return result

    def _fill(self, block: Block, part: int, target: np.ndarray) -> np.ndarray:
        """Write a block's vectors into `target` [n, d]; bool [n], which items have one."""
        items = self.parts[part]
        rows = np.arange(items.rows)
        if block.embedding.kind == "collaborative":
            vectors = CheckpointTable(block.source, "item").rows(items.first_id, items.rows).numpy()
        else:
            values = staged_values(self.staging_url, block.source, part)
            if values is None:
                return np.zeros(items.rows, bool)
            vectors = matrix_of(values["value"])
            rows = values["item_id"].to_numpy() - items.first_id
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)  # squares fit
        known = np.zeros(items.rows, bool)
        known[rows] = lengths > 0  # a zero vector says nothing, as a missing one
        if block.embedding.normalize:
            vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)[:, None]
        target[rows] = vectors * block.embedding.weight
        return known


@dataclass(frozen=True)
class Known:
    """What the earlier table of a frozen tokenizer tells, after `cold_start.stage_known`."""

    items: int
    """Items of the catalogue that have codes and need no vectors."""
    widths: tuple[int, ...]
    """Of its embeddings. Where no new item has a vector, nothing else tells them."""


def drawn_directions(raw_ids: pa.ChunkedArray, width: int) -> Tensor:
    """Directions of length one that are a function of the raw ids alone: float32 [n, D]."""
    names = np.asarray(raw_ids.to_pylist(), dtype=object)
    keys = torch.from_numpy(pd.util.hash_array(names, categorize=False).view(np.int64))
    columns = torch.arange(1, width + 1) * as_signed(GOLDEN_64)
    bits = mix64(mix64(keys)[:, None] + columns)
    signs = (bits & 1).float() * 2 - 1  # corners of a cube: far from each other, and exact
    return signs / width**0.5


def stage_embeddings(
    config: TokenizerConfig,
    data_url: str,
    staging_url: str,
    *,
    device: str,
    progress: Progress,
    say: Callable[[str], None],
    known: Known | None = None,
) -> ItemEmbeddings:
    """Bring every embedding of the recipe to the items' parts; what is staged already is kept.

    Args:
        known: of a frozen tokenizer; where no item is new, nothing is read.

    Raises:
        ValueError: an embedding cannot be read, misses more items than it may, or has another width
            than a frozen tokenizer's.
    """
    parts = tuple(item_parts(data_url))
    blocks = []
    for index, embedding in enumerate(config.embeddings):
        place = f"tokenizer.embeddings.{index}"
        stage = _Staging(data_url, staging_url, parts, index, place, progress, device, known)
        block = stage.block(embedding)
        _check_missing(block, place, stage.items, "items" if known is None else "new items")
        if known is not None and block.width != known.widths[index]:
            raise ValueError(
                f"{place} has vectors of width {block.width}, and those of tokenizer.frozen had "
                f"{known.widths[index]}; describe the items as they were described then"
            )
        told = f", {block.missing:,} items have none" if block.missing else ""
        say(f"  embedding {index}: {embedding.kind}, width {block.width}{told}")
        blocks.append(block)
    return ItemEmbeddings(parts, tuple(blocks), staging_url)


def _check_missing(block: Block, place: str, items: int, what: str) -> None:
    kind, mends = (
        block.embedding.kind,
        {
            "text": "map data.source.item_text, name a table with texts",
            "vectors": "check that its item ids are the log's own (npy: first_id)",
            "collaborative": "train on the same data",
        },
    )
    if not block.width:
        raise ValueError(
            f"{place} has no {kind} for any of {items:,} {what}; {mends[kind]}, or remove it"
        )
    share = block.missing / max(items, 1)
    if share > block.embedding.max_missing:
        raise ValueError(
            f"{place} has no {kind} for {block.missing:,} of {items:,} {what} ({share:.1%}), "
            f"more than max_missing={block.embedding.max_missing:g} allows; {mends[kind]}, or "
            "raise max_missing"
        )


@dataclass(frozen=True)
class _Staging:
    """Staging of one embedding."""

    data_url: str
    staging_url: str
    parts: tuple[ItemPart, ...]
    index: int
    place: str
    progress: Progress
    device: str
    known: Known | None

    @property
    def items(self) -> int:
        """Items that need vectors."""
        return sum(part.rows for part in self.parts) - (self.known.items if self.known else 0)

    @property
    def width_then(self) -> int:
        """Width of this embedding in the earlier table; 0 without one."""
        return self.known.widths[self.index] if self.known else 0

    def block(self, embedding: ItemEmbedding) -> Block:
        if not self.items:
            return Block(embedding, self.width_then, 0, "", None)
        match embedding:
            case TextEmbedding():
                return self.text(embedding)
            case VectorEmbedding():
                return self.vectors(embedding)
            case CollaborativeEmbedding():
                return self.collaborative(embedding)

    def vectors(self, embedding: VectorEmbedding) -> Block:
        name = f"vectors-{self.index}"
        report = self._once(name, lambda: self._stage_vectors(name, embedding))
        found = report["rows"]
        if self.known is not None:
            count = functools.partial(_count_new, self.staging_url, name)
            counts = map_parts("count vectors", self.progress, len(self.parts), count)
            found = sum(part["rows"] for part in counts)
        identity = self._of_file(embedding.url)
        width = report["width"] or self.width_then
        return Block(embedding, width, self.items - found, name, identity)

    def text(self, embedding: TextEmbedding) -> Block:
        check_encoder()
        texts = None
        identity: Any = read_manifest(self.data_url).fingerprint
        if embedding.table is not None:
            texts = f"texts-{self.index}"
            identity = self._of_file(embedding.table.url)
            self._once(texts, lambda: self._stage_texts(texts, embedding))
        name = f"encoded-{self.index}"
        new_only = self.known is not None
        encode = functools.partial(
            _encode_part,
            self.parts,
            self.staging_url,
            texts,
            name,
            embedding,
            self.device,
            new_only,
        )
        gpus = 1 if self.device == "cuda" else 0
        reports = map_parts("encode texts", self.progress, len(self.parts), encode, gpus)
        width = max(report["width"] for report in reports) or self.width_then
        known = sum(report["rows"] for report in reports)
        return Block(embedding, width, self.items - known, name, identity)

    def collaborative(self, embedding: CollaborativeEmbedding) -> Block:
        layout = RunLayout(storage.absolute(embedding.run))
        url, found = selected_checkpoint(layout, embedding.stage, self.place)
        wanted = read_manifest(self.data_url).fingerprint
        try:
            table = CheckpointTable(url, "item")
        except ValueError as error:
            raise ValueError(
                f"{self.place}.run={embedding.run!r} gives no vectors: {error}"
            ) from error
        of_data = table.manifest.fingerprints.get("data")
        if table.manifest.fingerprint != found or of_data != wanted:
            raise ValueError(
                f"{self.place}.run={embedding.run!r} was trained on other data "
                f"({str(of_data)[:12]}… instead of {wanted[:12]}…), so that its item ids mean "
                "other items; train it on the prepared data of this recipe"
            )
        rows, width = table.shape
        assert rows >= self.items + 1, "the table has a row an item of its data"
        map_parts("check checkpoint", self.progress, 1, functools.partial(_verify, url))
        return Block(embedding, width, 0, url, found)

    def _once(self, name: str, stage: Callable[[], Report]) -> Report:
        """What staging reported; it is not done again where it had finished, and all is there."""
        url = storage.join(self.staging_url, f"{name}.json")
        if storage.exists(url):
            report: Report = storage.read_sealed(url)
            parts = report.get("parts")  # a report of before does not tell
            places = [storage.join(self.staging_url, staged(name, part)) for part in parts or ()]
            if parts is not None and all(map(storage.exists, places)):
                return report
        storage.write_sealed(url, stage())
        return dict(storage.read_sealed(url))

    def _stage_vectors(self, name: str, embedding: VectorEmbedding) -> Report:
        table = vector_table(embedding, self.place)
        reports = stage_by_part(name, table, self.parts, self.staging_url, self.progress)
        sizes = {size for report in reports for size in report["sizes"]}
        if len(sizes) > 1:
            widths = sorted(size // FLOAT_BYTES for size in sizes)
            raise ValueError(f"{self.place}.url={embedding.url!r} has vectors of widths {widths}")
        width = sizes.pop() // FLOAT_BYTES if sizes else 0
        return {**_found(reports), "width": width}

    def _stage_texts(self, name: str, embedding: TextEmbedding) -> Report:
        assert embedding.table is not None
        table = TextTable.open(embedding.table, embedding.columns, self.place)
        reports = stage_by_part(name, table, self.parts, self.staging_url, self.progress)
        return _found(reports)

    def _of_file(self, url: str) -> Any:
        return files_signature(url, f"{self.place}.url")


def selected_checkpoint(layout: RunLayout, stage: str, place: str) -> tuple[str, str]:
    """URL and hash of the checkpoint that a finished stage of a run chose.

    Raises:
        ValueError: the stage has not finished there.
    """
    record = layout.stage_record(stage)
    if not storage.exists(record):
        raise ValueError(
            f"{place}.run={layout.root!r} has no finished stage {stage!r}; run it with "
            f"`tandem run RECIPE --until {stage}` first"
        )
    checkpoint = read_checkpoint_reference(record)
    return checkpoint["url"], checkpoint["hash"]


def _verify(url: str, _: int) -> Report:
    CheckpointTable(url, "item").verify()
    return {"rows": 0}


def _encode_part(
    parts: Sequence[ItemPart],
    staging_url: str,
    texts: str | None,
    name: str,
    embedding: TextEmbedding,
    device: str,
    new_only: bool,
    part: int,
) -> Report:
    """Encode the texts of a part and stage the vectors; a part that is there is only counted."""
    there = staged_values(staging_url, name, part)
    if there is not None:
        return {"rows": there.num_rows, "width": matrix_of(there["value"]).shape[1]}
    ids, lines = _texts(parts[part], staging_url, texts, part)
    if new_only:
        wanted = ~np.isin(ids, known_codes(staging_url, part)[0])
        ids, lines = ids[wanted], [lines[index] for index in np.flatnonzero(wanted)]
    if not len(ids):
        return {"rows": 0, "width": 0}
    encoder = TextEncoder(device)
    vectors = encoder.encode(lines, embedding.batch_size)
    table = pa.table({"item_id": pa.array(ids), "value": bytes_of(vectors)})
    write_table(staging_url, staged(name, part), table)
    return {"rows": len(ids), "width": vectors.shape[1]}


def _count_new(staging_url: str, name: str, part: int) -> Report:
    """Items of a part with a staged value, those whose codes are known left out."""
    values = staged_values(staging_url, name, part)
    if values is None:
        return {"rows": 0}
    new = ~np.isin(values["item_id"].to_numpy(), known_codes(staging_url, part)[0])
    return {"rows": int(new.sum())}


def _texts(
    part: ItemPart, staging_url: str, texts: str | None, index: int
) -> tuple[np.ndarray, list[str]]:
    """Ids and texts of the items of a part that have a text."""
    if texts is not None:
        table = staged_values(staging_url, texts, index)
        if table is None:
            return np.zeros(0, np.int64), []
        return table["item_id"].to_numpy(), [v.decode() for v in table["value"].to_pylist()]
    titles = part.column("title").to_pylist()
    ids = part.first_id + np.flatnonzero([bool(title) for title in titles])
    return ids, [title for title in titles if title]


def _found(reports: Sequence[Report]) -> Report:
    """How many items have a value, and of which parts they are."""
    parts = [report[PARTITION] for report in reports if report["rows"]]
    return {"rows": sum(report["rows"] for report in reports), "parts": parts}
