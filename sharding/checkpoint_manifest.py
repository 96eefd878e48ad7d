"""The manifest of a checkpoint: the hash of each of its files. Written last, it is the commit.

A directory without a valid manifest is not a checkpoint, and a file whose size or hash differs
from the manifest's is damaged.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from configs import storage
from configs.base import Config, Count, PositiveCount, Timestamp
from configs.storage_faults import StorageError, explained, patiently
from sharding.block_file import block_digest

MANIFEST = "MANIFEST.json"

LOOKS_AT_ONCE = 16
"""Files whose sizes are asked for at a time: a store far away takes its time for each answer."""
MIN_BLOCK_BYTES, MAX_BLOCK_BYTES = 1 << 12, 1 << 28
"""Memory of a few blocks is what hashing a file may cost, and some work for each of them."""

PlainName = Annotated[str, StringConstraints(pattern=r"^\.?[A-Za-z0-9_]+(\.[a-z]+)?$")]
"""The name of a file directly in the checkpoint's directory; no path leads out of it."""
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class CheckpointFile(Config):
    """A file of the checkpoint."""

    path: PlainName
    bytes: Count
    sha256: Sha256
    block: Annotated[int, Field(ge=MIN_BLOCK_BYTES, le=MAX_BLOCK_BYTES)] | None = None
    """Bytes of the blocks whose digests `sha256` is the hash of; null: it is the file's own."""


class CheckpointManifest(Config):
    """What a checkpoint is made of, and what it was made from."""

    format: Literal[1] = 1
    name: str
    step: Count
    created: Timestamp
    """Orders checkpoints of one step."""
    world_size: PositiveCount
    versions: dict[str, str]
    """Library → version it was written with."""
    fingerprints: dict[str, str]
    """What must match to go on with it, e.g. the data set's fingerprint."""
    files: tuple[CheckpointFile, ...]
    fingerprint: str
    """Hash of all fields above, and so of all files: the checkpoint's identity."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose files were verified."""

    name: str
    url: str
    step: int
    hash: str
    """Changes with any byte of any file, its name and its time."""
    weights: str
    """Changes with any tensor: two saves of one step have it in common."""
    world_size: int
    """Ranks that wrote it."""
    created: float
    """Seconds since the epoch."""
    versions: dict[str, str]
    """Library → version it was written with."""
    fingerprints: dict[str, str]
    """As given to `save`."""


def info_of(url: str, manifest: CheckpointManifest) -> CheckpointInfo:
    """What to know of the checkpoint in directory `url` once its files were verified."""
    return CheckpointInfo(
        name=manifest.name,
        url=url,
        step=manifest.step,
        hash=manifest.fingerprint,
        weights=storage.fingerprint(
            [[each.path, each.sha256] for each in manifest.files if not each.path.endswith(".json")]
        ),
        world_size=manifest.world_size,
        created=manifest.created,
        versions=manifest.versions,
        fingerprints=manifest.fingerprints,
    )


def build_manifest(**content: Any) -> CheckpointManifest:
    """A manifest with its fingerprint; takes the fields of CheckpointManifest except that one."""
    draft = CheckpointManifest(**content, fingerprint="")
    return draft.model_copy(update={"fingerprint": _fingerprint(draft)})


def write_manifest(url: str, manifest: CheckpointManifest) -> None:
    """Commit the checkpoint in directory `url`; every file it names must have been written."""
    storage.write_json(storage.join(url, MANIFEST), manifest.model_dump(mode="json"))


def read_manifest(url: str, name: str) -> CheckpointManifest:
    """The manifest of the checkpoint `name` in directory `url`.

    Raises:
        ValueError: it is missing, damaged, or belongs to another checkpoint.
        StorageError: whether it does is not known.
    """
    place = storage.join(url, MANIFEST)
    if storage.is_local(url) and "/" in url:  # neither it nor the checkpoint is a link elsewhere
        above, own = url.rstrip("/").rsplit("/", 1)
        storage.inside(above or "/", f"{own}/{MANIFEST}")
    with _named(f"its {MANIFEST}", absent="missing, so its save never finished"):
        data = storage.read_bytes(place)
    try:
        manifest = CheckpointManifest.model_validate(storage.parse_json(data, place))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"its {MANIFEST} is wrong at {place!r} ({first['msg']})") from error
    except ValueError as error:
        raise ValueError(f"its {MANIFEST} is not valid JSON") from error
    if manifest.fingerprint != _fingerprint(manifest) or manifest.name != name:
        raise ValueError(f"its {MANIFEST} does not match its own fingerprint and name")
    return manifest


def look_over(url: str, fingerprint: str) -> None:
    """Check, without reading a tensor, that directory `url` still holds the checkpoint of this
    hash: its manifest, and that every file is there and as long as it was.

    Raises:
        ValueError: it does not, in a sentence; bits that flipped are found by `verify_file` alone.
        StorageError: the storage refuses, or does not answer.
    """
    manifest = read_manifest(url, url.rsplit("/", 1)[-1])
    if manifest.fingerprint != fingerprint:
        raise ValueError("another checkpoint lies there now")
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        list(pool.map(lambda entry: _look_at(url, entry), manifest.files))


def _look_at(url: str, entry: CheckpointFile) -> str:
    """Where a file lies, which is there and of its size. Raises ValueError, StorageError."""
    with _named(entry.path):
        place = storage.inside(url, entry.path)
        size = storage.size(place)
    if size != entry.bytes:
        raise ValueError(f"{entry.path} has {size} bytes instead of {entry.bytes}")
    return place


@contextmanager
def _named(name: str, absent: str = "missing") -> Iterator[None]:
    """A file's absence, or a broken disk, as a ValueError; what its storage refuses passes."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{name} is {absent}") from error
    except StorageError:
        raise
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error})") from error


def verify_file(url: str, entry: CheckpointFile) -> None:
    """Check that one file of the checkpoint in directory `url` is there and unchanged.

    Raises:
        ValueError: it is missing, leads elsewhere, cannot be read where a disk is broken, or its
            size or hash differs from the manifest's.
        StorageError: the storage refuses, or does not answer.
    """
    place = _look_at(url, entry)
    with _named(entry.path), explained(place, "read"):
        digest = patiently(lambda: _digest(place, entry.block))
    if digest != entry.sha256:
        raise ValueError(f"{entry.path} is damaged: its sha256 differs from the manifest's")


def _digest(place: str, block: int | None) -> str:
    return storage.sha256_file(place) if block is None else block_digest(place, block)


def read_verified(url: str, manifest: CheckpointManifest, path: str) -> bytes:
    """Content of a small file of the checkpoint in directory `url`; what is given was hashed.

    Raises:
        ValueError: as `verify_file`, or the checkpoint has no such file.
        StorageError: the storage refuses, or does not answer.
    """
    entry = next((entry for entry in manifest.files if entry.path == path), None)
    if entry is None:
        raise ValueError(f"it has no {path}")
    with _named(path):
        data = storage.read_bytes(storage.inside(url, path))
    if len(data) != entry.bytes or storage.sha256_bytes(data) != entry.sha256:
        raise ValueError(f"{path} is damaged: its sha256 differs from the manifest's")
    return data


def _fingerprint(manifest: CheckpointManifest) -> str:
    content = manifest.model_dump(mode="json", exclude={"fingerprint"}, exclude_none=True)
    return storage.fingerprint(content)  # without what manifests of before do not have
