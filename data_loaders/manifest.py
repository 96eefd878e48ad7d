"""The manifest of a prepared data set: what it holds, and the hash of each of its files.

Other directories of hashed files (preference pairs, reference log-probabilities) are sealed alike.

It is written last. A directory without a valid manifest is not a data set, and a file whose hash
differs from the manifest's is damaged.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from configs import storage
from configs.base import Config, Count, PositiveCount
from configs.data import Split
from configs.storage_faults import StorageError, first_line

MANIFEST = "manifest.json"
MEND = "run `tandem prepare RECIPE --force` to write the data set anew"


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]*")
"""Of what we write: nothing in it is an escape, a query, a drive or a way up, to any storage."""


def _confined(path: str) -> str:
    names = path.split("/")
    if not all(_NAME.fullmatch(name) for name in names) or any(".." in name for name in names):
        raise ValueError(f"path {path!r} names no file below the manifest's directory")
    return path


RelativePath = Annotated[str, AfterValidator(_confined)]


class FileEntry(Config):
    """A file of the data set; `path` is relative to the manifest's directory and below it."""

    path: RelativePath
    rows: Count
    bytes: Count
    sha256: str


class GroupedEntry(FileEntry):
    """A file whose row groups are read one by one."""

    row_group_rows: tuple[PositiveCount, ...]

    @model_validator(mode="after")
    def _groups_are_all_rows(self) -> "GroupedEntry":
        if sum(self.row_group_rows) != self.rows:
            raise ValueError("its row groups do not have as many rows as it")
        return self


class ShardEntry(GroupedEntry):
    """A shard of user sequences: rows are the users first_user_id … first_user_id + rows - 1."""

    first_user_id: PositiveCount
    events: Count


class EventCounts(Config):
    """What became of the events that were read."""

    read: Count
    kept: Count
    quarantined: dict[str, PositiveCount]
    """reason → events."""
    below_min_rating: Count
    core_removed: Count


class Sealed(Config):
    """What a directory's manifest says, with a fingerprint of all of it."""

    fingerprint: str
    """Hash of `content`."""

    def files(self) -> tuple[FileEntry, ...]:
        """All files that it names."""
        values = (getattr(self, name) for name in type(self).model_fields)
        members = (member for value in values if isinstance(value, tuple) for member in value)
        return tuple(member for member in members if isinstance(member, FileEntry))

    def content(self) -> dict[str, Any]:
        """JSON-able, what the fingerprint covers: all other fields but `name`, so that two recipes
        over the same data share it."""
        return self.model_dump(mode="json", exclude={"name", "fingerprint"})


SealedT = TypeVar("SealedT", bound=Sealed)


class DatasetManifest(Sealed):
    """A prepared data set; ids are dense, 1…num_items and 1…num_users, and 0 means none."""

    format: Literal[1] = 1
    name: str
    version: str = ""
    """Directory of this preparation's files inside `sequences`, `items` and the like, so that
    they never replace those of the one before; no part of the content. Empty: there is none."""
    num_users: PositiveCount
    num_items: PositiveCount
    num_events: PositiveCount
    user_features: dict[str, Count]
    """name → number of categories, without the unknown 0."""
    side_features: dict[str, Count]
    item_features: dict[str, Count] = Field(default={}, exclude_if=lambda features: not features)
    """Columns `item_<name>` of the items table → number of categories, without the unknown 0."""
    actions: Count
    """Number of behaviours; 0 where the source maps none."""
    has_ratings: bool
    has_dwell_times: bool = Field(default=False, exclude_if=lambda has: not has)
    """Written where true only: data sets of before there were dwell times stay what they are."""
    has_durations: bool = Field(default=False, exclude_if=lambda has: not has)
    labels: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)
    """Names of the bits of each event's `labels`, lowest first; empty where none is mapped."""
    split: Split
    counts: EventCounts
    latest: str = Field(default="", exclude_if=lambda moment: not moment)
    """ISO time from which on a timestamp was impossible; no part of the content, as it may be the
    clock's."""
    length_histogram: dict[int, PositiveCount]
    """Power of two b → users with b ≤ events < 2b."""
    shards: tuple[ShardEntry, ...]
    items: tuple[FileEntry, ...]
    vocabularies: tuple[FileEntry, ...]
    quarantine: tuple[FileEntry, ...]

    def content(self) -> dict[str, Any]:
        """As `Sealed.content`; paths are without the version's directory, and quarantine files are
        left out, as they tell which file of the log a row stood in (their counts are in)."""
        document = super().content()
        version = document.pop("version")
        if document.pop("latest", ""):  # data sets of before there was `latest` stay what they are
            document["quarantine"] = []
        for kind in ("shards", "items", "vocabularies", "quarantine"):
            for entry in document[kind]:
                entry["path"] = entry["path"].replace(f"/{version}/", "/", 1)
        return document


