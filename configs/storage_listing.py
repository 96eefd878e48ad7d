"""What lies below a directory of any file system: all of it, or an error.

fsspec's `find`, `glob` and `rm` pass over directories whose listing fails, so that a part of a tree
would pass for the whole.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from configs.storage_faults import explained, patiently

GLOB_SIGNS = "*?["


def listed(fs: AbstractFileSystem, path: str, done: str = "read") -> tuple[list[str], list[str]]:
    """Files at or below `path`, and directories, itself first, each before what it holds.

    A link to a directory is one, unless that holds it. However many links lead to a directory, it
    is listed once, by its own name where that is below `path`, too: nothing in it counts twice, and
    links to each other end.

    Raises:
        StorageError: a directory cannot be listed, so that its tree cannot be `done`. One that is
            gone by now holds nothing.
    """
    local = isinstance(fs, LocalFileSystem)
    files: list[str] = []
    places: dict[str, str] = {}  # where a directory really is → its name here
    waiting, links = deque([path]), deque[str]()
    while waiting or links:
        directory = (waiting or links).popleft()
        place = os.path.realpath(directory) if local else directory
        if place in places:
            continue
        places[place] = directory
        for name, is_directory in _entries(fs, directory, done):
            if not is_directory:
                files.append(name)
            else:
                (links if local and os.path.islink(name) else waiting).append(name)
    return files, list(places.values())


def globbed(fs: AbstractFileSystem, pattern: str) -> list[str]:
    """Files whose path matches a pattern of *, ?, [a-z] and, as a whole part, **.

    Only directories that the pattern's parts match are looked into. What ** stands for is `listed`;
    other signs find a directory by each link's name that they match.

    Raises:
        StorageError: as `listed`.
    """
    parts = pattern.split("/")
    parts = [part for at, part in enumerate(parts) if part != "**" or parts[at - 1 : at] != ["**"]]
    fixed = next(at for at, part in enumerate(parts) if any(sign in part for sign in GLOB_SIGNS))
    places = ["/".join(parts[:fixed]) or fs.root_marker]
    for part in parts[fixed:-1]:
        if part == "**":
            places = [below for place in places for below in listed(fs, place)[1]]
        else:
            places = _matching(fs, places, part, lambda is_directory: is_directory)
    if parts[-1] == "**":
        files = [file for place in places for file in listed(fs, place)[0]]
    else:
        files = _matching(fs, places, parts[-1], lambda is_directory: not is_directory)
    return list(dict.fromkeys(files))  # two ** may find a file twice


def _matching(
    fs: AbstractFileSystem, places: list[str], part: str, wanted: Callable[[bool], bool]
) -> list[str]:
    return [
        name
        for place in places
        for name, is_directory in _entries(fs, place, "read")
        if wanted(is_directory) and fnmatchcase(name.rstrip("/").rpartition("/")[2], part)
    ]


def _entries(fs: AbstractFileSystem, directory: str, done: str) -> Iterator[tuple[str, bool]]:
    """Path of each entry of a directory, and whether it is a directory."""
    local = isinstance(fs, LocalFileSystem)
    fs.invalidate_cache(directory)
    found = []
    with (
        suppress(FileNotFoundError, NotADirectoryError),
        explained(directory if local else fs.unstrip_protocol(directory), done),
    ):
        found = patiently(lambda: fs.ls(directory, detail=True))
    for entry in sorted(found, key=lambda entry: str(entry["name"])):  # so that all runs agree
        name = entry["name"]
        if local and entry["islink"] and os.path.isdir(name):
            if not f"{os.path.realpath(directory)}/".startswith(f"{os.path.realpath(name)}/"):
                yield name, True
        elif entry["type"] != "directory":
            yield name, False
        elif name.strip("/") != directory.strip("/"):  # which some stores list, too
            yield name, True
