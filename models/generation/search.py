"""Generation of semantic ids that the catalogue has, one code level after the other.

A request's history is read once, by the model, into a context that all its beams share; its beams
are never copied (see `kv_cache`). Each beam is a state of the trie, and only children of that state
are ever candidates, so what comes out is legal by construction. Shapes are static and nothing
waits for the device. The CPU, which nothing waits for, is the exception: there the model is asked
only about beams that can still become several ids (see `_undecided`), and how many those are, of
which codes and scores do not depend, shapes its next step.

Shape legend: N requests, W ids a request, W_l beams of level l (W_0 = 1), L code levels, K_l codes
of level l, k items a request, E excluded items a request, U undecided beams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from configs.generation import BeamConfig, GenerationConfig
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.kv_cache import BeamCache
from models.generation.restrictions import AllowList, Restriction, restrict
from models.generation.strategies import Beams, TrieLevel, advance, first_beams, width_of

_WORTH_ASKING_LESS = 0.75
"""Share of beams from which on leaving out the others does not pay."""


class StepDecoder(Protocol):
    """What a model must do to be searched (`models.base.CodeDecoder` is one)."""

    @property
    def codebook_sizes(self) -> Sequence[int]:
        """K_0 … K_{L-1}."""

    def new_cache(self, context: Any) -> BeamCache:
        """Empty cache for the context's N requests."""

    def step(self, context: Any, cache: BeamCache, level: int, tokens: Tensor | None) -> Tensor:
        """Logits [N, W_level, K_level] of the next code of every beam.

        `tokens` [N, W_level] int64 are the codes chosen at level - 1 (0 where there is no beam);
        None at level 0, where W is 1. Appends to the cache, once a layer. W_level may be less than
        the beams searched: those that can go one way only are not asked about.
        """


@dataclass(frozen=True)
class Generated:
    """W ids a request: beams and Gumbel samples by falling score, ancestral ones as drawn."""

    codes: Tensor
    """[N, W, L] int64; zeros where not valid."""
    states: Tensor
    """[N, W] int64 leaves of the trie; -1 where not valid."""
    log_probs: Tensor
    """[N, W] float32, log π(id) of `models.generation.log_probs`; -inf where not valid."""
    sampling_log_probs: Tensor
    """[N, W] float32, log-probability under the distribution sampled from: log π changed by
    temperature and top_p (equal to `log_probs` for beams)."""
    scores: Tensor
    """[N, W] float32: log π of beams; perturbed log-probability of Gumbel samples, which is
    Gumbel(sampling_log_probs); sampling_log_probs of ancestral ones."""
    valid: Tensor
    """[N, W] bool; false behind the last legal id where there are fewer than W."""