def build_manifest(**content: Any) -> DatasetManifest:
    """A manifest with its fingerprint; takes the fields of DatasetManifest except `fingerprint`."""
    return seal(DatasetManifest, **content)


def read_manifest(url: str) -> DatasetManifest:
    """The manifest of the data set in directory `url`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    absent = "so no data set was prepared there; run `tandem prepare RECIPE`"
    return read_sealed(url, DatasetManifest, absent=absent, mend=MEND)


def refuse_other_manifest(url: str) -> None:
    """Refuse a directory whose `manifest.json` is somebody else's: it would be replaced.

    Raises:
        ValueError: names the file and the mend. A damaged one of ours passes.
    """
    path = storage.join(url, MANIFEST)
    try:
        content = storage.read_json(path)
    except (FileNotFoundError, ValueError):
        return
    if not isinstance(content, dict) or not {"format", "fingerprint"} <= content.keys():
        raise ValueError(
            f"{path} describes no data set of Tandem's, and would be replaced by one: move it "
            "away, or choose another `output`"
        )


def seal(kind: type[SealedT], **content: Any) -> SealedT:
    """A manifest of any kind from its fields except `fingerprint`."""
    draft = kind(**content, fingerprint="")
    return draft.model_copy(update={"fingerprint": _fingerprint(draft)})


def write_manifest(url: str, manifest: Sealed) -> None:
    """Commit directory `url`; every file that the manifest names must have been written."""
    storage.write_json(storage.join(url, MANIFEST), manifest.model_dump(mode="json"))


def read_sealed(url: str, kind: type[SealedT], *, absent: str, mend: str) -> SealedT:
    """The manifest of a kind in directory `url`.

    Raises:
        ValueError: there is none (the message ends with `absent`), or it is damaged (with `mend`).
    """
    path = storage.inside(url, MANIFEST)
    try:
        manifest = kind.model_validate(storage.read_json(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist, {absent}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is damaged at {place!r} ({first['msg']}); {mend}") from error
    except StorageError:
        raise
    except ValueError as error:
        raise ValueError(f"{path} is damaged (not valid JSON); {mend}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({first_line(error)}); {mend}") from error
    if manifest.fingerprint != _fingerprint(manifest):
        raise ValueError(f"{path} is damaged (its fingerprint does not match); {mend}")
    return manifest


def verify_shard(url: str, entry: FileEntry, mend: str = MEND) -> None:
    """Check size and hash of one file of the data set in directory `url`.

    `mend` says how a damaged file is written anew.

    Raises:
        ValueError: the file is missing or differs from the manifest.
    """
    verify_file(storage.inside(url, entry.path), entry.sha256, mend)


def verify_file(path: str, sha256: str, mend: str = MEND) -> None:
    """As `verify_shard`, of a file that is known by its URL."""
    try:
        digest = storage.sha256_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {mend}") from error
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise ValueError(f"{path} cannot be read ({reason}); mend the storage or {mend}") from error
    if digest != sha256:
        raise ValueError(f"{path} is damaged (its sha256 differs from the manifest's); {mend}")


def _fingerprint(manifest: Sealed) -> str:
    return storage.fingerprint(manifest.content())
