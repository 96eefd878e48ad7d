"""What a request may not be offered: items off its allow-list, items that its user has seen.

Both are exact at every level: a restricted search equals a search in a trie rebuilt from the items
that remain, log-probabilities included, because a state is legal only while an item below it is
left. An allow-list is made once per list, in memory linear in the catalogue. Excluded items cost
memory linear in their own number, never in the catalogue: items below a state are consecutive
slots, so of E sorted excluded slots two binary searches count those below a state, and the states
that lost all their items (at most E a level) are listed before the search begins.

Shape legend: N requests, E excluded items a request, A allow-lists, V items, L code levels, S_l
states of level l; ``...`` any shape.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from models.generation.catalogue_trie import CatalogueTrie

NO_STATE = 2**62
"""Behind every state and slot: fills the sorted rows of those that there are."""


@dataclass(frozen=True)
class AllowList:
    """One or several allow-lists of one trie (`CatalogueTrie.allow`)."""

    states: tuple[Tensor, ...]
    """Levels 1 … L: [A, S_l] bool, whether an allowed item is below."""
    ranks: Tensor
    """[A, V + 1], allowed items in the slots before this one."""
    trie: int
    """Fingerprint of the trie that made it."""
    index: Tensor | None = None
    """[N] int64, the list of each request; None: all requests use the only one."""

    @staticmethod
    def stack(lists: Sequence["AllowList"]) -> "AllowList":
        """Several lists as one batch, in this order; none may be dealt to requests yet."""
        assert all(each.index is None and each.trie == lists[0].trie for each in lists)
        levels = zip(*(each.states for each in lists), strict=True)
        ranks = torch.cat([each.ranks for each in lists])
        return AllowList(tuple(torch.cat(level) for level in levels), ranks, lists[0].trie)

    def for_requests(self, index: Tensor) -> "AllowList":
        """The same lists, where request n uses list `index`[n] ([N] int64).

        Raises:
            ValueError: indices that are no int64, or on the CPU, where looking costs no waiting,
                that name no list.
        """
        count = self.ranks.shape[0]
        if index.dtype != torch.int64 or index.dim() != 1:
            raise ValueError(
                f"requests get their allow-lists by int64 indices [N], not by {index.dtype} "
                f"{tuple(index.shape)}"
            )
        if index.device.type == "cpu" and bool(((index < 0) | (index >= count)).any()):
            row = int(((index < 0) | (index >= count)).nonzero()[0])
            raise ValueError(
                f"request {row} is dealt allow-list {int(index[row])}, and there are {count} "
                "(0 is the first)"
            )
        return replace(self, index=index)

    def to(self, device: torch.device | str) -> "AllowList":
        """The same lists on another device."""
        index = None if self.index is None else self.index.to(device)
        states = tuple(x.to(device) for x in self.states)
        return AllowList(states, self.ranks.to(device), self.trie, index)


@dataclass(frozen=True)
class Restriction:
    """The allow-lists and exclusions of N requests, ready for a search."""

    allow: AllowList | None
    lists: Tensor | None
    """[N] int64, rows of the allow-lists; None without them."""
    excluded_slots: Tensor | None
    """[N, E] int64 ascending, NO_STATE behind them; None without exclusions."""
    dead: tuple[Tensor, ...]
    """Levels 1 … L: [N, E] int64 ascending, each state once whose every allowed item is excluded,
    NO_STATE behind them; empty without exclusions."""

    def permits(self, level: int, states: Tensor) -> Tensor:
        """Whether an item is left below `states` [N, ...] of `level` (1 … L): bool [N, ...].

        The states must exist; level 0 needs no question, since a root with nothing below has no
        legal child.
        """
        flat = states.reshape(states.shape[0], math.prod(states.shape[1:]))
        permitted = torch.ones_like(flat, dtype=torch.bool)
        if self.allow is not None and self.lists is not None:
            permitted &= self.allow.states[level - 1][self.lists[:, None], flat]
        if self.dead:
            permitted &= ~_contains(self.dead[level - 1], flat)
        return permitted.view(states.shape)

    def permits_slots(self, slots: Tensor) -> Tensor:
        """Whether the item in each of `slots` [N, ...] (0 … V-1) is left: bool [N, ...]."""
        flat = slots.reshape(slots.shape[0], math.prod(slots.shape[1:]))
        permitted = torch.ones_like(flat, dtype=torch.bool)
        if self.allow is not None and self.lists is not None:
            rows, ranks = self.lists[:, None], self.allow.ranks
            permitted &= ranks[rows, flat + 1] > ranks[rows, flat]
        if self.excluded_slots is not None:
            permitted &= ~_contains(self.excluded_slots, flat)
        return permitted.view(slots.shape)


def restrict(
    trie: "CatalogueTrie", num_requests: int, allow: AllowList | None, exclude: Tensor | None
) -> Restriction | None:
    """Prepare the restrictions of N requests; None where there are none.

    Args:
        trie: made the allow-lists.
        num_requests: N.
        allow: one list for all, or dealt out by `for_requests`.
        exclude: [N, E] int64 item ids in any order, repeated at will; 0, and ids that the
            catalogue does not have, exclude nothing.

    Raises:
        ValueError: lists or exclusions do not fit the trie or the number of requests.
    """
    lists = None if allow is None else _lists(trie, num_requests, allow)
    if exclude is None:
        return None if allow is None else Restriction(allow, lists, None, ())
    if exclude.dim() != 2 or exclude.shape[0] != num_requests:
        raise ValueError(
            f"exclude must be item ids [{num_requests}, E], a row a request, "
            f"got {tuple(exclude.shape)}"
        )
    if exclude.shape[1] == 0:
        return None if allow is None else Restriction(allow, lists, None, ())
    ranks = None if allow is None else allow.ranks
    slots = _distinct_slots(trie, exclude, ranks, lists)
    return Restriction(allow, lists, slots, _dead_states(trie, slots, ranks, lists))


def _lists(trie: "CatalogueTrie", num_requests: int, allow: AllowList) -> Tensor:
    if allow.trie != trie.fingerprint:
        raise ValueError("the allow-list was made by another trie: make it anew by trie.allow()")
    if allow.index is None:
        if allow.ranks.shape[0] != 1:
            raise ValueError(
                f"{allow.ranks.shape[0]} allow-lists were given without saying whose they are: "
                "deal them out by allow.for_requests(index)"
            )
        return torch.zeros(num_requests, dtype=torch.int64, device=trie.device)
    if allow.index.shape != (num_requests,):
        raise ValueError(
            f"allow.for_requests() was given {allow.index.numel()} indices for {num_requests} "
            "requests"
        )
    return allow.index


def _distinct_slots(
    trie: "CatalogueTrie", exclude: Tensor, ranks: Tensor | None, lists: Tensor | None
) -> Tensor:
    """Slots of excluded items that were allowed, ascending and each once: [N, E]."""
    known = (exclude > 0) & (exclude <= trie.num_items)
    slots = trie.slots[torch.where(known, exclude - 1, 0)].long()
    if ranks is not None and lists is not None:
        known &= ranks[lists[:, None], slots + 1] > ranks[lists[:, None], slots]
    return _distinct(torch.where(known, slots, NO_STATE).sort(dim=1).values)


def _dead_states(
    trie: "CatalogueTrie", slots: Tensor, ranks: Tensor | None, lists: Tensor | None
) -> tuple[Tensor, ...]:
    used = slots < NO_STATE
    candidates = trie.states_of_slots(torch.where(used, slots, 0))
    dead = []
    for level, states in enumerate(candidates, 1):
        first, last = trie.slot_range(level, states)
        excluded = torch.searchsorted(slots, last) - torch.searchsorted(slots, first)
        items = last - first
        if ranks is not None and lists is not None:
            items = (ranks[lists[:, None], last] - ranks[lists[:, None], first]).long()
        gone = torch.where(used & (excluded == items), states, NO_STATE)
        dead.append(_distinct(gone.sort(dim=1).values))
    return tuple(dead)


def _distinct(ascending: Tensor) -> Tensor:
    repeated = torch.zeros_like(ascending, dtype=torch.bool)
    repeated[:, 1:] = ascending[:, 1:] == ascending[:, :-1]
    return torch.where(repeated, NO_STATE, ascending).sort(dim=1).values


def _contains(ascending: Tensor, values: Tensor) -> Tensor:
    """Whether each of `values` [N, X] is in its row of `ascending` [N, E]: bool [N, X]."""
    values = values.contiguous()
    place = torch.searchsorted(ascending, values).clamp(max=ascending.shape[1] - 1)
    return ascending.gather(1, place) == values
