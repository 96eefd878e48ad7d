"""Generation of whole sessions: several items a request, each a walk through the catalogue's trie.

Shape legend: N requests, W sessions a request, S items of a session, L code levels.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from configs.generation import BeamConfig
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.restrictions import AllowList, restrict
from models.generation.search import Generated, StepDecoder, refuse_unsound, repeated
from models.generation.strategies import TrieLevel, advance, first_beams


@dataclass(frozen=True)
class Sessions:
    """At most W sessions a request, by falling log-probability."""

    codes: Tensor
    """[N, W, S, L] int64; zeros where not valid."""
    states: Tensor
    """[N, W, S] int64, the leaf of each item; -1 where not valid."""
    log_probs: Tensor
    """[N, W] float32, the sum over items of log π(id | the items before); -inf where not valid."""


@torch.no_grad()
def generate_sessions(
    decoder: StepDecoder,
    context: Any,
    num_requests: int,
    trie: CatalogueTrie,
    config: BeamConfig,
    *,
    allow: AllowList | None = None,
    exclude: Tensor | None = None,
) -> Sessions:
    """Beam search over whole sessions; behind an item's last code each beam is at the root again.

    Sessions may repeat an item. Shapes are static and nothing waits for the device.

    Args:
        decoder: writes S·L codes; S follows from the trie's L.
        context: of the N requests, from the decoder's own `encode`.
        num_requests: N.
        trie: the catalogue.
        config: beams, W.
        allow: items that may be generated.
        exclude: [N, E] int64 items each request must not get, as in `search.generate`.

    Raises:
        ValueError: the decoder's codebooks are not those of the trie, S times over, or its logits
            are not finite.
    """
    sizes, levels = tuple(decoder.codebook_sizes), trie.num_levels
    items = len(sizes) // levels
    if sizes != trie.codebook_sizes * items:
        raise ValueError(
            f"the model writes codes of {sizes}, the catalogue's ids are of "
            f"{trie.codebook_sizes}: model and semantic ids are of different tokenizers"
        )
    restriction = restrict(trie, num_requests, allow, exclude)
    root = torch.zeros(num_requests, 1, dtype=torch.int64, device=trie.device)
    beams, cache, tokens = first_beams(config, None, root), decoder.new_cache(context), None
    codes, leaves = root.new_zeros(num_requests, 1, 0), root.new_zeros(num_requests, 1, 0)
    for place in range(items * levels):
        level = place % levels
        logits = decoder.step(context, cache, place, tokens)
        refuse_unsound(logits, place)
        beams = advance(config, beams, logits, TrieLevel(trie, level, restriction))
        tokens, parents = beams.tokens, beams.parents[..., None]
        codes = torch.cat([_along(codes, parents), tokens[..., None]], dim=2)
        leaves = _along(leaves, parents)
        if level + 1 == levels:
            leaves = torch.cat([leaves, beams.states[..., None]], dim=2)
            beams = replace(beams, states=torch.where(beams.states >= 0, 0, -1))
        if place + 1 < items * levels:
            cache.select(beams.parents)
    valid = beams.states >= 0
    return Sessions(
        codes=codes.unflatten(2, (items, levels)) * valid[..., None, None],
        states=leaves.masked_fill(~valid[..., None], -1),
        log_probs=beams.log_probs,
    )


def distinct_ids(sessions: Sessions) -> Generated:
    """The ids of the best session in its order, then those that the next one adds, and so on.

    [N, W·S], each id once, with the log-probability of the first session that has it.
    """
    states = sessions.states.flatten(1)
    fresh = (states >= 0) & ~repeated(states)
    order = fresh.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    valid = fresh.gather(1, order)
    log_probs = sessions.log_probs.repeat_interleave(sessions.states.shape[2], dim=1)
    log_probs = log_probs.gather(1, order).masked_fill(~valid, -torch.inf)
    codes = sessions.codes.flatten(1, 2)
    codes = codes.gather(1, order[..., None].expand(-1, -1, codes.shape[2]))
    return Generated(
        codes=codes * valid[..., None],
        states=states.gather(1, order).masked_fill(~valid, -1),
        log_probs=log_probs,
        sampling_log_probs=log_probs,
        scores=log_probs,
        valid=valid,
    )


def _along(values: Tensor, parents: Tensor) -> Tensor:
    """Values [N, W, n] of each beam's parent; parents [N, W', 1] → [N, W', n]."""
    return values.gather(1, parents.expand(-1, -1, values.shape[2]))
