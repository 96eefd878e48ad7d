"""TIGER (arXiv 2305.05065): a T5-style encoder-decoder that reads and writes semantic ids.

The history is the flat sequence of its items' codes; features of an event are added to each of its
codes. There is no user token (GRID, arXiv 2507.22224, finds none needed).

Shape legend: B sequences (= N requests), T events, L code levels, P code positions, W beams,
D width, H heads, K_l codes of level l.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from configs.decoders import TIGERConfig
from models.base import CatalogueSizes, CodeDecoder, TableSpec
from models.batch import JaggedBatch
from models.generation.kv_cache import BeamCache
from models.layers.code_embedding import CodeEmbedding, EventFeatures, last_request_times
from models.layers.code_heads import CodeHeads
from models.layers.decoder_attention import ContextKeys, KeyValueProjection, context_keys
from models.layers.norms import RMSNorm
from models.layers.t5_bias import RelativeBias
from models.layers.t5_block import (
    DECODER_SITES,
    ENCODER_SITES,
    DecoderBlock,
    EncoderBlock,
    dropped,
)
from models.ops.dropout import sub_keys, token_keys
from models.ops.windows import latest_events

_INPUT_SALT, _ENCODED_SALT, _WRITTEN_SALT, _OUTPUT_SALT, _FIRST_BLOCK_SALT = range(5)


@dataclass(frozen=True)
class TIGERContext:
    """The encoded histories of N requests."""

    layers: tuple[ContextKeys, ...]
    """Keys and values of each decoder layer."""
    dropout_keys: Tensor | None
    """[N, L] int64 in training."""

    @property
    def num_requests(self) -> int:
        """N."""
        return self.layers[0].num_requests


class TIGER(CodeDecoder):
    """Writes one item per history, from the latest `history` events."""

    supervision: ClassVar[Literal["every_position", "last_position"]] = "last_position"

    def __init__(
        self, config: TIGERConfig, specs: tuple[TableSpec, ...], sizes: CatalogueSizes
    ) -> None:
        super().__init__()
        self.config, self.specs = config, specs
        self.codebook_sizes = sizes.codebook_sizes
        self.longest_history = config.history
        width = config.width
        self.num_levels = len(self.codebook_sizes)
        self.codes = CodeEmbedding(self.codebook_sizes, width, width**-0.5)
        self.features = EventFeatures(config, specs, sizes, width)
        self.begin = nn.Embedding(1, width)
        nn.init.normal_(self.begin.weight, std=width**-0.5)
        buckets = config.num_heads, config.relative_buckets, config.relative_distance
        self.encoder_bias = RelativeBias(*buckets, bidirectional=True)
        self.decoder_bias = RelativeBias(*buckets, bidirectional=False)
        self.encoder = nn.ModuleList(
            EncoderBlock(config, salt=_FIRST_BLOCK_SALT + layer * ENCODER_SITES)
            for layer in range(config.num_encoder_layers)
        )
        self.encoder_norm = RMSNorm(width)
        self.projections = nn.ModuleList(
            KeyValueProjection(width, config.num_heads, config.head_width)
            for _ in range(config.num_decoder_layers)
        )
        first = _FIRST_BLOCK_SALT + config.num_encoder_layers * ENCODER_SITES
        self.decoder = nn.ModuleList(
            DecoderBlock(config, salt=first + layer * DECODER_SITES)
            for layer in range(config.num_decoder_layers)
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
    ) -> TIGERContext:
        """Costs one host synchronisation, for the longest history."""
        if positions != "last":
            raise ValueError("TIGER writes an item after the last event only; cut windows instead")
        levels = self.num_levels
        batch, embeddings, longest = latest_events(batch, embeddings, self.config.history)
        event_keys = code_keys = request_keys = None
        if self.training:
            event_keys = token_keys(step_seed, 0, batch.sample_ids, batch.offsets)
            code_keys = sub_keys(event_keys, levels).flatten()
            request_keys = sub_keys(event_keys[batch.offsets[1:] - 1], levels)
        x = self.codes.items(batch)
        features = self.features(batch, embeddings, last_request_times(batch))
        if features is not None:
            x = x + features[:, None]
        x = self._drop((x * math.sqrt(self.config.width)).flatten(0, 1), code_keys, _INPUT_SALT)
        offsets, longest = batch.offsets * levels, longest * levels
        bias = self.encoder_bias.distances(longest)
        for block in self.encoder:
            x = block(x, bias, offsets, longest, code_keys)
        x = self._drop(self.encoder_norm(x), code_keys, _ENCODED_SALT)
        layers = []
        for project in self.projections:
            keys, values = project(x)
            layers.append(context_keys(keys, values, offsets, longest))
        return TIGERContext(tuple(layers), request_keys)

    def teacher_forced(self, context: TIGERContext, codes: Tensor) -> list[Tensor]:
        levels, keys = self.num_levels, context.dropout_keys
        begin = self._begin(context)
        x = torch.cat([begin, self.codes(codes[:, : levels - 1])], dim=1)
        x = self._drop(x * math.sqrt(self.config.width), keys, _WRITTEN_SALT)
        bias = self.decoder_bias(levels)
        for block, layer in zip(self.decoder, context.layers, strict=True):
            x = block(x, layer, bias, keys)
        x = self._drop(self.decoder_norm(x), keys, _OUTPUT_SALT)
        logits: list[Tensor] = self.heads(x)
        return logits

    def _begin(self, context: TIGERContext) -> Tensor:
        """What stands before the first code: [N, 1, D]."""
        keys = context.layers[0].keys
        first = torch.zeros(context.num_requests, 1, dtype=torch.int64, device=keys.device)
        begin: Tensor = self.begin(first)
        return begin

    def new_cache(self, context: TIGERContext) -> BeamCache:
        return BeamCache(len(self.decoder), context.num_requests, context.layers[0].keys.device)

    def step(
        self, context: TIGERContext, cache: BeamCache, level: int, tokens: Tensor | None
    ) -> Tensor:
        x = self._begin(context) if tokens is None else self.codes.level(level - 1, tokens)
        x = x * math.sqrt(self.config.width)
        bias = self.decoder_bias(level + 1)[:, level]
        for layer, block in enumerate(self.decoder):
            assert isinstance(block, DecoderBlock)
            x = block.step(x, context.layers[layer], cache, layer, bias)
        return self.heads.level(level, self.decoder_norm(x))

    def flops_per_token(self, mean_length: float) -> float:
        """Per event of a window; its one request is spread over `mean_length` events."""
        levels, inner = self.num_levels, self.config.num_heads * self.config.head_width
        encoder = [block for block in self.encoder if isinstance(block, EncoderBlock)]
        decoder = [block for block in self.decoder if isinstance(block, DecoderBlock)]
        # Keys and values of a code for each decoder layer, and the products of all positions.
        reading = len(decoder) * (2 * 2 * inner * self.config.width + levels * 2 * 2 * inner)
        code = sum(block.flops(mean_length * levels) for block in encoder) + reading
        request = sum(block.flops(levels) for block in decoder) + self.heads.flops()
        return levels * code + request / mean_length

    def _drop(self, x: Tensor, keys: Tensor | None, salt: int) -> Tensor:
        return dropped(x, keys, self.config.dropout, salt)
