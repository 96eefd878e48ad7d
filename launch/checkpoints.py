"""`tandem checkpoint`: what lies on storage, whether it is whole, and what is in it."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import click

from configs import storage
from configs.storage_faults import StorageError
from sharding.checkpoint import CHECKPOINT_NAME
from sharding.checkpoint_export import export_safetensors
from sharding.checkpoint_manifest import MANIFEST, CheckpointManifest, read_manifest
from sharding.checkpoint_tensors import CheckpointTensors
from trainer.monitor.progress import size

DEPTH = 4
"""Directories below a run that are searched: checkpoints/<stage>/<store>/<checkpoint>."""


def checkpoints_below(url: str) -> Iterator[str]:
    """URLs of all checkpoints in a checkpoint's own directory, a store, or a run, by name.

    Raises:
        ValueError: there are none.
    """
    root = storage.absolute(url).rstrip("/")
    found = [root] if CHECKPOINT_NAME.fullmatch(root.rsplit("/", 1)[-1]) else [*_search(root, 0)]
    if not found or not storage.exists(root):
        raise ValueError(
            f"there is no checkpoint in or below {root}: name a run's output, one of its stores "
            "(…/checkpoints/train-<fingerprint>/newest) or a checkpoint"
        )
    yield from found


def _search(url: str, depth: int) -> Iterator[str]:
    for name in storage.list_names(url):
        below = storage.join(url, name)
        if CHECKPOINT_NAME.fullmatch(name):
            yield below
        elif depth < DEPTH and "." not in name:
            yield from _search(below, depth + 1)


def render_list(url: str) -> str:
    """A line a checkpoint: where, step, time, size, ranks, hash, or why it is none."""
    root = storage.absolute(url).rstrip("/")
    lines = []
    for place in checkpoints_below(url):
        name = place.rsplit("/", 1)[-1]
        shown = place.removeprefix(f"{root}/")
        try:
            if storage.exists(storage.join(place, MANIFEST)):
                lines.append(f"{shown}  {_summary(read_manifest(place, name))}")
            else:
                lines.append(f"{shown}  unfinished: its save was interrupted; no run reads it")
        except StorageError as error:
            lines.append(f"{shown}  unknown: {error}")
        except ValueError as error:
            lines.append(f"{shown}  damaged: {error}")
    return "\n".join(lines)


def _summary(manifest: CheckpointManifest) -> str:
    total = size(sum(entry.bytes for entry in manifest.files))
    saved = datetime.fromtimestamp(manifest.created, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return (
        f"step {manifest.step:,}, {saved}, {total} in {len(manifest.files)} files, "
        f"{manifest.world_size} ranks, {manifest.fingerprint[:12]}"
    )


def verify(url: str, say: Callable[[str], None]) -> None:
    """Hash every file of every finished checkpoint.

    Raises:
        ValueError: some are damaged, or cannot be read; each has been named by then. Or none is
            finished: that of a lost manifest is not.
    """
    whole, damaged, unknown = 0, 0, 0
    for place in checkpoints_below(url):
        started = time.monotonic()
        try:
            if not storage.exists(storage.join(place, MANIFEST)):
                say(f"{place}: unfinished, passed over")
                continue
            tensors = CheckpointTensors(place)
            tensors.verify()
        except StorageError as error:
            unknown += 1
            say(f"{place}: UNKNOWN: {error}")
            continue
        except ValueError as error:
            damaged += 1
            say(f"{place}: DAMAGED: {error}")
            continue
        whole += 1
        total = sum(entry.bytes for entry in tensors.manifest.files)
        rate = size(total / max(time.monotonic() - started, 1e-9))
        say(f"{place}: whole, {size(total)} read at {rate}/s")
    if unknown:
        raise ValueError(
            f"{unknown} of {whole + damaged + unknown} checkpoints cannot be read, and {damaged} "
            "are damaged: remove none that their storage does not give"
        )
    if damaged:
        raise ValueError(
            f"{damaged} of {whole + damaged} checkpoints are damaged; runs pass over them and "
            "take the newest whole one: remove them or restore their files"
        )
    if not whole:
        raise ValueError(f"{url} holds no finished checkpoint: no save of it was committed")


def render_inspection(url: str) -> str:
    """A checkpoint's origin and tensors."""
    place = _only(url)
    tensors = CheckpointTensors(place)
    manifest = tensors.manifest
    recipe = tensors.recipe()
    lines = [place, _summary(manifest), ""]
    if recipe:
        model = recipe.get("model")
        kind = model.get("kind") if isinstance(model, dict) else None
        lines += [f"recipe {recipe.get('name')}, model {kind}, seed {recipe.get('seed')}"]
    lines += [f"{name}: {value}" for name, value in sorted(manifest.fingerprints.items())]
    lines += [f"{name} {value}" for name, value in sorted(manifest.versions.items())]
    lines += [f"whether it is whole tells `tandem checkpoint verify {place}`"]
    lines += ["", f"{'bytes':>10}  {'pieces':>6}  tensor"]
    for name in sorted(tensors.saved):
        shape = "×".join(f"{n:,}" for n in tensors.shape(name)) or "scalar"
        kind = str(tensors.dtype(name)).removeprefix("torch.")
        pieces = len(tensors.saved[name].chunks)
        lines.append(f"{size(tensors.num_bytes(name)):>10}  {pieces:>6}  {name}  {kind} {shape}")
    # A file's own words must not command the terminal.
    return "\n".join(line if line.isprintable() else repr(line) for line in lines)


def export(url: str, target: str, max_file_bytes: int) -> list[str]:
    """Write a checkpoint's weights as safetensors, with a progress bar."""
    place = _only(url)
    with click.progressbar(length=1000, label="export", show_eta=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.update(1000 * done // max(total, 1) - bar.pos)

        return export_safetensors(
            place, storage.absolute(target), max_file_bytes=max_file_bytes, progress=progress
        )


def _only(url: str) -> str:
    """The one checkpoint at `url`, or the newest finished one of a store."""
    found, root = [*checkpoints_below(url)], storage.absolute(url).rstrip("/")
    # A store's own come first: below it may lie one of what belongs to them, such as references.
    found = [place for place in found if place.rsplit("/", 1)[0] == root] or found
    stores = {place.rsplit("/", 1)[0] for place in found}
    if len(stores) > 1:
        raise ValueError(
            f"{url} has the checkpoints of {len(stores)} stores; name one of them, such as "
            f"{sorted(stores)[0]}"
        )
    finished = [p for p in found if storage.exists(storage.join(p, MANIFEST))]
    if not finished:
        raise ValueError(f"{url} has no finished checkpoint")
    return max(finished, key=lambda place: place.rsplit("-", 1)[-1])
