"""Which files a URL of a recipe names: one, those that match a glob, or those of a directory."""

from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from configs import storage
from configs.storage_faults import explained, patiently
from configs.storage_listing import GLOB_SIGNS, globbed, listed


class NoSuchFileError(ValueError):
    """A URL of a recipe names no file."""


def matching_files(url: str, place: str) -> list[tuple[Any, str, str]]:
    """(file system, path, name) of each file, in name order.

    Of what a glob or a directory names, hidden files (they or a directory on the way to them begin
    with _ or .) are left out, as programs call markers and half-written files so; a file that the
    URL names outright is never hidden.

    Raises:
        NoSuchFileError: there is no file.
        ValueError: there are only hidden ones.
    """
    fs, path = storage.filesystem(url)
    with explained(url, "read"):
        paths, root, many = _named(fs, path)
    named = sorted((p.removeprefix(root), p) for p in paths)
    visible = [(n, p) for n, p in named if not (many and any(s[:1] in "_." for s in n.split("/")))]
    if named and not visible:
        raise ValueError(
            f"{place}={url!r} names only hidden files such as {named[0][0]!r}, which begin with _ "
            "or . and are left out; rename them or name a single file outright"
        )
    if not visible:
        mend = "check the path"
        if isinstance(fs, MemoryFileSystem):
            mend = (
                "memory:// has only what this very process wrote, and no command line wrote any: "
                "give a directory or an object store (s3://…, gs://…)"
            )
        raise NoSuchFileError(f"{place}={url!r} names no file; {mend}")
    return [(fs, path, name) for name, path in visible]


def _named(fs: Any, path: str) -> tuple[list[str], str, bool]:
    """Paths of files, the directory that their names are relative to, and whether many may be."""
    web = path.startswith(("http:", "https:"))  # where ? begins a query: of a signed link, say
    pattern = path.partition("?")[0] if web else path
    if any(sign in pattern for sign in GLOB_SIGNS):
        root = path[: min(pattern.find(sign) for sign in GLOB_SIGNS if sign in pattern)]
        return globbed(fs, path), root.rpartition("/")[0] + "/", True
    try:
        # Not `isdir`, to which a request that failed is a no.
        kind = patiently(lambda: fs.info(path))["type"]
    except (FileNotFoundError, NotADirectoryError):
        return [], path, False
    if kind == "directory" or fs.isdir(path):  # which index pages of http are by `isdir` alone
        return listed(fs, path)[0], path.rstrip("/") + "/", True
    return [path], path.rpartition("/")[0] + "/", False
