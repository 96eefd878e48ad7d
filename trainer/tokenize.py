"""The stage `tokenize`: embeddings of items → quantizer → unique semantic ids, over Ray workers."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from configs import storage
from configs.layout import RunLayout, read_record
from configs.redaction import redacted
from configs.tokenize import (
    CollaborativeEmbedding,
    ItemEmbedding,
    TextEmbedding,
    TokenizerConfig,
    VectorEmbedding,
)
from data_loaders import cold_start
from data_loaders.collisions import Resolved, resolve
from data_loaders.exchange import Progress, map_parts, quiet
from data_loaders.items import ItemPart, item_parts
from data_loaders.manifest import (
    MANIFEST,
    DatasetManifest,
    FileEntry,
    read_manifest,
    seal,
    verify_shard,
    write_manifest,
)
from data_loaders.semantic_ids import (
    MEND,
    ColdStart,
    SemanticIdManifest,
    read_semantic_id_manifest,
)
from data_loaders.sources import files_signature
from models.tokenizers.build import DESCRIPTION, TENSORS, load_quantizer
from trainer.codes_quality import new_items_error
from trainer.codes_report import summarize_codes, usage_report
from trainer.item_codes import stage_new, staged_codes
from trainer.item_embeddings import (
    ItemEmbeddings,
    Known,
    selected_checkpoint,
    stage_embeddings,
)
from trainer.shard_workers import fit_and_stage

QUANTIZER = "quantizer"
"""Directory of the fitted quantizer below the table's."""
ITEMS_PER_PARTITION = 1 << 20
"""Items that one worker holds when collisions are resolved."""
Say = Callable[[str], None]


def tokenize(
    config: TokenizerConfig,
    data_url: str,
    output_url: str,
    *,
    seed: int,
    say: Say,
    device: str = "cpu",
) -> SemanticIdManifest:
    """Give every item of a prepared data set its semantic id.

    Runs on the Ray cluster that this process is connected to. A finished table of the same request
    is returned as it is; what an interrupted run staged (encoded texts, joined vectors) is used.

    Args:
        config: the recipe's block `tokenizer`.
        data_url: the prepared data set.
        output_url: directory of the table; all nodes must see both.
        seed: of everything that is drawn.
        say: receives lines for the terminal.
        device: `cpu` or `cuda`, where vectors are held and models run.

    Returns:
        The manifest, which has been written last.

    Raises:
        ValueError: settings or inputs cannot be used, in one sentence.
    """
    root, data = storage.absolute(output_url), read_manifest(data_url)
    inputs = tokenizer_inputs(config)
    request = storage.fingerprint({"data": data.fingerprint, "seed": seed, "inputs": inputs})
    if storage.exists(storage.join(root, MANIFEST)):
        finished = read_semantic_id_manifest(root)
        if finished.request == request:
            say(f"  semantic ids are there: {finished.fingerprint[:12]} in {root}")
            return finished
    staging = storage.join(root, f"staging-{request[:12]}")
    _clear(root, keep=staging.rsplit("/", 1)[-1])
    with quiet():
        stage = _Tokenization(config, data_url, data, root, staging, seed, device, say, request)
        manifest = stage.run()
    write_manifest(root, manifest)
    storage.remove(staging)
    say(f"{summarize_codes(manifest)}\n  written to {root}")
    return manifest


def tokenizer_inputs(config: TokenizerConfig) -> list[Any]:
    """JSON-able: the settings, and what changes when a file or checkpoint they name does.

    Raises:
        ValueError: one of them does not exist.
    """
    inputs: list[Any] = [config.model_dump(mode="json")]
    for index, embedding in enumerate(config.embeddings):
        place = f"tokenizer.embeddings.{index}"
        match embedding:
            case TextEmbedding(table=None):
                continue
            case TextEmbedding(table=table):
                assert table is not None
                inputs.append(files_signature(table.url, f"{place}.table.url"))
            case VectorEmbedding(url=url):
                inputs.append(files_signature(url, f"{place}.url"))
            case CollaborativeEmbedding(run=run, stage=stage):
                layout = RunLayout(storage.absolute(run))
                inputs.append(selected_checkpoint(layout, stage, place)[1])
    if config.frozen is not None:
        inputs.append(frozen_table(config.frozen).manifest.fingerprint)
    return inputs


