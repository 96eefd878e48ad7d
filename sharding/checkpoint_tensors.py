"""A checkpoint's tensors as they lie on storage: no model, no process group, no unpickling.

What inspects, exports or reads parts of a checkpoint starts here. Memory is bounded by what is
asked for, whatever the checkpoint's size.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from configs import storage
from configs.storage_faults import StorageError, first_line
from sharding.checkpoint_files import METADATA, CheckpointReader, TensorLoadPlanner
from sharding.checkpoint_manifest import (
    CheckpointManifest,
    read_manifest,
    read_verified,
    verify_file,
)
from sharding.safe_metadata import read_metadata


class CheckpointTensors:
    """The tensors of one checkpoint, by the names of `sharding.checkpoint_state`."""

    def __init__(self, url: str) -> None:
        """Read manifest and metadata.

        Raises:
            ValueError: there is no whole checkpoint in `url`.
        """
        self.url = url.rstrip("/")
        self.manifest: CheckpointManifest = read_manifest(self.url, self.url.rsplit("/", 1)[-1])
        """Its fingerprint is the checkpoint's hash."""
        data = read_verified(self.url, self.manifest, METADATA)
        self._metadata = read_metadata(
            data, {entry.path: entry.bytes for entry in self.manifest.files}
        )
        entries = self._metadata.state_dict_metadata.items()
        self.saved: dict[str, TensorStorageMetadata] = {
            name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)
        }

    def verify(self) -> None:
        """Hash every file. Raises ValueError where one is damaged."""
        for entry in self.manifest.files:
            verify_file(self.url, entry)

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe it was trained with; empty where none was given."""
        name = "recipe.json"
        data, url = read_verified(self.url, self.manifest, name), storage.join(self.url, name)
        recipe = storage.parse_json(data, url)
        if not isinstance(recipe, dict):
            raise ValueError(f"{url} is no recipe")
        return recipe

    def shape(self, name: str) -> tuple[int, ...]:
        """Size of a tensor."""
        return tuple(self.saved[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Of its elements."""
        return self.saved[name].properties.dtype

    def num_bytes(self, name: str) -> int:
        """Of a whole tensor."""
        return self.saved[name].size.numel() * self.dtype(name).itemsize

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """`count` entries of the first dimension from `first` on; reads the pieces they lie in.

        A tensor without dimensions is its own only row.

        Raises:
            ValueError: what lies there is not what the metadata say.
            StorageError: the storage refuses, or does not answer.
        """
        saved = self.saved[name]
        size = torch.Size([count, *saved.size[1:]]) if saved.size else torch.Size([])
        planner = _SlicePlanner(name, first, torch.empty(size, dtype=self.dtype(name)), saved)
        reader = CheckpointReader(self.url, self._metadata)
        with warnings.catch_warnings():  # DCP warns that one process loads: that is what we want
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                dcp.load({name: planner.rows}, storage_reader=reader, planner=planner, no_dist=True)
            except CheckpointException as error:  # no Exception, so that no caller would catch it
                raise self._told(name, error) from error
        return planner.rows

    def _told(self, name: str, error: CheckpointException) -> BaseException:
        """What a reader raised, which DCP wraps, with the place."""
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, StorageError) or not isinstance(cause, ValueError | OSError):
            return cause
        return ValueError(f"{name!r} of checkpoint {self.url} cannot be read: {first_line(cause)}")

    def blocks(self, name: str, block_bytes: int) -> Iterator[Tensor]:
        """The whole tensor in consecutive runs of rows, each about `block_bytes` large."""
        shape = self.shape(name)
        rows = shape[0] if shape else 1
        per_block = max(1, rows * block_bytes // max(self.num_bytes(name), 1))
        for first in range(0, rows, per_block):
            yield self.rows(name, first, min(per_block, rows - first))


class _SlicePlanner(TensorLoadPlanner):
    """Loads some rows of one saved tensor; DCP itself loads whole tensors or shards."""

    def __init__(self, key: str, first: int, rows: Tensor, saved: TensorStorageMetadata) -> None:
        super().__init__()
        self._key, self._first, self._saved = key, first, saved
        self.rows = rows

    def set_up_planner(
        self,
        state_dict: dict[str, Tensor],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        begin = [self._first, *([0] * (self.rows.dim() - 1))][: self.rows.dim()]
        wanted = ChunkStorageMetadata(torch.Size(begin), self.rows.size())
        return LoadPlan(create_read_items_for_chunk_list(self._key, self._saved, [wanted]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.rows