@torch.no_grad()
def generate(
    decoder: StepDecoder,
    context: Any,
    num_requests: int,
    trie: CatalogueTrie,
    config: GenerationConfig,
    *,
    allow: AllowList | None = None,
    keys: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Generated:
    """Generate ids for N requests.

    Args:
        decoder: writes codes; in eval mode, unless dropout is wanted.
        context: of the N requests, from the decoder's own `encode`.
        num_requests: N.
        trie: the catalogue.
        config: strategy and its options.
        allow: items that may be generated; several lists are dealt out by `for_requests`.
        keys: [N] int64, needed to sample and refused by beam search: what is drawn for a request
            is a pure function of its key, whatever else is in the batch. Make them from (seed,
            step, sample id), for instance by `models.ops.dropout.token_keys`.
        exclude: [N, E] int64 items each request must not get, such as those its user has seen;
            0 fills up rows. A search then equals one in the catalogue without them.

    Raises:
        ValueError: trie, keys, allow-lists or exclusions do not fit; or a logit is NaN, as of
            weights that diverged (on CUDA an assert of the device says so).
    """
    _check(decoder, num_requests, trie, config, keys)
    restriction = restrict(trie, num_requests, allow, exclude)
    root = torch.zeros(num_requests, 1, dtype=torch.int64, device=trie.device)
    beams, cache = first_beams(config, keys, root), decoder.new_cache(context)
    codes = root.new_zeros(num_requests, 1, 0)
    tokens, undecided = None, None
    for level in range(trie.num_levels):
        logits = decoder.step(context, cache, level, tokens)
        refuse_unsound(logits, level)
        if undecided is not None:
            logits = undecided.spread(logits)
        assert logits.shape == (*beams.states.shape, trie.codebook_sizes[level])
        beams = advance(config, beams, logits, TrieLevel(trie, level, restriction))
        earlier = codes.gather(1, beams.parents[..., None].expand(-1, -1, level))
        codes = torch.cat([earlier, beams.tokens[..., None]], dim=2)
        if level + 1 < trie.num_levels:
            parents, tokens = beams.parents, beams.tokens
            if undecided is not None:
                parents = undecided.places.gather(1, parents)
            undecided = _undecided(trie, level + 1, beams.states)
            if undecided is not None:
                parents, tokens = (x.gather(1, undecided.beams) for x in (parents, tokens))
            cache.select(parents)
    return _padded(beams, codes, width_of(config))


def refuse_unsound(logits: Tensor, place: int) -> None:
    """Raise ValueError where a beam's logits, [..., V] of code `place`, have no finite largest one.

    No beam would survive that, and an empty answer would pass for a catalogue that allows none. On
    a device it is told without waiting for it.
    """
    sound = logits.amax(-1).isfinite().all()
    sentence = (
        f"the model's logits of code {place + 1} are not finite: its weights, or what it was "
        "given, are not; go back to an earlier checkpoint"
    )
    if logits.device.type == "cpu":
        if not sound:
            raise ValueError(sentence)
    else:
        torch._assert_async(sound, sentence)


def _padded(beams: Beams, codes: Tensor, width: int) -> Generated:
    """The last level's beams and their codes [N, W_L, L], filled up to `width`."""
    missing = width - beams.states.shape[1]  # a catalogue of fewer than W ids
    valid = pad(beams.states >= 0, (0, missing))
    return Generated(
        codes=pad(codes, (0, 0, 0, missing)) * valid[..., None],
        states=pad(beams.states, (0, missing), value=-1),
        log_probs=pad(beams.log_probs, (0, missing), value=-torch.inf),
        sampling_log_probs=pad(beams.sampling_log_probs, (0, missing), value=-torch.inf),
        scores=pad(beams.scores, (0, missing), value=-torch.inf),
        valid=valid,
    )


def items_of(
    generated: Generated,
    trie: CatalogueTrie,
    k: int,
    *,
    allow: AllowList | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """Items of generated ids, best first: [N, k] int64, 0 where there are no more.

    Items that share an id follow each other in the trie's stated order; an id drawn more than
    once counts once. Give the `allow` and `exclude` of the search: of the items of one id some may
    be permitted and others not.
    """
    num_requests = generated.states.shape[0]
    restriction = restrict(trie, num_requests, allow, exclude)
    states = generated.states.where(~repeated(generated.states), -1)
    slots, there = _leaf_slots(trie, states, restriction, k)
    flat, there = slots.flatten(1), there.flatten(1)
    # Items that are there move to the front, in order; the column k takes all others.
    place = (there.cumsum(1) - 1).where(there, k).clamp(max=k)
    items = torch.zeros(num_requests, k + 1, dtype=torch.int64, device=flat.device)
    items.scatter_(1, place, trie.items[flat].long())
    count = there.sum(1, keepdim=True)
    return items[:, :k].where(torch.arange(k, device=flat.device) < count, 0)


def item_of_each(
    generated: Generated,
    trie: CatalogueTrie,
    *,
    allow: AllowList | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """The first permitted item of every generated id: [N, W] int64, 0 where not valid."""
    restriction = restrict(trie, generated.states.shape[0], allow, exclude)
    slots, there = _leaf_slots(trie, generated.states, restriction, 1)
    first = there.to(torch.uint8).argmax(-1, keepdim=True)
    items = trie.items[slots.gather(-1, first)].long()
    return items.where(there.gather(-1, first), 0).squeeze(-1)


@dataclass(frozen=True)
class _Undecided:
    """The beams of one level that the model is asked about."""

    beams: Tensor
    """[N, U] int64; filled up with others in requests that have fewer."""
    places: Tensor
    """[N, W] int64, where each beam is among them; of one that is not, any."""

    def spread(self, logits: Tensor) -> Tensor:
        """[N, U, K] → [N, W, K]; beams that were not asked about get some other's logits."""
        request = torch.arange(logits.shape[0], device=logits.device)[:, None]
        return logits[request, self.places]


def _undecided(trie: CatalogueTrie, level: int, states: Tensor) -> _Undecided | None:
    """Beams [N, W] of `level` with more than one id below them; None: ask about all.

    If only one id begins with a prefix, what follows has log-probability 0 whatever the logits are,
    here and on all later levels. How many beams are left shapes the next step, which another device
    would have to be waited for; so only the CPU profits.
    """
    if states.device.type != "cpu" or states.numel() == 0:
        return None
    is_open = trie.ids_below(level, states) > 1
    count = max(1, int(is_open.sum(1).max()))
    if count > _WORTH_ASKING_LESS * states.shape[1]:
        return None
    beams = is_open.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    return _Undecided(beams, (is_open.cumsum(1) - 1).clamp(min=0))


def _check(
    decoder: StepDecoder,
    num_requests: int,
    trie: CatalogueTrie,
    config: GenerationConfig,
    keys: Tensor | None,
) -> None:
    if tuple(decoder.codebook_sizes) != trie.codebook_sizes:
        raise ValueError(
            f"the model writes codes of {tuple(decoder.codebook_sizes)}, the catalogue's ids are "
            f"of {trie.codebook_sizes}: model and semantic ids are of different tokenizers"
        )
    if isinstance(config, BeamConfig):
        if keys is not None:
            raise ValueError("kind='beam' draws nothing and takes no keys: leave them out")
    elif keys is None or keys.shape != (num_requests,) or keys.dtype != torch.int64:
        raise ValueError(
            f"kind={config.kind!r} needs keys, one int64 for each of the {num_requests} requests"
        )


def _leaf_slots(
    trie: CatalogueTrie, states: Tensor, restriction: Restriction | None, k: int
) -> tuple[Tensor, Tensor]:
    """Slots of each leaf's items, and which are there and permitted: [N, W, C] both.

    C is no larger than it must be for the first k of every leaf to be among them.
    """
    depth = trie.max_collisions
    if restriction is None:
        depth = min(depth, k)
    elif restriction.allow is None and restriction.excluded_slots is not None:
        depth = min(depth, k + restriction.excluded_slots.shape[1])
    first, last = trie.slot_range(trie.num_levels, states)
    slots = first[..., None] + torch.arange(depth, device=states.device)
    there = slots < last[..., None]
    slots = slots.clamp(max=trie.num_items - 1)
    if restriction is not None:
        there = there & restriction.permits_slots(slots)
    return slots, there


def repeated(states: Tensor) -> Tensor:
    """Whether an earlier entry of the row is the same: bool [N, W]."""
    ordered, order = states.sort(dim=1, stable=True)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(again).scatter(1, order, again)
