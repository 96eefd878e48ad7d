"""The catalogue as a trie of semantic ids, in flat tensors.

A state of level l is a prefix of l codes that some item has; level 0 has the root alone, level L
one leaf an id. Items are sorted by their codes, and the states of a level are numbered in that
order. So the children of a state are consecutive states of the next level, a level needs no more
than where each state's children begin (CSR) and the code that leads to each of them, and the items
below any state are consecutive *slots* of the sorted catalogue. Memory is linear in the catalogue.

Shape legend: V items, L code levels, K_l codes of level l (counted from 0), S_l states of level l
(S_0 = 1, S_L ids), M_l most children of a state of level l, N rows, A allow-lists; ``...`` any
shape. Items are numbered 1 … V; an index into a [V] tensor is the item id less one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from models.generation.restrictions import AllowList
from models.ops.hashing import mix64


@dataclass(frozen=True)
class CatalogueTrie:
    """Tensors only, built by `build`; nothing is copied or searched while beams walk."""

    codebook_sizes: tuple[int, ...]
    """K_0 … K_{L-1}."""
    max_branch: tuple[int, ...]
    """M_0 … M_{L-1}; what makes every step's shape static."""
    max_collisions: int
    """Most items that share one id."""
    indptr: tuple[Tensor, ...]
    """Level l: [S_l + 1]; state s has the children indptr[s] … indptr[s + 1] - 1 of level l + 1.
    int32 (like every index here) below 2^31 items, else int64."""
    tokens: tuple[Tensor, ...]
    """Level l: [S_{l+1}] int32, the code that leads to each state of level l + 1; ascending among
    the children of a state."""
    leaf_indptr: Tensor
    """[S_L + 1]; leaf s holds the slots leaf_indptr[s] … leaf_indptr[s + 1] - 1."""
    items: Tensor
    """[V] item id of each slot; within a leaf in the order in which collisions are resolved."""
    slots: Tensor
    """[V] slot of item v + 1."""
    fingerprint: int
    """Of all codes and of the order of items that share an id: what its allow-lists carry."""

    @classmethod
    def build(
        cls, codes: Tensor, codebook_sizes: Sequence[int], priority: Tensor | None = None
    ) -> "CatalogueTrie":
        """Sort a catalogue into a trie: 10^7 items in seconds, without a loop over them.

        Args:
            codes: [V, L] integers; row v is the semantic id of item v + 1. Items may share an id.
            codebook_sizes: K_0 … K_{L-1}.
            priority: [V]; of items that share an id the one of higher priority comes first
                (such as train counts). Equal ones, and all without it, by ascending item id.

        Raises:
            ValueError: no items, a wrong number of levels, or a code outside its codebook.
        """
        sizes = tuple(int(size) for size in codebook_sizes)
        _check_codes(codes, sizes)
        order = _lexicographic_order(codes, sizes, priority)
        index = torch.int32 if codes.shape[0] < 2**31 - 1 else torch.int64
        starts, tokens = _states(codes.index_select(0, order), index)
        indptr = tuple(
            torch.searchsorted(below[:-1], above, out_int32=index == torch.int32)
            for above, below in pairwise(starts)
        )
        slots = torch.empty_like(order)
        slots[order] = torch.arange(order.numel(), device=order.device)
        items = (order + 1).to(index)
        return cls(
            codebook_sizes=sizes,
            max_branch=tuple(int(level.diff().max()) for level in indptr),
            max_collisions=int(starts[-1].diff().max()),
            indptr=indptr,
            tokens=tokens,
            leaf_indptr=starts[-1],
            items=items,
            slots=slots.to(index),
            fingerprint=_fingerprint(codes, items),
        )

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.codebook_sizes)

    @property
    def num_items(self) -> int:
        """V."""
        return self.items.numel()

    @property
    def device(self) -> torch.device:
        return self.items.device

    def num_states(self, level: int) -> int:
        """S_level, 0 <= level <= L; S_L is the number of distinct ids."""
        return 1 if level == 0 else self.tokens[level - 1].numel()

    def to(self, device: torch.device | str) -> "CatalogueTrie":
        """The same trie on another device."""
        return CatalogueTrie(
            codebook_sizes=self.codebook_sizes,
            max_branch=self.max_branch,
            max_collisions=self.max_collisions,
            indptr=tuple(level.to(device) for level in self.indptr),
            tokens=tuple(level.to(device) for level in self.tokens),
            leaf_indptr=self.leaf_indptr.to(device),
            items=self.items.to(device),
            slots=self.slots.to(device),
            fingerprint=self.fingerprint,
        )

    def children(self, level: int, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The codes that may follow each prefix, and where they lead.

        Args:
            level: 0 … L-1.
            states: [...] int64 states of `level`; -1 (no prefix) has no children.

        Returns:
            Codes int64, states of level + 1 int64, and whether the child exists: [..., M_level]
            each. Codes ascend; where no child is, code and state are meaningless but may be used
            as indices.
        """
        first, count = self._ranges(self.indptr[level], states)
        offset = torch.arange(self.max_branch[level], device=states.device)
        legal = offset < count[..., None]
        following = (first[..., None] + offset).clamp(max=self.num_states(level + 1) - 1)
        return self.tokens[level][following].long(), following, legal

    def walk(self, codes: Tensor) -> Tensor:
        """States of level l that the prefixes `codes` [N, l] lead to: [N] int64.

        Costs a host synchronisation; see `probe` for none.

        Raises:
            ValueError: a prefix that no item has, naming the first such row.
        """
        states, legal = self.probe(codes)
        if not bool(legal.all()):
            row = int((~legal).nonzero()[0])
            raise ValueError(
                f"no item of the catalogue has a semantic id that begins with "
                f"{tuple(codes[row].tolist())} (row {row}): the codes are of another catalogue or "
                "tokenizer than the trie"
            )
        return states

    def probe(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """As `walk`, but tells instead of raising: states [N] (-1: none), legality [N] bool."""
        assert codes.dim() == 2 and codes.shape[1] <= self.num_levels, "codes are [N, l], l <= L"
        states = torch.zeros(codes.shape[0], dtype=torch.int64, device=codes.device)
        for level in range(codes.shape[1]):
            states = self.child(level, states, codes[:, level])
        return states, states >= 0

    def child(self, level: int, states: Tensor, tokens: Tensor) -> Tensor:
        """State of level + 1 that code `tokens` [...] leads to from `states` [...]; -1 if none."""
        first, count = self._ranges(self.indptr[level], states)
        end, last = first + count, self.num_states(level + 1) - 1
        low, high = first, end
        for _ in range(self.max_branch[level].bit_length()):  # halves a range of M_l until empty
            middle = (low + high) // 2
            below = (low < high) & (self.tokens[level][middle.clamp(max=last)] < tokens)
            low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
        found = (low < end) & (self.tokens[level][low.clamp(max=last)] == tokens)
        return torch.where(found, low, -1)

    def ids_below(self, level: int, states: Tensor) -> Tensor:
        """Distinct ids that begin with each of the prefixes `states` [...] of `level`: int64 [...].

        0 for the state -1.
        """
        first, last = states.clamp(min=0), states + 1
        for indptr in self.indptr[level:]:
            first, last = indptr[first].long(), indptr[last].long()
        return last - first

    def slot_range(self, level: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """First and behind-last slot of the items below `states` [...] of `level`: int64 [...].

        Empty (0, 0) for the state -1.
        """
        first, last = states.clamp(min=0), states + 1
        for indptr in (*self.indptr[level:], self.leaf_indptr):
            first, last = indptr[first].long(), indptr[last].long()
        return torch.where(states >= 0, first, 0), torch.where(states >= 0, last, 0)

    def states_of_slots(self, slots: Tensor) -> list[Tensor]:
        """States of level 1 … L whose items the `slots` [...] are among: L tensors [...] int64."""
        states, found = slots.to(self.leaf_indptr.dtype), []
        for indptr in (self.leaf_indptr, *reversed(self.indptr[1:])):
            states = (torch.searchsorted(indptr, states, right=True) - 1).to(indptr.dtype)
            found.append(states.long())
        return found[::-1]

    def allow(self, items: Tensor) -> AllowList:
        """Allow-list of the items that are marked: bool [V], or [A, V] for a batch of lists.

        A list costs a byte a state and an index an item, and is made in one pass, so that
        categories are made once and fresh ones swapped in between requests.
        """
        items = items if items.dim() == 2 else items[None]
        assert items.dtype == torch.bool and items.shape[1] == self.num_items, "bool [A, V]"
        allowed = items.index_select(1, self.items.long() - 1)
        ranks = torch.zeros(
            items.shape[0], self.num_items + 1, dtype=self.items.dtype, device=items.device
        )
        torch.cumsum(allowed, dim=1, dtype=ranks.dtype, out=ranks[:, 1:])
        levels, bounds = [], self.leaf_indptr
        for level in range(self.num_levels, 0, -1):
            at = ranks.index_select(1, bounds)
            levels.append(at[:, 1:] > at[:, :-1])
            bounds = bounds.index_select(0, self.indptr[level - 1])  # slots of the level above
        return AllowList(tuple(reversed(levels)), ranks, self.fingerprint)

    def _ranges(self, indptr: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        first = indptr[states.clamp(min=0)].long()
        return first, indptr[states + 1].long() - first  # -1: indptr[0] - indptr[0] = 0


def _check_codes(codes: Tensor, sizes: tuple[int, ...]) -> None:
    if codes.dim() != 2 or codes.shape[0] == 0 or codes.is_floating_point():
        raise ValueError(f"codes must be integers [items, levels], got {tuple(codes.shape)}")
    if codes.shape[1] != len(sizes) or not sizes or min(sizes) < 1:
        raise ValueError(
            f"codes have {codes.shape[1]} levels, codebook sizes are {sizes}: one positive size "
            "is needed for each level"
        )
    for level, size in enumerate(sizes):
        wrong = (codes[:, level] < 0) | (codes[:, level] >= size)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"item {row + 1} has code {int(codes[row, level])} on level {level}, outside its "
                f"codebook of {size}: the table and the codebook sizes are of different tokenizers"
            )


def _fingerprint(codes: Tensor, items: Tensor) -> int:
    """Sum of a hash of each item's codes, number and slot."""
    keys = mix64(torch.arange(items.numel(), device=items.device) ^ mix64(items.long()))
    for level in codes.unbind(1):
        keys = mix64(keys + mix64(level[items.long() - 1].long() + 1))
    return int(keys.sum())


def _lexicographic_order(codes: Tensor, sizes: tuple[int, ...], priority: Tensor | None) -> Tensor:
    """Rows of `codes` by codes, then by falling priority, then by row: [V] int64."""
    if priority is None:
        order = torch.arange(codes.shape[0], device=codes.device)
    else:
        if priority.shape != codes.shape[:1]:
            raise ValueError(
                f"priority must be one number an item, got {tuple(priority.shape)} for "
                f"{codes.shape[0]} items"
            )
        order = priority.argsort(descending=True, stable=True)
    for group in reversed(_packs(sizes)):  # as few stable sorts as 63-bit keys allow: mostly one
        key = torch.zeros(codes.shape[0], dtype=torch.int64, device=codes.device)
        for level in group:
            key.mul_(sizes[level]).add_(codes[:, level])
        order = order[key[order].argsort(stable=True)]
    return order


def _packs(sizes: tuple[int, ...]) -> list[list[int]]:
    """Levels in runs whose codes fit one int64 together."""
    packs: list[list[int]] = [[]]
    for level, size in enumerate(sizes):
        if math.prod(sizes[each] for each in packs[-1]) * size >= 2**63:
            packs.append([])
        packs[-1].append(level)
    return packs


def _states(codes: Tensor, index: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """First slot of each state of levels 0 … L, with V appended, and the code that leads to it."""
    count = codes.shape[0]
    end = torch.tensor([count], dtype=index, device=codes.device)
    new = torch.zeros(count, dtype=torch.bool, device=codes.device)
    new[0] = True
    starts, tokens = [torch.cat([torch.zeros_like(end), end])], []
    for level in range(codes.shape[1]):
        new[1:] |= codes[1:, level] != codes[:-1, level]
        first = new.nonzero().squeeze(1)
        tokens.append(codes[first, level].to(torch.int32))
        starts.append(torch.cat([first.to(index), end]))
    return starts, tuple(tokens)
