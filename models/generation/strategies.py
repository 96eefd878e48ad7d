"""How the beams of the next level are chosen: best, or sampled with or without replacement.

Shape legend: N requests, W beams, P beams of the next level, K codes, M most children of a state,
l level.
"""

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from configs.generation import AncestralConfig, BeamConfig, GenerationConfig, GumbelTopKConfig
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.log_probs import child_log_probs, renormalised
from models.generation.noise import (
    extend_streams,
    gumbels,
    request_streams,
    sample_streams,
    uniforms,
)
from models.generation.restrictions import Restriction
from models.ops import native


@dataclass(frozen=True)
class Beams:
    """Prefixes of one level, [N, W] each."""

    tokens: Tensor
    """int64, the last code; 0 where there is no beam."""
    parents: Tensor
    """int64, the beam of the level before that each continues."""
    states: Tensor
    """int64; -1 where there is no beam."""
    log_probs: Tensor
    """float32, log π of the prefix; -inf where there is no beam."""
    sampling_log_probs: Tensor
    """float32, log-probability of the prefix under what is sampled from (temperature, top_p)."""
    scores: Tensor
    """float32, what ranks beams."""
    streams: Tensor | None
    """int64, keyed randomness (see `noise`); None where nothing is drawn."""


@dataclass(frozen=True)
class TrieLevel:
    """Where in the trie a step is made, and under which restrictions."""

    trie: CatalogueTrie
    level: int
    restriction: Restriction | None

    def children(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`CatalogueTrie.children` that are permitted: codes, states, legality [N, W, M]."""
        tokens, following, legal = self.trie.children(self.level, states)
        if self.restriction is not None:
            legal = legal & self.restriction.permits(self.level + 1, following)
        return tokens, following, legal


def width_of(config: GenerationConfig) -> int:
    """Ids that a request asks for."""
    return config.beams if isinstance(config, BeamConfig) else config.samples


def first_beams(config: GenerationConfig, keys: Tensor | None, like: Tensor) -> Beams:
    """The empty prefix of each request, [N, 1]; `like` int64 [N, 1] zeros."""
    zero = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    scores, streams = zero, None
    if keys is not None:
        streams = request_streams(keys)
        if isinstance(config, GumbelTopKConfig):
            # The largest perturbed log-probability of all ids is itself Gumbel distributed.
            scores = gumbels(streams, torch.full_like(streams, -1))
        else:
            streams = sample_streams(keys, width_of(config))
    return Beams(like, like, like, zero, zero, scores, streams)


def advance(config: GenerationConfig, beams: Beams, logits: Tensor, at: TrieLevel) -> Beams:
    """Beams of the next level from the logits [N, W, K] of this one's."""
    match config:
        case BeamConfig():
            return _best(beams, logits, at, config.beams)
        case GumbelTopKConfig():
            return _without_replacement(beams, logits, at, config)
        case AncestralConfig():
            return _with_replacement(beams, logits, at, config)
        case _:
            assert_never(config)


def _best(beams: Beams, logits: Tensor, at: TrieLevel, width: int) -> Beams:
    """The most probable children of all beams."""
    branch = at.trie.max_branch[at.level]
    count = min(width, beams.states.shape[1] * branch)
    if at.trie.items.dtype == torch.int32 and native.runs_native(logits):
        return best_native(beams, logits, at, count)
    return best_reference(beams, logits, at, count)


def best_reference(beams: Beams, logits: Tensor, at: TrieLevel, count: int) -> Beams:
    """The best `count` children in plain PyTorch: static shapes, no host synchronisation."""
    tokens, following, legal = at.children(beams.states)
    totals = beams.log_probs[..., None] + child_log_probs(logits, tokens, legal)
    scores, place = totals.flatten(1).topk(count, dim=1)
    valid = scores > -torch.inf
    return Beams(
        tokens=tokens.flatten(1).gather(1, place).where(valid, 0),
        parents=(place // tokens.shape[2]).where(valid, 0),
        states=following.flatten(1).gather(1, place).where(valid, -1),
        log_probs=scores,
        sampling_log_probs=scores,
        scores=scores,
        streams=None,
    )


def best_native(beams: Beams, logits: Tensor, at: TrieLevel, count: int) -> Beams:
    """`best_reference` by the kernel of csrc/trie_beam.cpp."""
    requests, width, codes = logits.shape
    allowed = lists = dead = None
    if at.restriction is not None:
        if at.restriction.allow is not None:
            allowed = at.restriction.allow.states[at.level].contiguous()
            lists = at.restriction.lists
        if at.restriction.dead:
            dead = at.restriction.dead[at.level].contiguous()
    scores = torch.empty(requests, count)
    parents, tokens, states = (torch.empty(requests, count, dtype=torch.int64) for _ in range(3))
    native.call(
        "tandem_trie_beam",
        *(logits.float().contiguous(), beams.log_probs.contiguous(), beams.states.contiguous()),
        *(at.trie.indptr[at.level], at.trie.tokens[at.level], allowed, lists, dead),
        *(requests, width, codes, at.trie.num_states(at.level + 1)),
        *(0 if dead is None else dead.shape[1], count, torch.get_num_threads()),
        *(scores, parents, tokens, states),
    )
    return Beams(tokens, parents, states, scores, scores, scores, None)


@dataclass(frozen=True)
class _Children:
    """All children of all beams, [N, W, M] each; those that may not be are -inf."""

    tokens: Tensor
    states: Tensor
    log_probs: Tensor
    """log π of the prefix with the child."""
    sampling_log_probs: Tensor

    @staticmethod
    def of(
        beams: Beams, logits: Tensor, at: TrieLevel, temperature: float, top_p: float = 1.0
    ) -> "_Children":
        tokens, following, legal = at.children(beams.states)
        log_probs = child_log_probs(logits, tokens, legal)
        step = log_probs
        if temperature != 1.0:
            step = renormalised(step / temperature, legal)
        if top_p != 1.0:
            step = renormalised(step, legal & _nucleus(step, top_p))
        return _Children(
            tokens=tokens,
            states=following,
            log_probs=beams.log_probs[..., None] + log_probs,
            sampling_log_probs=beams.sampling_log_probs[..., None] + step,
        )

    def take(self, place: Tensor, scores: Tensor, streams: Tensor) -> Beams:
        """Those at `place` [N, P] of the flattened children; `streams` [N, P] their parents'."""
        valid = scores > -torch.inf
        tokens = self.tokens.flatten(1).gather(1, place)
        log_probs = self.log_probs.flatten(1).gather(1, place)
        drawn_from = self.sampling_log_probs.flatten(1).gather(1, place)
        return Beams(
            tokens=tokens.where(valid, 0),
            parents=(place // self.tokens.shape[2]).where(valid, 0),
            states=self.states.flatten(1).gather(1, place).where(valid, -1),
            log_probs=log_probs.where(valid, -torch.inf),
            sampling_log_probs=drawn_from.where(valid, -torch.inf),
            scores=scores.where(valid, -torch.inf),
            streams=extend_streams(streams, tokens),
        )


def _without_replacement(
    beams: Beams, logits: Tensor, at: TrieLevel, config: GumbelTopKConfig
) -> Beams:
    """Stochastic beam search (arXiv 1903.06059, algorithm 1): top-k of perturbed log-probabilities.

    A beam's score is the largest perturbed log-probability of the ids below it, so its children's
    are drawn on condition that their maximum equals it.
    """
    assert beams.streams is not None
    children = _Children.of(beams, logits, at, config.temperature)
    log_probs = children.sampling_log_probs
    perturbed = log_probs + gumbels(beams.streams[..., None], children.tokens)
    conditioned = _with_maximum(perturbed, beams.scores[..., None])
    conditioned = conditioned.masked_fill(log_probs == -torch.inf, -torch.inf).flatten(1)
    scores, place = conditioned.topk(min(config.samples, conditioned.shape[1]), dim=1)
    return children.take(place, scores, beams.streams.gather(1, place // log_probs.shape[2]))


def _with_maximum(perturbed: Tensor, maximum: Tensor) -> Tensor:
    """Gumbels of the last dimension, conditioned on their maximum (appendix B.3 of the same).

    -log(exp(-T) - exp(-Z) + exp(-G)) for maximum T, largest Z, in the form that cannot overflow.
    Not a number only where nothing is legal or no beam is.
    """
    largest = perturbed.amax(-1, keepdim=True)
    below = perturbed - largest
    # log(1 - exp(x)) loses its digits on one side of -log 2 or the other.
    near = (-below.expm1()).log()
    far = (-below.exp()).log1p()
    v = maximum - perturbed + torch.where(below > -0.6931472, near, far)
    return maximum - v.clamp(min=0) - (-v.abs()).exp().log1p()


def _with_replacement(
    beams: Beams, logits: Tensor, at: TrieLevel, config: AncestralConfig
) -> Beams:
    """One child of each sample, by inverting the distribution function of its legal children."""
    assert beams.streams is not None
    children = _Children.of(beams, logits, at, config.temperature, config.top_p)
    branch = children.tokens.shape[2]
    step = children.sampling_log_probs - beams.sampling_log_probs[..., None]
    # At level 0 all samples share one prefix: [N, 1, M]. Rows without a beam are not a number.
    mass = step.exp().nan_to_num(0.0).cumsum(-1)
    point = uniforms(beams.streams, torch.zeros_like(beams.streams)) * mass[..., -1]
    child = (mass <= point[..., None]).sum(-1).clamp(max=branch - 1)
    parents = torch.arange(config.samples, device=child.device) if at.level else 0
    place = child + parents * branch
    scores = children.sampling_log_probs.flatten(1).gather(1, place)
    return children.take(place, scores, beams.streams)


def _nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """The fewest children that hold `top_p` of the probability: bool [..., M]."""
    ranked, order = log_probs.sort(dim=-1, descending=True)
    before = ranked.exp().cumsum(-1) - ranked.exp()
    return torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, order, before < top_p)
