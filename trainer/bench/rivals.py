"""How others constrain a beam search: what `tandem bench beam` compares with.

Both make a mask over the whole codebook for every beam; what follows (renormalise over legal codes,
add the beam's score, take the best of all) is the same vectorised code, so only what differs is
compared. Neither is used outside the bench.

Shape legend: N requests, W beams, l levels so far, L levels, K codes of a level, V items, P picked.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models.generation.log_probs import renormalised

Mask = Callable[[Tensor, int], Tensor]
"""Prefixes [N, W, l] int64 and K → legal codes [N, W, K] bool."""


def masked_step(
    mask: Mask, prefixes: Tensor, logits: Tensor, scores: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Best scores [N, P] of all continuations, and all scores [N, W · K] (-inf where illegal)."""
    log_probs = renormalised(logits, mask(prefixes, logits.shape[2]))
    totals = (scores[..., None] + log_probs).flatten(1)
    return totals.topk(count, dim=1).values, totals


def no_mask(prefixes: Tensor, size: int) -> Tensor:
    """Everything is legal: what the step costs without a constraint."""
    return torch.ones(()).bool().expand(*prefixes.shape[:2], size)


class DictTrie:
    """Nested Python dicts; every beam walks down from the root and fills its own mask."""

    def __init__(self, codes: Tensor) -> None:
        """`codes` [V, L]; a leaf lists the items that share its id."""
        self._root: dict = {}
        for item, row in enumerate(codes.tolist(), 1):
            node = self._root
            for code in row[:-1]:
                node = node.setdefault(code, {})
            node.setdefault(row[-1], []).append(item)

    def mask(self, prefixes: Tensor, size: int) -> Tensor:
        """Legal codes of every beam, written row by row as prefix functions of libraries do."""
        requests, width, _ = prefixes.shape
        mask = torch.zeros(requests * width, size, dtype=torch.bool)
        for row, prefix in enumerate(prefixes.flatten(0, 1).tolist()):
            node = self._root
            for code in prefix:
                node = node[code]
            mask[row, list(node)] = True
        return mask.view(requests, width, size)

    def mask_numpy(self, prefixes: Tensor, size: int) -> Tensor:
        """The same, filled through numpy, whose small writes cost less than torch's."""
        requests, width, _ = prefixes.shape
        mask = np.zeros((requests * width, size), dtype=bool)
        for row, prefix in enumerate(prefixes.flatten(0, 1).tolist()):
            node = self._root
            for code in prefix:
                node = node[code]
            mask[row, list(node)] = True
        return torch.from_numpy(mask).view(requests, width, size)

    def items(self, codes: Tensor, k: int) -> list[list[int]]:
        """First k items of each request's ids `codes` [N, W, L], in order."""
        found = []
        for beams in codes.tolist():
            items: list[int] = []
            for prefix in beams:
                node = self._root
                for code in prefix:
                    node = node[code]
                items.extend(node)
                if len(items) >= k:
                    break
            found.append(items[:k])
        return found


class PrefixComparison:
    """Every prefix against every row of the catalogue, vectorised over as many as memory takes."""

    _cells = 1 << 26  # booleans of one comparison, 64 MiB

    def __init__(self, codes: Tensor) -> None:
        """`codes` [V, L]; kept in 16 bits a code, by level, to read as little as possible."""
        self._columns = codes.T.to(torch.int16).contiguous()

    def mask(self, prefixes: Tensor, size: int) -> Tensor:
        """Legal codes of every beam."""
        requests, width, level = prefixes.shape
        rows = prefixes.flatten(0, 1).to(torch.int16)
        mask = torch.zeros(rows.shape[0], size, dtype=torch.bool)
        following, items = self._columns[level], self._columns.shape[1]
        chunk = max(1, self._cells // items)
        for first in range(0, rows.shape[0], chunk):
            part = rows[first : first + chunk]
            match = torch.ones(part.shape[0], items, dtype=torch.bool)
            for depth in range(level):
                match &= self._columns[depth] == part[:, depth, None]
            row, item = match.nonzero(as_tuple=True)
            mask[first + row, following[item].long()] = True
        return mask.view(requests, width, size)
