"""HSTU over semantic ids: HSTU (arXiv 2402.17152) reads, a small causal decoder writes.

HSTU sees one token per event, the sum of its item's code embeddings, so a history is L times
shorter than as flat codes (TIGER). After every event a decoder of a few transformer blocks writes
the next item's codes given HSTU's hidden state: one pass over a sequence trains all its positions.

The hidden state enters every code position, as what is added to the code before it: in a decoder of
one block the heads would otherwise see it through attention alone.

Shape legend: B sequences, T events, N requests (T or B), L code levels, P code positions, W beams,
D width.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from configs.decoders import HSTUDecoderConfig
from models.base import CatalogueSizes, CodeDecoder, TableSpec
from models.batch import JaggedBatch
from models.generation.kv_cache import BeamCache
from models.layers.code_embedding import INIT_STD, CodeEmbedding, EventFeatures
from models.layers.code_heads import CodeHeads
from models.layers.decoder_attention import CodeSelfAttention, SelfAttentionCache
from models.layers.hstu_block import HSTUBlock, hstu_block_flops
from models.layers.norms import RMSNorm
from models.layers.sequence_input import check_lengths
from models.layers.t5_block import FeedForward, dropped
from models.ops.dropout import sub_keys, token_keys
from models.ops.jagged import positions_in_sequence

_INPUT_SALT, _WRITTEN_SALT, _FIRST_BLOCK_SALT = range(3)
_SITES = 3  # dropout sites of a WritingBlock


@dataclass(frozen=True)
class HSTUContext:
    """What HSTU made of the histories of N requests."""

    hidden: Tensor
    """[N, D]."""
    dropout_keys: Tensor | None
    """[N, L] int64 in training."""


class WritingBlock(nn.Module):
    """x + CausalAttention(norm(x)), then x + FeedForward(norm(x)), over code positions."""

    def __init__(self, config: HSTUDecoderConfig, salt: int) -> None:
        super().__init__()
        width, heads = config.width, config.decoder_heads
        self.dropout, self.salt = config.dropout, salt
        self.attention_norm, self.feedforward_norm = RMSNorm(width), RMSNorm(width)
        self.attention = CodeSelfAttention(width, heads, width // heads)
        self.feedforward = FeedForward(width, config.decoder_feedforward, config.dropout, salt + 1)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """[N, P, D] → [N, P, D]; `keys` [N, P] switch dropout on."""
        attended = self.attention(self.attention_norm(x))
        x = x + dropped(attended, keys, self.dropout, self.salt)
        return x + self.feedforward(self.feedforward_norm(x), keys)

    def step(self, x: Tensor, cache: SelfAttentionCache, layer: int) -> Tensor:
        """The newest position of each beam: [N, W, D] → [N, W, D]."""
        x = x + self.attention.step(self.attention_norm(x), cache, layer)
        return x + self.feedforward(self.feedforward_norm(x), None)

    def flops(self, positions: int) -> float:
        """Forward FLOPs per request."""
        return self.attention.flops(positions) + positions * self.feedforward.flops()


class HSTUDecoder(CodeDecoder):
    """Writes an item after any event."""

    supervision: ClassVar[Literal["every_position", "last_position"]] = "every_position"

    def __init__(
        self,
        config: HSTUDecoderConfig,
        specs: tuple[TableSpec, ...],
        sizes: CatalogueSizes,
        max_length: int,
    ) -> None:
        """`max_length` events are kept of a user."""
        super().__init__()
        self.config, self.specs = config, specs
        self.codebook_sizes = sizes.codebook_sizes
        self.num_levels = len(self.codebook_sizes)
        self.longest_history = max_length
        self.max_positions = max_length + config.attention_slack
        width = config.width
        self.codes = CodeEmbedding(self.codebook_sizes, width, INIT_STD)
        self.features = EventFeatures(config, specs, sizes, width)
        self.positions = nn.Embedding(self.max_positions, width)
        std = width**-0.5
        nn.init.trunc_normal_(self.positions.weight, std=std, a=-2 * std, b=2 * std)
        self.blocks = nn.ModuleList(
            HSTUBlock(config, self.max_positions, salt=_FIRST_BLOCK_SALT + layer)
            for layer in range(config.num_layers)
        )
        self.hidden_norm = RMSNorm(width)
        # Written codes are rows of their own: read ones start small, as items do in HSTU.
        self.written = CodeEmbedding(self.codebook_sizes[:-1], width, std)
        first = _FIRST_BLOCK_SALT + config.num_layers
        self.decoder = nn.ModuleList(
            WritingBlock(config, salt=first + layer * _SITES)
            for layer in range(config.decoder_layers)
        )
        self.decoder_norm = RMSNorm(width)
        self.heads = CodeHeads(self.codebook_sizes, width)

    def table_specs(self) -> tuple[TableSpec, ...]:
        return self.specs

    def encode(
        self,
        batch: JaggedBatch,
        embeddings: dict[str, Tensor],
        step_seed: int,
        positions: Literal["every", "last"],
    ) -> HSTUContext:
        check_lengths(batch, self.max_positions)
        keys = None
        if self.training:
            keys = token_keys(step_seed, 0, batch.sample_ids, batch.offsets)
        x = self._input(batch, embeddings, keys)
        for block in self.blocks:
            x = block(x, batch, keys)
        if positions == "last":
            last = batch.offsets[1:] - 1
            x, keys = x[last], None if keys is None else keys[last]
        hidden = self.hidden_norm(x)
        return HSTUContext(hidden, None if keys is None else sub_keys(keys, self.num_levels))

    def requests_of(self, context: HSTUContext, requests: Tensor) -> HSTUContext:
        keys = context.dropout_keys
        return HSTUContext(context.hidden[requests], None if keys is None else keys[requests])

    def teacher_forced(self, context: HSTUContext, codes: Tensor) -> list[Tensor]:
        keys = context.dropout_keys
        written = self.written(codes[:, : self.num_levels - 1]) * math.sqrt(self.config.width)
        x = context.hidden[:, None] + F.pad(written, (0, 0, 1, 0))
        x = dropped(x, keys, self.config.dropout, _WRITTEN_SALT)
        for block in self.decoder:
            x = block(x, keys)
        logits: list[Tensor] = self.heads(self.decoder_norm(x))
        return logits

    def new_cache(self, context: HSTUContext) -> BeamCache:
        return BeamCache(len(self.decoder), context.hidden.shape[0], context.hidden.device)

    def step(
        self, context: HSTUContext, cache: BeamCache, level: int, tokens: Tensor | None
    ) -> Tensor:
        x = context.hidden[:, None]
        if tokens is not None:
            x = x + self.written.level(level - 1, tokens) * math.sqrt(self.config.width)
        for layer, block in enumerate(self.decoder):
            assert isinstance(block, WritingBlock)
            x = block.step(x, cache, layer)
        return self.heads.level(level, self.decoder_norm(x))

    def flops_per_token(self, mean_length: float) -> float:
        """With one request per event, as in training."""
        decoder = [block for block in self.decoder if isinstance(block, WritingBlock)]
        writing = sum(block.flops(self.num_levels) for block in decoder) + self.heads.flops()
        return len(self.blocks) * hstu_block_flops(self.config, mean_length) + writing

    def _input(
        self, batch: JaggedBatch, embeddings: dict[str, Tensor], keys: Tensor | None
    ) -> Tensor:
        """dropout((Σ codes + features)·√D + P[t]): [T, D]."""
        x = self.codes.item_sums(batch)
        features = self.features(batch, embeddings, batch.next_timestamps)
        if features is not None:
            x = x + features
        places = positions_in_sequence(batch.offsets, batch.num_tokens)
        x = x * math.sqrt(self.config.width) + self.positions(places)
        return dropped(x, keys, self.config.dropout, _INPUT_SALT)
