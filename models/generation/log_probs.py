"""The one definition of log π(item id): renormalised over what the catalogue allows.

At each level the model's logits are normalised over the legal children of the prefix alone, so the
probabilities of all ids that the catalogue (under its restrictions) has sum to one. Search,
evaluation, rollouts and losses all share `child_log_probs` and `renormalised`, each over the states
that it walks anyway; `sequence_log_probs` is the plain form for ids at hand, which tests hold them
to. Sums over levels are log π of an id.

Shape legend: N sequences, L code levels, K_l codes of level l, M_l most children of a state;
``...`` any shape.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.generation.catalogue_trie import CatalogueTrie
from models.generation.restrictions import AllowList, restrict


def child_log_probs(logits: Tensor, tokens: Tensor, legal: Tensor) -> Tensor:
    """Log-softmax over legal children: float32 [..., M], -inf where `legal` is false.

    Only the children are touched: there is no softmax over the codebook. Gradients are finite
    everywhere, also where no child is legal (there they are zero).

    Args:
        logits: [..., K] of any floating type.
        tokens: [..., M] int64 codes of the children, as `CatalogueTrie.children` gives them.
        legal: [..., M] bool.
    """
    return renormalised(logits.gather(-1, tokens).float(), legal)


def renormalised(scores: Tensor, legal: Tensor) -> Tensor:
    """Log-softmax of float32 `scores` [..., M] over those that are `legal`, -inf elsewhere."""
    # The lowest float, not -inf: its exponential is just as zero, but rows without a legal child
    # and the derivative of illegal ones stay numbers.
    masked = scores.masked_fill(~legal, torch.finfo(torch.float32).min)
    return masked.log_softmax(-1).masked_fill(~legal, -torch.inf)


def sequence_log_probs(
    logits: Sequence[Tensor],
    codes: Tensor,
    trie: CatalogueTrie,
    allow: AllowList | None = None,
    *,
    exclude: Tensor | None = None,
    known: bool = False,
) -> Tensor:
    """Teacher-forced log π of each code given those before it: float32 [N, L].

    Args:
        logits: L tensors [N, K_l].
        codes: [N, L] int64 semantic ids.
        trie: the catalogue.
        allow: restricts what is legal, as in `generate`; an id that is not allowed has -inf.
        exclude: [N, E] item ids, as in `generate`.
        known: the caller vouches that the trie has all ids (they are its own leaves, or were
            checked before). Skips the check and its host synchronisation; an id that the trie
            lacks then has -inf from the first code that leaves it.

    Raises:
        ValueError: an id that the trie does not have.
    """
    assert len(logits) == codes.shape[1] == trie.num_levels, "one tensor of logits a level"
    if not known:
        trie.walk(codes)
    restriction = restrict(trie, codes.shape[0], allow, exclude)
    states = torch.zeros(codes.shape[0], dtype=torch.int64, device=codes.device)
    taken = []
    for level, level_logits in enumerate(logits):
        tokens, following, legal = trie.children(level, states)
        if restriction is not None:
            legal = legal & restriction.permits(level + 1, following)
        log_probs = child_log_probs(level_logits, tokens, legal)
        chosen = trie.child(level, states, codes[:, level])
        # Children are consecutive, so the chosen one's place is its distance from the first.
        place = (chosen - following[:, 0]).clamp(min=0)
        picked = log_probs.gather(1, place[:, None]).squeeze(1)
        taken.append(picked.masked_fill(chosen < 0, -torch.inf))
        states = chosen
    return torch.stack(taken, dim=1)
