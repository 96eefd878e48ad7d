"""The catalogue as generation and loss read it: semantic ids and their trie, on one device.

Shape legend: V items, L levels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_loaders.semantic_ids import SemanticIds
from models.generation.catalogue_trie import CatalogueTrie


@dataclass(frozen=True)
class CodeCatalogue:
    """What costs a sort of all items to make, so that a stage makes it once."""

    codes: Tensor
    """[V+1, L] integers, by item id."""
    trie: CatalogueTrie

    @staticmethod
    def build(ids: SemanticIds, counts: Tensor, device: torch.device) -> "CodeCatalogue":
        """`counts` [V] train occurrences: of items that share an id the popular one comes first."""
        trie = CatalogueTrie.build(ids.codes[1:], ids.codebook_sizes, priority=counts)
        return CodeCatalogue(ids.codes.to(device), trie.to(device))
