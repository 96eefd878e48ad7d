"""`prepare`: raw logs → clean events → user sequences in Parquet shards, with a manifest.

The order of steps; what happens in each is in `cleaning` and `assembly`, how it is distributed in
`exchange`. The result depends on the events and the settings alone, bit for bit: neither on the
number of machines nor on the order in which tasks end.
"""

import functools
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from configs import storage
from configs.data import DataConfig, GlobalTime
from configs.terminal import say
from data_loaders import assembly, cleaning
from data_loaders.cleaning import Job
from data_loaders.events import DUPLICATE, SECOND
from data_loaders.exchange import Progress, Report, exchange, map_parts, offsets, quiet
from data_loaders.inputs import VERSION, Input, make_job, plan_inputs, resolve
from data_loaders.manifest import (
    DatasetManifest,
    EventCounts,
    build_manifest,
    read_manifest,
    refuse_other_manifest,
    write_manifest,
)
from data_loaders.sources import Chunk, TableFiles

_KINDS = ("sequences", "items", "vocabularies", "quarantine")
_INSIDE = "a date inside the time that the log spans"
_SPLIT_PARTS = {
    "train_events": ("validation_from", "no train events", _INSIDE),
    "validation_targets": ("validation_from", "no validation targets", _INSIDE),
    "test_targets": ("test_from", "no test targets", _INSIDE),
    "validation_histories": (
        "validation_from",
        "no validation target whose user has an event before it",
        "a later date",
    ),
    "test_histories": (
        "test_from",
        "no test target whose user has an event before it",
        "a later date",
    ),
}
"""Number of a shard's report → what a global_time split sets it by, its lack, and the mend."""
_PART = re.compile(r"[^/]+\.parquet(\.[0-9a-f]{32}\.tmp)?")


def prepare(config: DataConfig, name: str, output_url: str, raw_url: str) -> DatasetManifest:
    """Prepare a data set with Ray Data on the cluster that this process is connected to.

    Args:
        name: name of the data set in its manifest.
        output_url: directory of the data set; all nodes must see it. A data set that it holds
            stays whole until the manifest of the new one replaces its own; if this fails, for good.
        raw_url: directory of the copy of a public set, downloaded if it is not there; own logs are
            read from `config.source.url`.

    Returns:
        The manifest, which has been written last.

    Raises:
        ValueError: bad settings or bad input, in one sentence; the quarantine of what was read is
            left to be looked at.
    """
    storage.refuse_memory("output", output_url)
    root = storage.absolute(output_url)
    job = make_job(config, root, resolve(config.source, raw_url, say))
    inputs = plan_inputs(job)
    storage.make_directory(root)
    refuse_other_manifest(root)
    _sweep(job)  # what a preparation that was killed left
    try:
        with quiet():
            manifest = _Preparation(job, name, inputs).run()
        write_manifest(root, manifest)
    finally:
        _sweep(job)
    say(_closing_line(root, manifest))
    return manifest


def _closing_line(root: str, manifest: DatasetManifest) -> str:
    """What came out and what was left out on the way."""
    counts = manifest.counts
    line = (
        f"{manifest.num_users:,} users, {manifest.num_items:,} items, "
        f"{manifest.num_events:,} events; {sum(counts.quarantined.values()):,} quarantined"
    )
    if counts.quarantined:
        line += f" ({_reasons(counts.quarantined)}): "
        line += storage.join(root, "quarantine", manifest.version)
    return line + (
        f"; {counts.below_min_rating:,} below min_rating, {counts.core_removed:,} removed by k-core"
    )


def _reasons(quarantined: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(quarantined.items()))


def _sweep(job: Job) -> None:
    """Remove what preparations left, but not what the manifest names or this job's quarantine.

    What has not the names that preparations give is somebody else's and stays.
    """
    for name in storage.list_names(job.root):
        if name.startswith("staging-") and VERSION.fullmatch(name.removeprefix("staging-")):
            storage.remove(storage.join(job.root, name))
    kept = {f"quarantine/{job.version}"}
    with suppress(ValueError):  # without a whole manifest there is no data set
        kept |= {"/".join(e.path.split("/")[:2]) for e in read_manifest(job.root).files()}
    for kind in _KINDS:
        for name in storage.list_names(storage.join(job.root, kind)):
            url = storage.join(job.root, kind, name)
            if f"{kind}/{name}" not in kept and VERSION.fullmatch(name) and _only_parts(url):
                storage.remove(url)


def _only_parts(url: str) -> bool:
    """Whether a directory holds nothing but Parquet parts, whole ones or half-written ones."""
    return all(_PART.fullmatch(name) for name in storage.list_names(url))


