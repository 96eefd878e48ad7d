"""Removal of a whole tree from any file system: each request is patient, and may be repeated."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from configs.storage_faults import patiently
from configs.storage_listing import listed

AT_ONCE = 16
"""Files that are removed at a time: a store far away takes its time for each answer."""


def remove_tree(fs: AbstractFileSystem, path: str) -> None:
    """Delete a file, a link, or a directory and what is listed below it; absent is fine.

    Raises:
        OSError: some may be left; drivers raise their own kinds too.
    """
    if isinstance(fs, LocalFileSystem):
        patiently(lambda: _remove_local(fs, path))
    else:
        _remove_listed(fs, path)


def _remove_local(fs: LocalFileSystem, path: str) -> None:
    try:
        fs.rm(path, recursive=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.lexists(path):
            raise OSError(errno.EAGAIN, "others remove it too", path) from error


def _remove_listed(fs: AbstractFileSystem, path: str) -> None:
    """Not by fsspec's `rm`, which ends at a file that is gone already, and takes signs in names for
    a glob's."""
    files, directories = listed(fs, path, "removed")

    def remove_file(file: str) -> None:
        with suppress(FileNotFoundError):
            patiently(lambda: fs.rm_file(file))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(remove_file, files))
    for directory in reversed(directories):
        with suppress(OSError):  # a store of objects has none, and an empty one is no harm
            fs.rmdir(directory)
