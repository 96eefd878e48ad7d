"""Attention of code decoders: over the codes written so far, and over the history's context.

A decoder writes few positions (one per code level) for many requests, so its products are small and
its context is shared: keys and values of a history exist once per request, however many beams,
positions or grouped heads read them.

Shape legend: N requests, P code positions, W beams, Q queries of a request (P or W), T tokens of
all contexts, S tokens of the longest one, D width, H query heads, G kv heads (G divides H), Dh
width of a head.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from models.ops.beam_attention import Written, beam_attention
from models.ops.context_attention import context_attention, reads_jagged
from models.ops.jagged import jagged_to_padded
from models.ops.masked_attention import masked_attention, visible_tokens


class SelfAttentionCache(Protocol):
    """What a step needs of `models.generation.kv_cache.BeamCache`."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep this position's keys and values [N, W, G, Dh] of a decoder layer."""

    def written(self, layer: int) -> Written:
        """Keys and values of all positions so far, as they were appended."""

    @property
    def ancestors(self) -> Tensor:
        """[N, W, positions so far] int64: whose keys at each position are a beam's own."""


@dataclass(frozen=True)
class JaggedKeys:
    """Keys and values of N contexts as they lie side by side, for the CPU's kernel."""

    keys: Tensor
    """[T, G, Dh]."""
    values: Tensor
    """[T, G, Dh]."""
    offsets: Tensor
    """[N + 1] int64."""

    @property
    def num_requests(self) -> int:
        """N."""
        return self.offsets.numel() - 1

    @property
    def num_groups(self) -> int:
        """G."""
        return self.keys.shape[1]

    def attend(self, q: Tensor) -> Tensor:
        """Queries [N, G, Q, Dh] over their contexts: like `q`."""
        return context_attention(q, self.keys, self.values, self.offsets)


@dataclass(frozen=True)
class PaddedKeys:
    """Keys and values of N contexts, padded once and read by all queries of a request."""

    keys: Tensor
    """[N, G, S, Dh]; zero where padding."""
    values: Tensor
    """[N, G, S, Dh]; zero where padding."""
    visible: Tensor
    """[N, 1, 1, S] bool. Of an empty context one zero row is visible, so that reading it gives 0
    instead of NaN."""

    @property
    def num_requests(self) -> int:
        """N."""
        return self.keys.shape[0]

    @property
    def num_groups(self) -> int:
        """G."""
        return self.keys.shape[1]

    def attend(self, q: Tensor) -> Tensor:
        """Queries [N, G, Q, Dh] over their contexts: like `q`."""
        return masked_attention(q, self.keys, self.values, self.visible)


ContextKeys = JaggedKeys | PaddedKeys


def context_keys(keys: Tensor, values: Tensor, offsets: Tensor, longest: int) -> ContextKeys:
    """Jagged keys and values [T, G, Dh] of N contexts, ready to be read.

    `offsets` int64 [N + 1]; no context is longer than `longest` tokens.
    """
    if reads_jagged(keys, values):
        return JaggedKeys(keys, values, offsets)
    size = max(longest, 1)
    padded_keys = jagged_to_padded(keys, offsets, size).transpose(1, 2)
    padded_values = padded_keys
    if values is not keys:
        padded_values = jagged_to_padded(values, offsets, size).transpose(1, 2)
    return PaddedKeys(padded_keys, padded_values, visible_tokens(offsets.diff(), size))


