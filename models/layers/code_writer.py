"""The decoder half of OneRec's models: writes codes while it reads a context.

Shape legend: N requests, L code levels of an item, S items of a session, P = S·L positions,
W beams, Q queries of a request (P or W), D width, K_l codes of level l.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.decoders import ExpertsConfig
from models.generation.kv_cache import BeamCache
from models.layers.code_embedding import CodeEmbedding
from models.layers.decoder_attention import CodeSelfAttention, ContextAttention, ContextKeys
from models.layers.experts import feed_forward
from models.layers.feedforward import linear_flops
from models.layers.norms import RMSNorm
from models.ops.dropout import keyed_dropout

INIT_STD = 0.02
DROPOUT_SITES = 3
"""Of a `CodeBlock`."""


@dataclass(frozen=True)
class BlockShape:
    """Sizes that all blocks of a decoder share."""

    width: int
    num_heads: int
    kv_heads: int
    """Key-value heads of the attention over codes."""
    inner: int
    dropout: float
    cross_first: bool
    """Context before codes (OneRec-V2), or codes before context (OneRec-V1)."""


class CodeBlock(nn.Module):
    """Three residual branches, each behind an RMSNorm: context, codes (causal), feed-forward."""

    def __init__(self, shape: BlockShape, experts: ExpertsConfig | None, salt: int) -> None:
        super().__init__()
        head_width = shape.width // shape.num_heads
        self.shape = shape
        self.salt = salt
        self.context_norm, self.code_norm, self.feedforward_norm = (
            RMSNorm(shape.width) for _ in range(3)
        )
        self.context = ContextAttention(shape.width, shape.num_heads, head_width)
        self.codes = CodeSelfAttention(shape.width, shape.num_heads, head_width, shape.kv_heads)
        self.feedforward = feed_forward(shape.width, shape.inner, experts)

    def forward(self, x: Tensor, read: ContextKeys, dropout_keys: Tensor | None) -> Tensor:
        """All positions of a known item: [N, P, D] → [N, P, D].

        `dropout_keys` [N, P] switch dropout on.
        """
        return self._branches(x, read, self.codes, dropout_keys)

    def step(self, x: Tensor, read: ContextKeys, cache: BeamCache, layer: int) -> Tensor:
        """The newest position of each beam: [N, W, D] → [N, W, D]."""

        def newest(x: Tensor) -> Tensor:
            return self.codes.step(x, cache, layer)

        return self._branches(x, read, newest, None)

    def flops(self, positions: int, context_tokens: float) -> float:
        """Forward FLOPs of a request."""
        feedforward: float = self.feedforward.flops_per_token()  # type: ignore[operator]
        reading = positions * (self.context.flops(context_tokens) + feedforward)
        return reading + self.codes.flops(positions)

    def _branches(
        self,
        x: Tensor,
        read: ContextKeys,
        attend: Callable[[Tensor], Tensor],
        dropout_keys: Tensor | None,
    ) -> Tensor:
        def from_context(x: Tensor) -> Tensor:
            return x + self._drop(self.context(self.context_norm(x), read), dropout_keys, 0)

        def from_codes(x: Tensor) -> Tensor:
            return x + self._drop(attend(self.code_norm(x)), dropout_keys, 1)

        branches = (from_codes, from_context)
        for branch in reversed(branches) if self.shape.cross_first else branches:
            x = branch(x)
        return x + self._drop(self.feedforward(self.feedforward_norm(x)), dropout_keys, 2)

    def _drop(self, x: Tensor, dropout_keys: Tensor | None, site: int) -> Tensor:
        return drop(x, dropout_keys, self.shape.dropout, self.salt + site)


class CodeWriter(nn.Module):
    """[BOS, s_1, s_2, …] → logits of s_1, s_2, …: blocks, then RMSNorm and a head a level.

    In a session, position p carries the code written at p - 1, whatever item that belongs to, and a
    learned vector of its place; the one at an item's first place is that item's BOS. So one code is
    one position, and a step of generation appends one.
    """

    def __init__(
        self,
        codebook_sizes: tuple[int, ...],
        session_items: int,
        shape: BlockShape,
        experts: Sequence[ExpertsConfig | None],
        salt: int,
    ) -> None:
        """`experts`, one entry a block, names the blocks whose feed-forward is a mixture."""
        super().__init__()
        self.levels = len(codebook_sizes)
        self.session_items = session_items
        self.embedding = CodeEmbedding(codebook_sizes, shape.width, shape.width**-0.5)
        self.places = nn.Embedding(self.num_positions, shape.width)
        self.blocks = nn.ModuleList(
            CodeBlock(shape, mixture, salt + at * DROPOUT_SITES)
            for at, mixture in enumerate(experts)
        )
        self.norm = RMSNorm(shape.width)
        self.heads = nn.ModuleList(
            nn.Linear(shape.width, size, bias=False) for size in codebook_sizes
        )
        nn.init.normal_(self.places.weight, std=shape.width**-0.5)
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=INIT_STD)

    @property
    def num_positions(self) -> int:
        """P."""
        return self.levels * self.session_items

    def forward(
        self, codes: Tensor, reads: Sequence[ContextKeys], dropout_keys: Tensor | None
    ) -> list[Tensor]:
        """Logits of every position given the codes before it: P tensors [N, K] float32.

        Args:
            codes: [N, P] int64; the last one is not read.
            reads: what each block reads of the N contexts.
            dropout_keys: [N, P], switch dropout on.
        """
        known = F.pad(codes[:, :-1], (0, 1)).unflatten(1, (self.session_items, self.levels))
        written = self.embedding(known).flatten(1, 2)[:, :-1]
        x = F.pad(written, (0, 0, 1, 0)) + self.places(_places(self.num_positions, codes))
        for block, read in zip(self.blocks, reads, strict=True):
            x = block(x, read, dropout_keys)
        x = self.norm(x)
        return [
            self.heads[place % self.levels](x[:, place]).float()
            for place in range(self.num_positions)
        ]

    def step(
        self, reads: Sequence[ContextKeys], cache: BeamCache, place: int, tokens: Tensor | None
    ) -> Tensor:
        """Logits [N, W, K] float32 of the next code of each beam.

        Args:
            reads: what each block reads of the N contexts.
            cache: of the positions before; this call appends.
            place: 0 … P-1.
            tokens: [N, W] int64 codes at place - 1; None at place 0.
        """
        requests = reads[0].num_requests
        own = torch.full((1, 1), place, device=reads[0].keys.device)
        x = self.places(own).expand(requests, -1, -1)
        if tokens is not None:
            x = x + self.embedding.level((place - 1) % self.levels, tokens)
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, CodeBlock)
            x = block.step(x, reads[layer], cache, layer)
        logits: Tensor = self.heads[place % self.levels](self.norm(x))
        return logits.float()

    def flops(self, context_tokens: float) -> float:
        """Forward FLOPs of a request whose context has `context_tokens` tokens."""
        blocks = [block for block in self.blocks if isinstance(block, CodeBlock)]
        heads = [head for head in self.heads if isinstance(head, nn.Linear)]
        scoring = self.session_items * sum(linear_flops(head) for head in heads)
        return scoring + sum(block.flops(self.num_positions, context_tokens) for block in blocks)


def drop(x: Tensor, dropout_keys: Tensor | None, p: float, salt: int) -> Tensor:
    """Dropout of x [..., D] by the keys [...] of its leading places; none without keys."""
    if dropout_keys is None:
        return x
    return keyed_dropout(x.flatten(0, -2), dropout_keys.flatten(), p, salt).view(x.shape)


def _places(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)
