"""What a copy of a public data set was made from, and whether it still is what it was."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs import storage
from data_loaders.download import RemoteFile, Say

RECORD = "source.json"
"""What a copy was made from, and size and sha256 of each of its files."""


def check_copy(url: str, found: Sequence[str], mend: str) -> None:
    """Check the copy in `url`, whose files are `found`; `mend` says how one makes it anew.

    Raises:
        ValueError: a file is not what it was, or no Parquet.
    """
    record = _recorded(url, mend)
    try:
        files = {str(f): (e["bytes"], e["sha256"]) for f, e in record.get("files", {}).items()}
    except (KeyError, TypeError) as error:
        source = storage.join(url, RECORD)
        raise ValueError(f"{source} cannot be read; {mend}") from error
    for file, (size, digest) in files.items():
        path = storage.join(url, file)
        if not storage.exists(path):
            raise ValueError(f"{path} is gone; {mend}")
        have = storage.size(path)
        if have != size:
            raise ValueError(
                f"{path} is damaged: it has {have:,} bytes instead of {size:,}; {mend}"
            )
        if storage.sha256_file(path) != digest:
            raise ValueError(f"{path} is damaged: its sha256 is another; {mend}")
    for path in found:
        try:
            column_names(path)
        except (pa.ArrowException, OSError) as error:
            detail = str(error).partition("\n")[0]
            raise ValueError(f"{path} is no Parquet ({detail}); {mend}") from error


def trust(
    originals: Sequence[RemoteFile],
    url: str,
    digests: Mapping[str, str],
    cache: Path,
    mend: str,
    say: Say,
) -> None:
    """Trust files without a published checksum when first seen, afterwards only if unchanged.

    Raises:
        ValueError: a file is not the one that an earlier copy in `url` was made from.
    """
    source = storage.join(url, RECORD)
    before = _recorded(url, mend).get("sha256", {})
    for remote in originals:
        digest = digests.get(remote.file)
        if remote.checksum is not None or digest is None:
            continue
        known = before.get(remote.file)
        if known is None:
            say(f"  {remote.file} has no published checksum: {source} records sha256 {digest}")
        elif known != digest:
            raise ValueError(
                f"{remote.file} has sha256 {digest}, but the earlier copy in {url} was made from "
                f"{known}; if its publisher has replaced it, delete {source} to accept it, "
                f"otherwise delete {cache / remote.file} to fetch it again"
            )


def _recorded(url: str, mend: str) -> dict[str, Any]:
    """What a copy's record says; empty where there is none."""
    source = storage.join(url, RECORD)
    if not storage.exists(source):
        return {}
    try:
        record: dict[str, Any] = storage.read_json(source)
        for block in (record.get("sha256", {}), record.get("files", {})):
            block.items()
        return record
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{source} cannot be read; delete it and {mend}") from error


def column_names(url: str) -> list[str]:
    """Columns of a Parquet file."""
    with storage.open_to_read(url) as stream:
        names: list[str] = pq.ParquetFile(stream).schema_arrow.names
        return names
