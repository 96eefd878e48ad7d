"""Which checkpoints lie below a directory: their names, their order, and what may be removed.

For one process at a time, which is rank 0; a checkpoint is there once its manifest is.
"""

import logging
import re
import time
from collections.abc import Collection

from configs import storage
from sharding.checkpoint_manifest import MANIFEST

_log = logging.getLogger(__name__)
CHECKPOINT_NAME = re.compile(r"step-\d{8,}-([0-7][0-9a-f]{15})")
"""Of a checkpoint's directory: the step, and when it was saved, in the 63 bits of a clock."""


class CheckpointDirectory:
    """The checkpoints directly below one directory."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._index = storage.join(root, "committed.json")
        self._last = 0
        self._own: set[str] = set()
        """Names that are this store's to remove: saved here, or begun to be removed."""
        self._swept = False

    def newest_first(self) -> list[str]:
        """Names of all checkpoints, finished or not, in the order of their saves."""
        listed = {*storage.list_names(self._root), *self._remembered()}
        names = [name for name in listed if CHECKPOINT_NAME.fullmatch(name)]
        return sorted(names, key=lambda name: name.rsplit("-", 1)[1], reverse=True)

    def fresh_name(self, step: int) -> str:
        """A name that sorts before all others, whatever the clocks say.

        Raises:
            ValueError: another name has the last time that there is.
        """
        names = self.newest_first()
        last = int(names[0].rsplit("-", 1)[1], 16) if names else 0
        self._last = max(time.time_ns(), last + 1, self._last + 1)
        name = f"step-{step:08d}-{self._last:016x}"
        if not CHECKPOINT_NAME.fullmatch(name):
            raise ValueError(
                f"{storage.join(self._root, names[0])} is named as of the end of time, so that "
                "nothing can be saved after it; move it elsewhere"
            )
        return name

    def claim(self, name: str) -> None:
        """Begin a save as `name`, made here or by another store; what failed before goes."""
        self._own.add(name)
        self.remove_debris()

    def committed(self) -> list[str]:
        """Names of the checkpoints whose save finished, newest first."""
        return [
            name
            for name in self.newest_first()
            if storage.exists(storage.join(self._root, name, MANIFEST))
        ]

    def remove_debris(self) -> None:
        """Remove what saves that failed or were killed left behind, if the storage tells.

        What the index lists was committed, even if the storage does not show its manifest now.

        The first time that of all; then of ours alone, as another run that has taken over, or is
        being taken over from, may be at a save.
        """
        try:
            names = self.newest_first()
            kept = {*self.committed(), *self._remembered()}
        except OSError as error:
            _log.warning("what unfinished saves left in %s stays for now: %s", self._root, error)
            return
        for name in names:
            if name not in kept and (name in self._own or not self._swept):
                self.remove(name)
        self._swept = True

    def _remembered(self) -> list[str]:
        """Names that `remember` wrote; what is damaged tells nothing, and the listing has it."""
        if storage.is_local(self._root):
            return []
        try:
            return [str(name) for name in storage.read_sealed(self._index)["names"]]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return []

    def remember(self, name: str) -> None:
        """Write down what is committed, as a store of objects may list it only later."""
        if not storage.is_local(self._root):
            self._write_index({name, *self.committed(), *self._remembered()})

    def _forget(self, name: str) -> None:
        names = set(self._remembered())
        if name in names:
            self._write_index(names - {name})

    def _write_index(self, names: Collection[str]) -> None:
        storage.write_sealed(self._index, {"names": sorted(names)})

    def prune(
        self, saved: str, keep: int, damaged: Collection[str], needed: Collection[str]
    ) -> None:
        """Keep the `keep` newest checkpoints, of which damaged ones do not count, and the `needed`.

        Those that others made stay until `saved`, the newest of ours, is of no earlier step: they
        may be of a run that took over from this one.
        """
        committed = self.committed()
        kept = [name for name in committed if name not in damaged][:keep]
        for name in committed[committed.index(kept[-1]) + 1 :] if kept else []:
            ahead = name not in self._own and _step_of(name) > _step_of(saved)
            if name not in needed and not ahead:
                self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its commit first; a failure is no reason to stop training."""
        self._own.add(name)  # `remove_debris` goes on with what this leaves
        try:
            self._forget(name)
            storage.remove(storage.join(self._root, name, MANIFEST))
            storage.remove(storage.join(self._root, name))
        except Exception as error:  # noqa: BLE001 - each storage back end raises its own kinds
            _log.warning("%s/%s cannot be removed: %s", self._root, name, error)


def _step_of(name: str) -> int:
    return int(name.split("-")[1])
