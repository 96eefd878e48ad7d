"""What a preparation reads: the recipe's source as a job and its tables in chunks.

Everything that can be wrong with settings, files and columns is found here, before any work.
"""

import os
import re
import time
import uuid
from dataclasses import dataclass

from configs import storage
from configs.data import (
    DataConfig,
    ItemText,
    LeaveLastOut,
    Source,
    UserTable,
)
from data_loaders import public
from data_loaders.cleaning import Job, Log
from data_loaders.download import Say
from data_loaders.events import EventRules
from data_loaders.sources import Chunk, TableFiles, plan


def resolve(source: Source, raw_url: str, say: Say) -> Log:
    """The source as a log of one's own; a public set is downloaded if its copy is not there."""
    if source.kind == "public":
        return public.source_of(source.name, source.url or raw_url, say)
    return source


def make_job(config: DataConfig, root: str, source: Log) -> Job:
    """The preparation of `source` into directory `root`. Raises ValueError for bad settings."""
    if config.cleaning.min_rating is not None and source.columns.rating is None:
        raise ValueError(
            f"data.cleaning.min_rating={config.cleaning.min_rating} needs a rating: map "
            "data.source.columns.rating"
        )
    rules = EventRules.of(source.columns, source.timestamp_unit, config.cleaning, source.dwell_unit)
    split = config.split
    if isinstance(split, LeaveLastOut):  # what trains is the loader's matter; the data are the same
        split = split.model_copy(update={"include_validation_in_training": False})
    return Job(root, _new_version(), source, config.cleaning, split, config.shards, rules)


VERSION = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
"""What `_new_version` gives."""


def _new_version() -> str:
    """A name that no earlier preparation had; what it is has no influence on the data."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"


@dataclass(frozen=True)
class Input:
    """A table to read: its files in chunks, and our name → its column."""

    files: TableFiles
    chunks: list[Chunk]
    names: dict[str, str]


def plan_inputs(job: Job) -> dict[str, Input]:
    """The log (`events`) and the tables beside it (`user_table`, `titles`).

    Raises:
        ValueError: a file or a column is missing, or a file lies inside the data set's directory.
    """
    log = _log_files(job.source, job.rules)
    inputs = {"events": Input(log, plan(log), {})}
    users, text = job.source.user_table, job.source.item_text
    if users is not None:
        names = {"user": users.user, **{f"user_{name}": name for name in users.features}}
        inputs["user_table"] = _side_input("data.source.user_table", users, names)
    if text is not None:
        names = {"item": text.item, "title": text.title}
        names |= {f"item_{name}": name for name in text.features}
        inputs["titles"] = _side_input("data.source.item_text", text, names)
    for table in inputs.values():
        _refuse_inside(job.root, table)
    return inputs


def _refuse_inside(root: str, table: Input) -> None:
    """Refuse input that the data set's own directory holds, where preparations come and go."""
    inside = _real(root) + "/"
    for chunk in table.chunks:
        if _real(chunk.url).startswith(inside):
            raise ValueError(
                f"{table.files.place}={table.files.url!r} takes in {chunk.url}, which lies inside "
                f"{root}, where prepared data are written and removed; move it to another "
                "directory or choose another `output`"
            )


def _real(url: str) -> str:
    """One spelling of each place."""
    fs, path = storage.filesystem(url)
    return os.path.realpath(path) if storage.is_local(url) else fs.unstrip_protocol(path)


def _side_input(place: str, table: UserTable | ItemText, names: dict[str, str]) -> Input:
    features = [key for key in names if key.startswith(("user_", "item_"))]
    keys = {key: f"features.{features.index(key)}" if key in features else key for key in names}
    files = TableFiles(
        url=table.url,
        format=table.format,
        columns={f"{place}.{keys[key]}": column for key, column in names.items()},
        place=f"{place}.url",
        separator=table.separator,
        quoted_newlines=table.quoted_newlines,
    )
    return Input(files, plan(files), names)


def _log_files(source: Log, rules: EventRules) -> TableFiles:
    """The event log of a source as a table on storage."""
    return TableFiles(
        url=source.url,
        format=source.kind,
        columns=rules.wanted(),
        place="data.source.url",
        separator=source.separator if source.kind == "csv" else ",",
        header=source.header if source.kind == "csv" else None,
        quoted_newlines=source.kind == "csv" and source.quoted_newlines,
    )