@dataclass
class _Preparation:
    """State of one preparation on the driver: counts and paths, nothing that grows with events."""

    job: Job
    name: str
    inputs: dict[str, Input]
    progress: Progress = field(default_factory=lambda: Progress(say))
    read: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    below_min_rating: int = 0
    kept: int = 0
    vocabularies: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def user_features(self) -> tuple[str, ...]:
        table = self.job.source.user_table
        return () if table is None else table.features

    @property
    def item_features(self) -> tuple[str, ...]:
        table = self.job.source.item_text
        return () if table is None else table.features

    def run(self) -> DatasetManifest:
        parts, names = self._read_log()
        items, users = self._clean(parts, names)
        self._stage_side_tables()
        self._build_vocabularies([int(report["partition"]) for report in users])
        shards, item_files = self._write(items, users)
        return self._manifest(items, shards, item_files)

    # -- logs to clean events ---------------------------------------------------------------

    def _read_log(self) -> tuple[list[str], list[str]]:
        """URLs of the staged events, and the names of the log's files."""
        job, files, chunks = self.job, self.inputs["events"].files, self.inputs["events"].chunks
        step = functools.partial(_read_step, job, files, chunks)
        reports = map_parts("read events", self.progress, len(chunks), step)
        for report in reports:
            self.read += report["rows"]
            self.quarantined.update(report["reasons"])
            self.quarantine += report["quarantine"]
        self._check_bad_share()
        paths = sorted(path for report in reports for path in report["parts"])
        if not paths:
            raise ValueError(f"data.source.url={job.source.url!r} holds no events")
        names = {chunk.file: chunk.name for chunk in chunks}
        every = [names.get(file, "") for file in range(max(names) + 1)]
        return [storage.join(job.staging, path) for path in paths], every

    def _check_bad_share(self) -> None:
        bad, limit = self.quarantined.total(), self.job.cleaning.max_bad_share
        if bad / max(self.read, 1) <= limit:  # a product may miss the edge by its rounding
            return
        reasons = _reasons(self.quarantined)
        quarantine = storage.join(self.job.root, "quarantine", self.job.version)
        hint = ""
        if self.quarantined.most_common(1)[0][0] in (
            "impossible_timestamp",
            "unparsable_timestamp",
        ):
            hint = (
                f"; is data.source.timestamp_unit={self.job.rules.unit!r} right, and are "
                "data.cleaning.earliest and latest?"
            )
        raise ValueError(
            f"{bad:,} of {self.read:,} events ({bad / self.read:.2%}) are bad ({reasons}), more "
            f"than data.cleaning.max_bad_share={limit:g} allows; look at "
            f"{quarantine}, mend the log or raise the share{hint}"
        )

    def _clean(self, parts: list[str], names: list[str]) -> tuple[list[Report], list[Report]]:
        """k-core: drop rare items and users in turn until neither step drops an event."""
        job, progress = self.job, self.progress
        round_ = 0
        while True:
            round_ += 1
            item_step = functools.partial(cleaning.item_step, job)
            if round_ == 1:
                item_step = functools.partial(cleaning.first_item_step, job, names)
            by_item = functools.partial(cleaning.load_events, job, key="item")
            items = exchange(
                f"by item, round {round_}", progress, parts, by_item, item_step, job.partitions
            )
            if round_ == 1:
                self._count_first_round(items)
            parts = self._staged("by_item", items)
            by_user = functools.partial(cleaning.load_events, job, key="user")
            user_step = functools.partial(cleaning.user_step, job)
            users = exchange(
                f"by user, round {round_}", progress, parts, by_user, user_step, job.partitions
            )
            self.kept = sum(report["kept"] for report in users)
            if not self.kept:
                raise ValueError(self._nothing_left())
            if self.kept == sum(report["rows"] for report in users):
                return items, users
            parts = self._staged("by_user", users)

    def _staged(self, name: str, reports: list[Report]) -> list[str]:
        return [self.job.part(name, int(r["partition"])) for r in reports if r["kept"]]

    def _count_first_round(self, items: list[Report]) -> None:
        duplicates = sum(report["duplicates"] for report in items)
        if duplicates:
            self.quarantined[DUPLICATE] = duplicates
        self.quarantine += [entry for report in items for entry in report["quarantine"]]
        self.below_min_rating = sum(report["below_min_rating"] for report in items)
        self._check_bad_share()

    def _nothing_left(self) -> str:
        cleaning_ = self.job.cleaning
        return (
            f"no event is left of {self.read:,} after cleaning ({self.quarantined.total():,} bad, "
            f"{self.below_min_rating:,} below min_rating={cleaning_.min_rating}, the rest removed "
            f"by user_core={cleaning_.user_core} and item_core={cleaning_.item_core}); "
            "relax data.cleaning"
        )

    # -- clean events to the data set -------------------------------------------------------

    def _stage_side_tables(self) -> None:
        for name in ("user_table", "titles"):
            if name not in self.inputs:
                continue
            table = self.inputs[name]
            load = functools.partial(_load_side_chunk, self.job, table)
            key = next(iter(table.names))
            step = functools.partial(cleaning.side_step, self.job, name, key)
            label = name.replace("_", " ")
            exchange(label, self.progress, table.chunks, load, step, self.job.partitions)

    def _build_vocabularies(self, user_partitions: list[int]) -> None:
        job = self.job
        events = list(job.rules.categories())
        everywhere = list(range(job.partitions))
        staged = [
            ("by_user", events, user_partitions),
            ("user_table", [f"user_{name}" for name in self.user_features], everywhere),
            ("titles", [f"item_{name}" for name in self.item_features], everywhere),
        ]
        names: list[str] = []
        parts: list[tuple[str, list[str], list[int]]] = []
        for table, columns, partitions in staged:
            indices = [len(names) + at for at in range(len(columns))]
            urls = [job.part(table, p) for p in partitions] if columns else []
            parts += [(url, columns, indices) for url in urls if storage.exists(url)]
            names += ["actions" if name == "action" else name for name in columns]
        if not names:
            return
        step = functools.partial(assembly.vocabulary_step, job, names)
        reports = exchange("vocabularies", self.progress, parts, _load_categories, step, len(names))
        self.vocabularies = {report["name"]: report["entry"] for report in reports}

    def _write(self, items: list[Report], users: list[Report]) -> tuple[list[Report], list[Report]]:
        job = self.job
        item_offsets = offsets(items, "items", job.partitions)
        user_offsets = offsets(users, "users", job.partitions)
        step = functools.partial(_shard_step, job, user_offsets, item_offsets, self.user_features)
        shards = map_parts("write sequences", self.progress, job.partitions, step)
        shards.sort(key=lambda report: int(report["shard"]))
        self._check_split(shards)
        parts = [
            storage.join(job.staging, f"train_counts/part-{r['shard']:05d}.parquet")
            for r in shards
            if r["rows"]
        ]
        items_step = functools.partial(assembly.items_step, job, item_offsets, self.item_features)
        load = assembly.load_train_counts
        written = exchange("write items", self.progress, parts, load, items_step, job.partitions)
        return shards, written

    def _check_split(self, shards: list[Report]) -> None:
        """Refuse a split that leaves nothing to train on or to measure."""
        found = {part: sum(report[part] for report in shards) for part in _SPLIT_PARTS}
        if not isinstance(self.job.split, GlobalTime):
            if not found["test_targets"]:
                raise ValueError(
                    "data.split.kind='leave_last_out' takes one event of a user to train, one to "
                    "validate and one to test, but no user has 3 events; relax data.cleaning or "
                    "give a log with longer histories"
                )
            return
        for part, (bound, what, mend) in _SPLIT_PARTS.items():
            if not found[part]:
                value = getattr(self.job.split, bound)
                raise ValueError(f"data.split.{bound}={value!r} leaves {what}; choose {mend}")

    def _manifest(
        self, items: list[Report], shards: list[Report], item_files: list[Report]
    ) -> DatasetManifest:
        histogram: Counter[int] = Counter()
        for report in shards:
            histogram.update({int(b): n for b, n in report["lengths"].items()})
        entries = [report["entry"] for report in shards]
        removed = self.read - self.quarantined.total() - self.below_min_rating - self.kept
        assert removed >= 0 and sum(e["events"] for e in entries) == self.kept
        sizes = {name: entry["rows"] for name, entry in self.vocabularies.items()}
        return build_manifest(
            name=self.name,
            version=self.job.version,
            num_users=sum(entry["rows"] for entry in entries),
            num_items=sum(report["items"] for report in items),
            num_events=self.kept,
            user_features={name: sizes.get(f"user_{name}", 0) for name in self.user_features},
            side_features={
                name: sizes.get(f"side_{name}", 0) for name in self.job.source.columns.side_features
            },
            item_features={name: sizes.get(f"item_{name}", 0) for name in self.item_features},
            actions=sizes.get("actions", 0),
            has_ratings=self.job.source.columns.rating is not None,
            has_dwell_times=self.job.source.columns.dwell is not None,
            has_durations=self.job.source.columns.duration is not None,
            labels=tuple(self.job.source.columns.labels),
            split=self.job.split,
            counts=EventCounts(
                read=self.read,
                kept=self.kept,
                quarantined=dict(self.quarantined),
                below_min_rating=self.below_min_rating,
                core_removed=removed,
            ),
            latest=_iso(self.job.rules.latest),
            length_histogram=dict(histogram),
            shards=entries,
            items=[report["entry"] for report in item_files],
            vocabularies=[self.vocabularies[name] for name in sorted(self.vocabularies)],
            quarantine=sorted(self.quarantine, key=lambda entry: str(entry["path"])),
        )


def _iso(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / SECOND, UTC).isoformat(timespec="seconds")


def _read_step(job: Job, files: TableFiles, chunks: list[Chunk], index: int) -> Report:
    return cleaning.read_events(job, files, chunks[index], index)


def _load_side_chunk(job: Job, table: Input, chunk: Chunk) -> Any:
    return cleaning.load_side_table(job, table.files, chunk, table.names)


def _load_categories(part: tuple[str, list[str], list[int]]) -> Any:
    return assembly.load_categories(*part)


def _shard_step(
    job: Job,
    user_offsets: np.ndarray,
    item_offsets: np.ndarray,
    user_features: tuple[str, ...],
    shard: int,
) -> Report:
    return assembly.shard_step(
        job,
        shard,
        first_user_id=1 + int(user_offsets[shard]),
        item_offsets=item_offsets,
        user_features=user_features,
    )
