"""Rows of an embedding table straight from a checkpoint, without the model around it.

Shape legend: n rows, D width.
"""

from torch import Tensor

from sharding.checkpoint_tensors import CheckpointTensors


class CheckpointTable:
    """One table of a checkpoint, sharded or replicated when it was saved."""

    def __init__(self, url: str, table: str) -> None:
        """Read the checkpoint's manifest and metadata; `table` is a name such as `item`.

        Raises:
            ValueError: there is no whole checkpoint in `url`, or it has no such table.
        """
        self._tensors = CheckpointTensors(url)
        self.url = url
        self.manifest = self._tensors.manifest
        """Its fingerprint is the checkpoint's hash."""
        keys = (f"tables/{table}.weight", f"dense/tables.{table}.weight/weight")
        found = [key for key in keys if key in self._tensors.saved]
        if not found:
            raise ValueError(
                f"checkpoint {url} has no embedding table {table!r}: name one whose model has it"
            )
        self._key = found[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (the highest id + 1) and D."""
        rows, width = self._tensors.shape(self._key)
        return rows, width

    def verify(self) -> None:
        """Hash every file of the checkpoint. Raises ValueError where one is damaged."""
        self._tensors.verify()

    def rows(self, first: int, count: int) -> Tensor:
        """Rows first … first + count - 1: [n, D]. Reads the chunks that hold them."""
        return self._tensors.rows(self._key, first, count)
