"""Ways to damage a file, for tests that no damage is ever taken for content."""

import os
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path, Path], None]
"""Of a file, and of another one of its kind."""


def truncate(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def halve(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path, other: Path) -> None:
    os.truncate(file, 0)


def remove(file: Path, other: Path) -> None:
    file.unlink()


def swap(file: Path, other: Path) -> None:
    """Another file of the kind, whole in itself, lies in its place."""
    file.write_bytes(other.read_bytes())


def link_out(file: Path, other: Path) -> None:
    """The same bytes, but outside of the directory."""
    outside = file.parents[3] / f"outside-{file.name}"
    outside.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(outside)


def flip(at: float) -> Damage:
    """One bit at a share of the file's length."""

    def flip_a_bit(file: Path, other: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(at * (len(data) - 1))] ^= 4
        file.write_bytes(data)

    flip_a_bit.__name__ = f"flip_at_{at}"
    return flip_a_bit


DAMAGES: list[Damage] = [truncate, halve, empty, remove, swap, *map(flip, (0.0, 0.3, 0.61, 1.0))]


def name_of(damage: Damage) -> str:
    return damage.__name__
