"""What lies below a directory of any file system: all of it, or an error.

fsspec's `find`, `glob` and `rm` pass over directories whose listing fails, so that a part of a tree
would pass for the whole.
"""

import re
from contextlib import suppress

from fsspec import AbstractFileSystem
from fsspec.utils import glob_translate

GLOB_SIGNS = "*?["


def listed(
    fs: AbstractFileSystem, path: str, depth: int | None = None
) -> tuple[list[str], list[str]]:
    """Files at or below `path`, and directories, itself first, each before what it holds.

    Args:
        depth: directories that a file may lie in, `path` included; None for any number.

    Raises:
        OSError: a directory could not be listed; drivers raise their own kinds too. One that is
            gone by now holds nothing.
    """
    fs.invalidate_cache(path)
    files, directories = [], [path]
    levels = {path: 1}
    for directory in directories:  # which grow by what is found in them
        with suppress(FileNotFoundError, NotADirectoryError):
            for entry in fs.ls(directory, detail=True):
                name = entry["name"]
                if entry["type"] != "directory":
                    files.append(name)
                elif name.strip("/") != directory.strip("/"):
                    levels[name] = levels[directory] + 1
                    if depth is None or levels[name] <= depth:
                        directories.append(name)
    return files, directories


def globbed(fs: AbstractFileSystem, pattern: str) -> list[str]:
    """Files whose path matches a pattern of *, ?, [a-z] and, as a whole part, **.

    Raises:
        OSError: as `listed`.
    """
    first = min(pattern.find(sign) for sign in GLOB_SIGNS if sign in pattern)
    root = pattern[:first].rpartition("/")[0]
    depth = None if "**" in pattern else pattern[first:].count("/") + 1
    matches = re.compile(glob_translate(pattern)).match
    return [name for name in listed(fs, root or fs.root_marker, depth)[0] if matches(name)]
