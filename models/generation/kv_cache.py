"""Keys and values of generated codes, shared by the beams that descend from them.

Beams are never reordered: each level's keys and values stay where they were written, and a beam
carries the index of its ancestor in every level. Selecting beams moves a few integers instead of
the cache.

Shape legend: N requests, W beams (W_l at level l, 1 at level 0), H key-value heads, d head width.
"""

import torch
from torch import Tensor

from models.ops.beam_attention import Written, along_paths


class BeamCache:
    """Written level by level: each decoder layer appends once, then the search selects."""

    def __init__(self, num_layers: int, num_requests: int, device: torch.device | str) -> None:
        """An empty cache at level 0, where each request has one beam.

        Args:
            num_layers: decoder layers that attend to earlier codes.
            num_requests: N.
            device: where keys will be.
        """
        self._written: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_layers)]
        self.ancestors = torch.zeros(num_requests, 1, 1, dtype=torch.int64, device=device)
        """[N, W, level + 1]: the beam of each level that this beam descends from; last, itself."""

    @property
    def level(self) -> int:
        """The level that is being written."""
        return self.ancestors.shape[2] - 1

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write this level's keys and values of all beams, [N, W, H, d] each."""
        assert len(self._written[layer]) == self.level, "a layer appends once a level"
        assert k.shape[:2] == self.ancestors.shape[:2], "one key a beam"
        self._written[layer].append((k, v))

    def written(self, layer: int) -> Written:
        """Keys and values of all levels, as they were appended."""
        levels = self._written[layer]
        assert len(levels) == self.level + 1, "append comes before reading"
        return levels

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values along each beam's own path: [N, W, level + 1, H, d] each."""
        return along_paths(self.written(layer), self.ancestors)

    def select(self, parents: Tensor) -> None:
        """Go to the next level with the beams whose parents are `parents` [N, W'] int64."""
        paths = self.ancestors.gather(1, parents[..., None].expand(-1, -1, self.level + 1))
        own = torch.arange(parents.shape[1], device=parents.device)
        own = own.expand(parents.shape)[..., None]
        self.ancestors = torch.cat([paths, own], dim=2)
