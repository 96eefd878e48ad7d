"""Whether what `prepare`, `tokenize` and `align` left is whole, also what no stage reads."""

from collections.abc import Callable

from configs import storage
from configs.storage_faults import StorageError, first_line
from data_loaders.manifest import MANIFEST, DatasetManifest, Sealed, read_sealed, verify_shard
from data_loaders.pairs import PairManifest
from data_loaders.preferences import ReferenceManifest
from data_loaders.semantic_ids import SemanticIdManifest

_KINDS: dict[str, tuple[str, type[Sealed]]] = {
    "vocabularies": ("data set", DatasetManifest),
    "codebook_sizes": ("semantic ids", SemanticIdManifest),
    "rule": ("pairs", PairManifest),
    "policy_hash": ("reference log-probabilities", ReferenceManifest),
}
"""A key that only manifests of this kind have."""
_MEND = "restore it, or run the stage that wrote it with --force"


def verify_directory(url: str, say: Callable[[str], None]) -> None:
    """Hash every file of the data set, semantic ids, pairs or reference in directory `url`.

    Raises:
        ValueError: there is nothing of the kind, or some files are damaged; each has been named.
    """
    path = storage.join(url, MANIFEST)
    if not storage.exists(path):
        raise ValueError(f"{path} does not exist: name a data set, or another directory with one")
    try:
        content = storage.read_json(path)
    except StorageError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({first_line(error)}); {_MEND}") from error
    keys = content.keys() if isinstance(content, dict) else ()
    found = [kind for key, kind in _KINDS.items() if key in keys]
    if len(found) != 1:
        raise ValueError(f"{path} is no manifest of Tandem's, or damaged; {_MEND}")
    name, kind = found[0]
    manifest = read_sealed(url, kind, absent="", mend=_MEND)
    damaged = 0
    for entry in manifest.files():
        try:
            verify_shard(url, entry, _MEND)
        except ValueError as error:
            damaged += 1
            say(f"DAMAGED: {error}")
    count = len(manifest.files())
    if damaged:
        raise ValueError(f"{damaged} of the {count} files of {url} ({name}) are damaged; {_MEND}")
    say(f"{url}: {name}, whole, {count} files, {manifest.fingerprint[:12]}")
