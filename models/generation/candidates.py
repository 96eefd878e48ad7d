"""log π of given items by a model that writes semantic ids: many candidates, one prefilled context.

The candidates of a request are scored as its beams are searched, over the same cache, so that
rollouts and losses compute the same numbers. Unlike search this is differentiable.

Shape legend: N requests, G candidates of a request, L code levels, K_l codes of level l, M_l most
children of a state of level l.
"""

from typing import Any

import torch
from torch import Tensor

from models.base import CodeDecoder
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.log_probs import child_log_probs


def candidate_log_probs(
    model: CodeDecoder, context: Any, codes: Tensor, trie: CatalogueTrie
) -> Tensor:
    """Log π of each code of each candidate given those before it: float32 [N, G, L].

    Sums over levels are log π of the candidates' ids. A candidate that the trie lacks has -inf from
    the first code that leaves it.

    Args:
        model: writes codes; of sessions, their first item.
        context: of the N requests, from the model's own `encode`.
        codes: [N, G, L] int64 semantic ids.
        trie: the catalogue.
    """
    assert codes.shape[2] == trie.num_levels, "one code a level"
    cache, tokens = model.new_cache(context), None
    own = torch.arange(codes.shape[1], device=codes.device).expand(codes.shape[:2])
    states = codes.new_zeros(codes.shape[0], 1)  # one beam a request at the root
    taken = []
    for level in range(trie.num_levels):
        logits = model.step(context, cache, level, tokens)
        following = trie.child(level, states.expand(codes.shape[:2]), codes[..., level])
        taken.append(_taken(logits, level, states, following, trie))
        if level + 1 < trie.num_levels:
            cache.select(torch.zeros_like(own) if level == 0 else own)
            states, tokens = following, codes[..., level]
    return torch.stack(taken, dim=2)


def _taken(
    logits: Tensor, level: int, states: Tensor, following: Tensor, trie: CatalogueTrie
) -> Tensor:
    """Log-probability [N, G] of going from `states` [N, W] (W = 1 or G) to `following` [N, G].

    `logits` are [N, W, K_l].
    """
    tokens, children, legal = trie.children(level, states)
    log_probs = child_log_probs(logits, tokens, legal)
    # Children are consecutive, so the chosen one's place is its distance from the first.
    place = (following - children[..., 0]).clamp(min=0)
    if states.shape[1] == following.shape[1]:
        picked = log_probs.gather(2, place[..., None]).squeeze(2)
    else:
        picked = log_probs.squeeze(1).gather(1, place)
    return picked.masked_fill(following < 0, -torch.inf)