def frozen_table(frozen: str) -> cold_start.EarlierCodes:
    """The table that `tokenizer.frozen` names: a run's, or the one in that directory.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    url = storage.absolute(frozen)
    try:
        record = RunLayout(url).stage_record("tokenize")
        if storage.exists(record):
            url = _written_to(record)
        elif not storage.exists(storage.join(url, MANIFEST)):
            raise ValueError(
                "no semantic ids are there; name the output of a run whose stage tokenize has "
                "finished, or the directory that it said it wrote them to"
            )
        return cold_start.EarlierCodes(url, read_semantic_id_manifest(url))
    except ValueError as error:
        raise ValueError(f"tokenizer.frozen={frozen!r}: {error}") from error


def _written_to(record: str) -> str:
    """Where the table lies that a run's record names."""
    url = read_record(record)["outputs"].get("url")
    if not isinstance(url, str):
        raise ValueError(f"{record} names no table; delete it, and run the stage again")
    if not storage.exists(storage.join(url, MANIFEST)):
        raise ValueError(
            f"its record says that the semantic ids are in {url}, and they are not, as where a run "
            "was moved; name the directory where they are, or run `tandem tokenize` there again"
        )
    return url


def _clear(root: str, keep: str) -> None:
    """Remove an older table and what other requests staged."""
    storage.remove(storage.join(root, MANIFEST))
    for name in storage.list_names(root):
        if name in ("codes", "retired", QUANTIZER) or (
            name.startswith("staging-") and name != keep
        ):
            storage.remove(storage.join(root, name))


