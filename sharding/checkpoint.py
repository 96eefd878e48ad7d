"""One checkpoint for both halves: saved by DCP, committed by a hashed manifest, or not there.

A save goes into a fresh directory `step-00000120-<time in hex>/`; each rank hashes what it writes,
and rank 0 writes `MANIFEST.json` last. Until then the directory is debris, which the next save
removes. Loading takes the newest directory whose manifest and files verify, agreed by all ranks.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.metadata import version
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from configs import storage
from sharding import checkpoint_state
from sharding.agreement import Agreement, CheckpointError, Failure, UnreadableError
from sharding.checkpoint_directory import CHECKPOINT_NAME, CheckpointDirectory
from sharding.checkpoint_files import (
    METADATA,
    CheckpointReader,
    CheckpointWriter,
    TensorLoadPlanner,
)
from sharding.checkpoint_manifest import (
    CheckpointFile,
    CheckpointInfo,
    CheckpointManifest,
    build_manifest,
    info_of,
    read_manifest,
    read_verified,
    verify_file,
    write_manifest,
)
from sharding.checkpoint_recut import KeptRows, Recut, starting_state
from sharding.parallelize import ParallelModel
from sharding.process_group import DistributedContext
from sharding.safe_metadata import read_metadata

__all__ = ["CHECKPOINT_NAME", "CheckpointError", "CheckpointInfo", "CheckpointStore"]

_LIBRARIES = ("torch", "torchrec", "deepspeed")
STATE = "state.json"
_log = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointStore:
    """The checkpoints below one directory, which only this worker group writes.

    Every method is collective: all ranks call it with equal arguments, and raise together; but
    `names` and `states`, for one rank alone.
    """

    def __init__(
        self,
        root_url: str,
        keep: int,
        ctx: DistributedContext,
        needed: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """Keep the `keep` newest checkpoints (at least 2) of `root_url`, any URL all ranks see, and
        whatever else is `needed`: names, asked for on rank 0 before any is removed."""
        if keep < 2:
            raise ValueError(f"keep={keep} checkpoints are too few: one may be damaged, keep 2")
        self.root = storage.absolute(root_url)
        self.skipped: tuple[str, ...] = ()
        """Why `newest` passed over checkpoints newer than the one it gave, a sentence each.

        What a killed save left was never a checkpoint: it is not named here."""
        self.notes: tuple[str, ...] = ()
        """What the last load could not carry over as it was, a sentence a table."""
        self.keep = keep
        self._needed = needed
        self._ctx = ctx
        self._agree = Agreement(ctx)
        self._damaged: set[str] = set()
        self._directory = CheckpointDirectory(self.root)

    def save(
        self,
        model: ParallelModel,
        step: int,
        state: Mapping[str, Any],
        recipe_json: Mapping[str, Any],
        fingerprints: Mapping[str, str],
        name: str | None = None,
    ) -> CheckpointInfo:
        """Write a checkpoint, then remove those beyond `keep`.

        Args:
            model: both halves.
            step: optimizer steps done.
            state: JSON-able state of the trainer, which `load` gives back.
            recipe_json: the resolved recipe.
            fingerprints: of the data set and whatever else must match to go on.
            name: as `next_name` gave it, or another store for what belongs together; a new one if
                it is left out.

        Raises:
            CheckpointError: a rank could not write (a full disk, say). Earlier checkpoints are
                intact, and nothing of this one is left.
            MemoryError: the same, where a rank's memory ran out.
        """
        tensors = checkpoint_state.training_state(model) | checkpoint_state.random_state(self._ctx)
        documents = {STATE: state, "recipe.json": recipe_json}
        return self.write(step, tensors, documents, fingerprints, name)

    def write(
        self,
        step: int,
        tensors: dict[str, Tensor],
        documents: Mapping[str, Mapping[str, Any]],
        fingerprints: Mapping[str, str],
        name: str | None = None,
    ) -> CheckpointInfo:
        """As `save`, of tensors and JSON documents at hand."""
        name = self.next_name(step) if name is None else name
        self._agree.on_first_rank(lambda: self._directory.claim(name))
        url = storage.join(self.root, name)
        try:
            files = self._write_tensors(url, tensors)
            manifest = self._agree.on_first_rank(
                lambda: self._commit(name, step, files, documents, fingerprints)
            )
        except (CheckpointError, MemoryError) as error:
            self._agree.on_first_rank(self._directory.remove_debris)
            told = f"checkpoint of step {step} could not be written to {self.root} ({error})"
            if isinstance(error, MemoryError):
                raise MemoryError(f"{told}; earlier ones are intact") from error
            mend = "check space and permissions there, then run it again"
            raise CheckpointError(f"{told}; earlier ones are intact: {mend}") from error
        self._agree.on_first_rank(lambda: self._directory.remember(name))
        self._agree.on_first_rank(lambda: self._prune(name))
        return info_of(url, manifest)

    def next_name(self, step: int) -> str:
        """A name for a checkpoint of `step` that is about to be saved, after all others."""
        return self._agree.on_first_rank(lambda: self._directory.fresh_name(step))

    def apart(self, ctx: DistributedContext) -> "CheckpointStore":
        """The same store, whose collectives are those of `ctx`."""
        twin = CheckpointStore(self.root, self.keep, ctx, self._needed)
        twin._damaged, twin._directory = self._damaged, self._directory
        return twin

    def names(self) -> list[str]:
        """Of the checkpoints whose save finished, newest first. Of one rank alone."""
        return self._directory.committed()

    def states(self) -> Iterator[dict[str, Any]]:
        """What `save` was given as the state of each that tells it, newest first: no run resumes
        from the others. Of one rank alone."""
        for name in self.names():
            url = storage.join(self.root, name)
            try:
                data = read_verified(url, read_manifest(url, name), STATE)
                yield dict(storage.parse_json(data, storage.join(url, STATE)))
            except ValueError:
                continue

    def newest(self) -> CheckpointInfo | None:
        """The newest checkpoint that verifies, or None.

        Every byte of its files is hashed once, by one rank or another. `skipped` says why newer
        ones were passed over, for the caller to tell. Unfinished saves do not count.
        """
        return self._first_whole(self._agree.on_first_rank(self.names))

    def at(self, name: str) -> CheckpointInfo | None:
        """The checkpoint of this name, as `newest`, if it verifies."""
        return self._first_whole([name] if CHECKPOINT_NAME.fullmatch(name) else [])

    def _first_whole(self, names: list[str]) -> CheckpointInfo | None:
        skipped: list[str] = []
        chosen = None
        for name in names:
            url = storage.join(self.root, name)
            try:
                chosen = info_of(url, self._verify(url, name))
                break
            except UnreadableError as error:
                raise UnreadableError(f"checkpoint {url} is left as it is: {error}") from error
            except CheckpointError as error:
                skipped.append(f"checkpoint {url} is skipped: {error}")
                self._damaged.add(name)
        self.skipped = tuple(skipped)
        return chosen

    def load(self, model: ParallelModel, info: CheckpointInfo) -> dict[str, Any]:
        """Restore everything, under any world size, plan and ZeRO stage; what `save` was given.

        Generators of random numbers are restored only where the world size is the same; ours are
        keyed by step and sample, so that nothing depends on them.

        Raises:
            CheckpointError: it belongs to another model.
        """
        target = checkpoint_state.training_state(model)
        random = checkpoint_state.empty_random_state(self._metadata(info), self._ctx)
        self._read_state(info, model, target | random)
        checkpoint_state.restore_training_state(model, target)
        checkpoint_state.restore_random_state(random, self._ctx)
        return self._document(info, STATE)

    def load_weights(self, model: ParallelModel, info: CheckpointInfo) -> None:
        """Restore the weights of both halves alone, for evaluation.

        Raises:
            CheckpointError: it belongs to another model.
        """
        self._load_part(model, info, checkpoint_state.weights(model))

    def load_start(self, model: ParallelModel, info: CheckpointInfo) -> None:
        """Restore what a new stage of training begins with: weights, and the tables' optimizer.

        Raises:
            CheckpointError: it belongs to another model.
        """
        saved = checkpoint_state.tensors(self._metadata(info))
        self._load_part(model, info, starting_state(model, saved))

    def load_warm(
        self, model: ParallelModel, info: CheckpointInfo, kept: Mapping[str, KeptRows]
    ) -> None:
        """Restore what a training over other data begins with: all but the count of steps.

        Rows that the checkpoint lacks stay as they are, and so do tables; its own that the model
        lacks are left out. `notes` names them.

        Args:
            model: a new one.
            kept: of each table, which rows the checkpoint has, and where.

        Raises:
            CheckpointError: it belongs to another model.
        """
        target = checkpoint_state.training_state(model)
        step = target.pop("step")
        self._read_state(info, model, target, kept=kept)
        checkpoint_state.restore_training_state(model, target | {"step": step})

    def _load_part(
        self, model: ParallelModel, info: CheckpointInfo, target: dict[str, Tensor]
    ) -> None:
        self._read_state(info, model, target, whole=False)
        checkpoint_state.restore_weights(model, target)

    def _read_state(
        self,
        info: CheckpointInfo,
        model: ParallelModel,
        target: dict[str, Tensor],
        *,
        whole: bool = True,
        kept: Mapping[str, KeptRows] | None = None,
    ) -> None:
        """Fill in tensors of the model, in place; those that are cut otherwise one by one."""
        metadata = self._metadata(info)
        saved = checkpoint_state.tensors(metadata)
        recut = Recut(model, saved, target, kept)
        plain = recut.plain(target)
        self._check(
            info,
            lambda: checkpoint_state.refuse_other_model(plain, recut.plain(saved), whole=whole),
        )
        self._read_tensors(info, metadata, plain)
        self._check(info, lambda: self._agree.on_every_rank(lambda: recut.read(info)))
        self.notes = recut.notes

    def recipe(self, info: CheckpointInfo) -> dict[str, Any]:
        """The resolved recipe that a checkpoint was trained with."""
        return self._document(info, "recipe.json")

    def _document(self, info: CheckpointInfo, name: str) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            data = read_verified(info.url, _manifest(info), name)
            return dict(storage.parse_json(data, storage.join(info.url, name)))

        return self._check(info, lambda: self._agree.on_first_rank(read))

    def _write_tensors(self, url: str, tensors: dict[str, Tensor]) -> list[CheckpointFile]:
        """Save through DCP; the files of every rank."""
        writer = CheckpointWriter(url)
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        failure: Failure | None = None
        try:
            dcp.save(
                tensors,
                storage_writer=writer,
                planner=planner,
                process_group=self._ctx.group,
            )
        except CheckpointException as error:  # DCP raises it on all ranks together
            failure = _reason(error, self._ctx)
        self._agree.raise_together(failure)
        written = self._ctx.all_gather_object(list(writer.written.values()))
        return [entry for files in written for entry in files]

    def _read_tensors(
        self, info: CheckpointInfo, metadata: Metadata, target: dict[str, Tensor]
    ) -> None:
        """Load through DCP, in place."""
        failure: Failure | None = None
        try:
            reader = CheckpointReader(info.url, metadata)
            dcp.load(target, storage_reader=reader, planner=TensorLoadPlanner())
        except CheckpointException as error:
            failure = _reason(error, self._ctx)
        self._check(info, lambda: self._agree.raise_together(failure))

    def _commit(
        self,
        name: str,
        step: int,
        files: list[CheckpointFile],
        documents: Mapping[str, Mapping[str, Any]],
        fingerprints: Mapping[str, str],
    ) -> CheckpointManifest:
        url, entries = storage.join(self.root, name), list(files)
        for path, content in documents.items():
            data = storage.json_bytes(dict(content))
            storage.write_bytes(storage.join(url, path), data)
            digest = storage.sha256_bytes(data)
            entries.append(CheckpointFile(path=path, bytes=len(data), sha256=digest))
        manifest = build_manifest(
            name=name,
            step=step,
            created=time.time(),
            world_size=self._ctx.world_size,
            versions={library: version(library) for library in _LIBRARIES},
            fingerprints=dict(fingerprints),
            files=sorted(entries, key=lambda entry: entry.path),
        )
        write_manifest(url, manifest)
        return manifest

    def _verify(self, url: str, name: str) -> CheckpointManifest:
        """The manifest of a checkpoint whose files every rank finds whole; each hashes its deal."""
        manifest = self._agree.on_first_rank(lambda: read_manifest(url, name))
        by_size = sorted(manifest.files, key=lambda entry: (-entry.bytes, entry.path))

        def check() -> None:
            for entry in by_size[self._ctx.rank :: self._ctx.world_size]:
                verify_file(url, entry)
            _parse_metadata(url, manifest)

        self._agree.on_every_rank(check)
        return manifest

    def _metadata(self, info: CheckpointInfo) -> Metadata:
        def read() -> Metadata:
            return _parse_metadata(info.url, _manifest(info))

        return self._check(info, lambda: self._agree.on_every_rank(read))

    def _check(self, info: CheckpointInfo, function: Callable[[], T]) -> T:
        try:
            return function()
        except ValueError as error:
            raise CheckpointError(f"checkpoint {info.url} cannot be loaded: {error}") from error

    def _prune(self, saved: str) -> None:
        """Keep the newest checkpoints; damaged ones do not count. No failure stops training."""
        try:
            self._directory.prune(saved, self.keep, self._damaged, self._needed())
        except OSError as error:
            _log.warning("old checkpoints stay for now: %s", error)


def _parse_metadata(url: str, manifest: CheckpointManifest) -> Metadata:
    data = read_verified(url, manifest, METADATA)
    return read_metadata(data, {entry.path: entry.bytes for entry in manifest.files})


def _manifest(info: CheckpointInfo) -> CheckpointManifest:
    """As it was when the checkpoint was verified. Raises ValueError where it is another now."""
    manifest = read_manifest(info.url, info.name)
    if manifest.fingerprint != info.hash:
        raise ValueError("it was replaced since it was verified")
    return manifest


def _reason(error: CheckpointException, ctx: DistributedContext) -> Failure | None:
    """What this rank, or for all of them rank 0, knows about a failure in DCP."""
    if ctx.rank in error.failures:
        return Failure.of(error.failures[ctx.rank][0])
    return None
