"""Plain counterparts: a trie of dicts, probabilities by enumeration, a tiny decoder with a cache.

Shape legend: N requests, W beams, L levels, K_l codes of level l, D width, H heads, d head width.
"""

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from models.generation.catalogue_trie import CatalogueTrie
from models.generation.kv_cache import BeamCache

Id = tuple[int, ...]


class Catalogue(NamedTuple):
    """Codes of a random catalogue."""

    codes: Tensor
    sizes: tuple[int, ...]

    @property
    def trie(self) -> CatalogueTrie:
        return CatalogueTrie.build(self.codes, self.sizes)

    def ids(self, items: Tensor | None = None) -> list[Id]:
        """Distinct ids, ascending, of the items that are marked (all)."""
        codes = self.codes if items is None else self.codes[items]
        return sorted({tuple(row) for row in codes.tolist()})


@st.composite
def catalogues(draw: st.DrawFn, max_items: int = 24) -> Catalogue:
    """Few codes and many items, so that ids collide and prefixes are shared."""
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    count = draw(st.integers(1, max_items))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    columns = [torch.randint(size, (count,), generator=generator) for size in sizes]
    return Catalogue(torch.stack(columns, dim=1), sizes)


def dict_trie(ids: list[Id]) -> dict:
    """Nested dicts: code → the trie below it."""
    root: dict = {}
    for codes in ids:
        node = root
        for code in codes:
            node = node.setdefault(code, {})
    return root


class TinyDecoder:
    """Two attention layers over [BOS + context, codes so far]; logits depend on all of them."""

    width, heads = 6, 2

    def __init__(self, sizes: tuple[int, ...], seed: int, sharpness: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        D = self.width
        self.codebook_sizes = sizes
        self.embeddings = [random(size, D) for size in sizes]
        self.qkv = [random(D, 3 * D) * 0.5 for _ in range(2)]
        self.head = [random(D, size) * sharpness for size in sizes]

    def new_cache(self, context: Tensor) -> BeamCache:
        return BeamCache(len(self.qkv), context.shape[0], context.device)

    def step(self, context: Tensor, cache: BeamCache, level: int, tokens: Tensor | None) -> Tensor:
        """`context` [N, D]."""
        x = context[:, None] if tokens is None else self.embeddings[level - 1][tokens]
        for layer, weight in enumerate(self.qkv):
            q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (x @ weight).chunk(3, -1))
            cache.append(layer, k, v)
            keys, values = cache.gather(layer)
            weights = torch.einsum("nwhd,nwlhd->nwlh", q, keys).softmax(dim=2)
            x = x + torch.einsum("nwlh,nwlhd->nwhd", weights, values).flatten(2)
        return x @ self.head[level]

    def logits(self, context: Tensor, prefix: Id) -> Tensor:
        """The same for one request (`context` [D]) and one prefix, without a cache: [K]."""
        rows = [context, *(self.embeddings[level][code] for level, code in enumerate(prefix))]
        x = torch.stack(rows)
        causal = torch.ones(len(rows), len(rows)).tril().bool()
        for weight in self.qkv:
            q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (x @ weight).chunk(3, -1))
            scores = torch.einsum("ihd,jhd->ijh", q, k)
            weights = scores.masked_fill(~causal[..., None], -torch.inf).softmax(dim=1)
            x = x + torch.einsum("ijh,jhd->ihd", weights, v).flatten(1)
        return x[-1] @ self.head[len(prefix)]

    def contexts(self, count: int, seed: int = 0) -> Tensor:
        return torch.randn(count, self.width, generator=torch.Generator().manual_seed(seed))


def exact_log_probs(
    decoder: TinyDecoder, context: Tensor, ids: list[Id], temperature: float = 1.0
) -> dict[Id, float]:
    """log π of every id for one request, by walking dicts and normalising over children."""
    found: dict[Id, float] = {}

    def visit(node: dict, prefix: Id, log_prob: float) -> None:
        if len(prefix) == len(decoder.codebook_sizes):
            found[prefix] = log_prob
            return
        logits = (decoder.logits(context, prefix) / temperature).tolist()
        normaliser = math.log(sum(math.exp(logits[code]) for code in node))
        for code, child in node.items():
            visit(child, (*prefix, code), log_prob + logits[code] - normaliser)

    visit(dict_trie(ids), (), 0.0)
    return found