class _Tokenization:
    """One run of the stage on the driver: counts and paths, nothing that grows with items."""

    def __init__(
        self,
        config: TokenizerConfig,
        data_url: str,
        data: DatasetManifest,
        root: str,
        staging: str,
        seed: int,
        device: str,
        say: Say,
        request: str,
    ) -> None:
        self._config, self._data_url, self._data = config, storage.absolute(data_url), data
        self._root, self._staging, self._seed, self._device = root, staging, seed, device
        self._say, self._request = say, request
        self._progress = Progress(say)
        self._parts: Sequence[ItemPart] = item_parts(self._data_url)
        self._ranked = config.collisions == "next_best"
        self._levels = len(config.quantizer.codebook_sizes)

    def run(self) -> SemanticIdManifest:
        frozen = self._config.frozen
        return self._train() if frozen is None else self._continue(frozen)

    def _train(self) -> SemanticIdManifest:
        embeddings = self._embed(None)
        quality = fit_and_stage(
            self._config.quantizer,
            embeddings,
            storage.join(self._root, QUANTIZER),
            ranked=self._ranked,
            device=self._device,
            seed=self._seed,
            say=self._say,
        )
        urls = staged_codes(self._parts, self._staging)
        resolved = self._resolve(urls, least_digits=0)
        return self._manifest(embeddings, resolved, {"sample": asdict(quality)}, None)

    def _continue(self, frozen: str) -> SemanticIdManifest:
        """Codes of an earlier table for the items it has, and of its quantizer for the others."""
        earlier = frozen_table(frozen)
        _refuse_other_settings(self._config, earlier.manifest.settings)
        known = cold_start.stage_known(earlier, self._parts, self._staging, self._progress)
        widths = tuple(block["width"] for block in earlier.manifest.report["embeddings"])
        embeddings = self._embed(Known(known, widths))
        for entry in earlier.manifest.quantizer:
            verify_shard(earlier.url, entry, MEND)
        for name in (TENSORS, DESCRIPTION):
            data = storage.read_bytes(storage.join(earlier.url, QUANTIZER, name))
            storage.write_bytes(storage.join(self._root, QUANTIZER, name), data)
        step = functools.partial(
            _code_new, embeddings, storage.join(self._root, QUANTIZER), self._ranked, self._levels
        )
        coded = map_parts("code new items", self._progress, len(self._parts), step)
        taken = functools.partial(cold_start.stage_taken, self._staging, self._levels)
        reports = map_parts("retired codes", self._progress, len(self._parts), taken)
        retired = [
            cold_start.taken_url(self._staging, r["partition"]) for r in reports if r["rows"]
        ]
        urls = [*staged_codes(self._parts, self._staging), *retired]
        had_digit = len(earlier.manifest.codebook_sizes) > self._levels
        least = earlier.manifest.codebook_sizes[-1] if had_digit else 0
        resolved = self._resolve(urls, least_digits=least)
        if had_digit and resolved.codebook_sizes[-1] > least:
            self._say(
                f"  the extra digit grew from {least} to {resolved.codebook_sizes[-1]} codes, so "
                "models of the earlier ids do not fit; tokenizer.reserve keeps room beforehand"
            )
        counts = ColdStart(
            semantic_ids=earlier.manifest.fingerprint,
            known_items=known,
            new_items=self._data.num_items - known,
            retired_items=sum(report["rows"] for report in reports),
        )
        fitted = {k: v for k, v in earlier.manifest.report.items() if k == "sample"}
        measured = fitted | {"new_items": new_items_error(coded)}
        return self._manifest(embeddings, resolved, measured, counts)

    def _embed(self, known: Known | None) -> ItemEmbeddings:
        return stage_embeddings(
            self._config,
            self._data_url,
            self._staging,
            device=self._device,
            progress=self._progress,
            say=self._say,
            known=known,
        )

    def _resolve(self, urls: Sequence[str], least_digits: int) -> Resolved:
        partitions = max(len(self._parts), -(-self._data.num_items // ITEMS_PER_PARTITION))
        return resolve(
            urls,
            self._parts,
            self._config.collisions,
            self._config.quantizer.codebook_sizes,
            reserve=self._config.reserve,
            least_digits=least_digits,
            staging_url=self._staging,
            output_url=self._root,
            partitions=partitions,
            progress=self._progress,
        )

    def _manifest(
        self,
        embeddings: ItemEmbeddings,
        resolved: Resolved,
        measured: dict[str, Any],
        counts: ColdStart | None,
    ) -> SemanticIdManifest:
        files = tuple(_file_entry(self._root, f"{QUANTIZER}/{n}") for n in (DESCRIPTION, TENSORS))
        described = [
            {"kind": block.embedding.kind, "width": block.width, "missing": block.missing}
            for block in embeddings.blocks
        ]
        report = usage_report(resolved.usage) | measured
        report |= {"collisions": resolved.collisions, "embeddings": described}
        settings = redacted(self._config.model_dump(mode="json"))
        return seal(
            SemanticIdManifest,
            data=self._data.fingerprint,
            settings=TokenizerConfig.model_validate(settings),
            request=self._request,
            quantizer=files,
            width=embeddings.width,
            tokenizer=storage.fingerprint([settings, [entry.sha256 for entry in files]]),
            num_items=self._data.num_items,
            codebook_sizes=resolved.codebook_sizes,
            parts=resolved.parts,
            retired=resolved.retired,
            cold_start=counts,
            report=report,
        )


def _refuse_other_settings(config: TokenizerConfig, earlier: TokenizerConfig | None) -> None:
    """Raises ValueError where a frozen tokenizer is not what the recipe describes."""
    place = f"tokenizer.frozen={config.frozen!r}"
    if earlier is None:
        raise ValueError(
            f"{place} was made without a tokenizer, so new items can get no codes from it; name a "
            "table that `tandem tokenize` wrote"
        )
    described = [[_described(e) for e in c.embeddings] for c in (config, earlier)]
    for name, now, then in (
        ("quantizer", config.quantizer, earlier.quantizer),
        ("collisions", config.collisions, earlier.collisions),
        ("embeddings", *described),
    ):
        if now != then:
            raise ValueError(
                f"tokenizer.{name} differs from that of {place}, which is {then!r}; a frozen "
                "tokenizer keeps its settings"
            )


def _described(embedding: ItemEmbedding) -> dict[str, Any]:
    """What makes a vector of an item, and not where that lies."""
    told = {"kind", "weight", "normalize", "encoder", "columns"}
    return embedding.model_dump(mode="json", include=told)


def _code_new(
    embeddings: ItemEmbeddings, quantizer_url: str, ranked: bool, levels: int, part: int
) -> dict[str, Any]:
    return stage_new(embeddings, load_quantizer(quantizer_url), ranked, levels, part)


def _file_entry(root: str, path: str) -> FileEntry:
    data = storage.read_bytes(storage.join(root, path))
    return FileEntry(path=path, rows=0, bytes=len(data), sha256=storage.sha256_bytes(data))
