"""Rows of an embedding table straight from a checkpoint, without the model around it.

Shape legend: n rows, D width.
"""

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from configs import storage
from sharding.checkpoint_files import CheckpointReader, TensorLoadPlanner
from sharding.checkpoint_manifest import CheckpointManifest, read_manifest, verify_file
from sharding.safe_metadata import read_metadata


class CheckpointTable:
    """One table of a checkpoint, sharded or replicated when it was saved."""

    def __init__(self, url: str, table: str) -> None:
        """Read the checkpoint's manifest and metadata; `table` is a name such as `item`.

        Raises:
            ValueError: there is no whole checkpoint in `url`, or it has no such table.
        """
        self.url = url
        self.manifest: CheckpointManifest = read_manifest(url, url.rstrip("/").rsplit("/", 1)[-1])
        """Its fingerprint is the checkpoint's hash."""
        data = storage.read_bytes(storage.join(url, ".metadata"))
        self._metadata = read_metadata(data, {entry.path for entry in self.manifest.files})
        entries = self._metadata.state_dict_metadata
        keys = (f"tables/{table}.weight", f"dense/tables.{table}.weight/weight")
        found = [key for key in keys if isinstance(entries.get(key), TensorStorageMetadata)]
        if not found:
            raise ValueError(f"checkpoint {url} has no embedding table {table!r}")
        self._key = found[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (the highest id + 1) and D."""
        rows, width = self._tensor().size
        return rows, width

    def verify(self) -> None:
        """Hash every file of the checkpoint. Raises ValueError where one is damaged."""
        for entry in self.manifest.files:
            verify_file(self.url, entry)

    def rows(self, first: int, count: int) -> Tensor:
        """Rows first … first + count - 1: float32 [n, D]. Reads the chunks that hold them."""
        planner = _SlicePlanner(self._key, first, count, self._tensor())
        reader = CheckpointReader(self.url, self._metadata)
        dcp.load({self._key: planner.rows}, storage_reader=reader, planner=planner, no_dist=True)
        return planner.rows

    def _tensor(self) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[self._key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry


class _SlicePlanner(TensorLoadPlanner):
    """Loads some rows of one saved tensor; DCP itself loads whole tensors or shards."""

    def __init__(self, key: str, first: int, count: int, saved: TensorStorageMetadata) -> None:
        super().__init__()
        self._key, self._first, self._saved = key, first, saved
        self.rows = torch.zeros(count, saved.size[1], dtype=torch.float32)

    def set_up_planner(
        self,
        state_dict: dict[str, Tensor],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        wanted = ChunkStorageMetadata(torch.Size([self._first, 0]), self.rows.size())
        return LoadPlan(create_read_items_for_chunk_list(self._key, self._saved, [wanted]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.rows