class KeyValueProjection(nn.Module):
    """Keys and values of context tokens for one decoder layer."""

    def __init__(self, width: int, num_kv_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.projection = nn.Linear(width, 2 * num_kv_heads * head_width, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] → keys [T, G, Dh], values [T, G, Dh]."""
        keys, values = self.projection(tokens).unflatten(-1, (2, self.num_kv_heads, -1)).unbind(-3)
        return keys, values


class ContextAttention(nn.Module):
    """Cross-attention: queries and output projection only, keys and values come with the context.

    softmax(q kᵀ / √Dh) v. Also OneRec-V2's lazy attention (arXiv 2508.20900, section 3), whose
    blocks own no key and value projections.
    """

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, num_heads * head_width, bias=False)
        self.output = nn.Linear(num_heads * head_width, width, bias=False)
        nn.init.normal_(self.query.weight, std=width**-0.5)
        nn.init.normal_(self.output.weight, std=(num_heads * head_width) ** -0.5)

    def forward(self, x: Tensor, context: ContextKeys) -> Tensor:
        """[N, Q, D] → [N, Q, D]; every query sees its whole context."""
        queries, groups = x.shape[1], context.num_groups
        q = self.query(x).unflatten(-1, (groups, self.num_heads // groups, -1))
        # Heads of a group become further queries: keys are neither repeated per head nor per beam.
        q = q.permute(0, 2, 1, 3, 4).flatten(2, 3)
        attended = context.attend(q).unflatten(2, (queries, -1)).permute(0, 2, 1, 3, 4)
        return self.output(attended.flatten(2))

    def flops(self, context_tokens: float) -> float:
        """Forward FLOPs of one query that sees `context_tokens` tokens."""
        inner = self.query.out_features
        return 2 * 2 * inner * self.query.in_features + 2 * 2 * inner * context_tokens


class CodeSelfAttention(nn.Module):
    """Causal attention over the code positions of each request: softmax(q kᵀ / √Dh + bias) v.

    `forward` takes all positions of a known item at once, `step` the newest position of each beam;
    both give the same numbers.
    """

    def __init__(
        self, width: int, num_heads: int, head_width: int, num_kv_heads: int | None = None
    ) -> None:
        """`num_kv_heads` G < H shares keys and values among H / G heads (grouped queries)."""
        super().__init__()
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % groups:
            raise ValueError(f"{groups} key-value heads must divide {num_heads} heads")
        self.num_heads, self.groups, self.head_width = num_heads, groups, head_width
        self.qkv = nn.Linear(width, (num_heads + 2 * groups) * head_width, bias=False)
        self.output = nn.Linear(num_heads * head_width, width, bias=False)
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.output.weight, std=(num_heads * head_width) ** -0.5)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[N, P, D] → [N, P, D]; `bias` [H, P, P] is added to the logits."""
        requests, positions = x.shape[:2]
        q, k, v = self._project(x)
        # Positions are few: plain products are twice as fast as the fused kernels on a CPU.
        q = q.unflatten(2, (self.groups, -1)) / math.sqrt(self.head_width)
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)
        logits = (q @ k.permute(0, 2, 3, 1)).view(requests, self.num_heads, positions, positions)
        mask = _causal_mask(positions, x.device)
        weights = (logits + (mask if bias is None else bias + mask)).softmax(dim=-1)
        weights = weights.unflatten(1, (self.groups, -1)).flatten(2, 3).to(v.dtype)
        attended = (weights @ v.transpose(1, 2)).unflatten(2, (-1, positions))
        return self.output(attended.permute(0, 3, 1, 2, 4).flatten(2))

    def step(
        self, x: Tensor, cache: SelfAttentionCache, layer: int, bias: Tensor | None = None
    ) -> Tensor:
        """[N, W, D], the newest position p of each beam → [N, W, D]; `bias` [H, p + 1]."""
        q, k, v = self._project(x)
        cache.append(layer, k, v)
        attended = beam_attention(q, cache.written(layer), cache.ancestors, bias)
        return self.output(attended.flatten(2))

    def flops(self, positions: int) -> float:
        """Forward FLOPs of `positions` positions of one request; p sees p + 1 of them."""
        inner, width = self.num_heads * self.head_width, self.output.out_features
        projections = 2 * width * (2 * inner + 2 * self.groups * self.head_width)
        return positions * projections + 2 * 2 * inner * positions * (positions + 1) / 2

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., H, Dh], keys and values [..., G, Dh]."""
        heads = self.num_heads, self.groups, self.groups
        parts = self.qkv(x).split([count * self.head_width for count in heads], dim=-1)
        q, k, v = (x.unflatten(-1, (-1, self.head_width)) for x in parts)
        return q, k, v


def _causal_mask(positions: int, device: torch.device) -> Tensor:
    return torch.full((positions, positions), -torch.inf, device=device).triu(1)
