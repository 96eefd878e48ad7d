"""OneRec (arXiv 2502.18965, 2506.13695): an encoder over user pathways, a decoder with experts.

Shape legend: N requests (one a sequence), T history tokens, D width, S context tokens of a request,
L code levels of an item, P code positions (L times the items of a session), K_l codes of level l.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from configs.decoders import OneRecConfig
from models.base import CatalogueSizes, CodeDecoder, TableSpec
from models.batch import JaggedBatch
from models.generation.kv_cache import BeamCache
from models.layers.code_embedding import EventFeatures, last_request_times
from models.layers.code_writer import BlockShape, CodeWriter
from models.layers.decoder_attention import ContextKeys, KeyValueProjection, context_keys
from models.layers.experts import expert_load, update_balance
from models.layers.feedforward import linear_flops
from models.layers.norms import RMSNorm
from models.layers.pathways import (
    COMPRESSION_SITES,
    ENCODER_SITES,
    EncoderBlock,
    HistoryCompressor,
    PathwayNetwork,
    check_windows,
)
from models.ops.dropout import sub_keys, token_keys
from models.ops.jagged import take_distinct
from models.ops.jagged_select import (
    Selection,
    concatenate,
    longest_sequence,
    recency,
    repeated_offsets,
    select_latest,
)

Jagged = tuple[Tensor, Tensor]
"""Values [T, D] and offsets [N + 1]."""


@dataclass(frozen=True)
class OneRecContext:
    """What N requests know."""

    reads: tuple[ContextKeys, ...]
    """Keys and values of the encoded pathways, one set a decoder block."""
    dropout_keys: Tensor | None
    """[N, P] int64 of the code positions; None in evaluation."""


class EventPathway(nn.Module):
    """Some of the latest events, each through a network, plus a learned vector of its recency."""

    def __init__(self, config: OneRecConfig, history: int) -> None:
        super().__init__()
        self.history = history
        self.network = PathwayNetwork(config.width, config.feedforward_width, config.width)
        self.recencies = nn.Embedding(history, config.width)
        nn.init.normal_(self.recencies.weight, std=config.width**-0.5)

    def forward(self, events: Tensor, chosen: Selection) -> Jagged:
        """Events [T, D] of which some are `chosen`."""
        tokens = self.network(take_distinct(events, chosen.indices))
        return tokens + self.recencies(chosen.recency), chosen.offsets


class OneRec(CodeDecoder):
    """Pathways side by side → self-attention encoder → decoder blocks that write codes."""

    supervision: ClassVar[Literal["every_position", "last_position"]] = "last_position"

    def __init__(
        self, config: OneRecConfig, specs: tuple[TableSpec, ...], sizes: CatalogueSizes
    ) -> None:
        """Raises ValueError where the data set lacks actions that the model names."""
        super().__init__()
        self.config = config
        self.specs = specs
        self.codebook_sizes = sizes.codebook_sizes * config.session_items
        self.features = EventFeatures(config, specs, sizes, config.width)
        lifelong = 0 if config.lifelong is None else config.lifelong.history
        self.longest_history = max(config.history, config.positive_history or 0, lifelong)
        self.static: PathwayNetwork | None = None
        if config.user_features:
            self.static = PathwayNetwork(config.width, config.feedforward_width, config.width)
        self.short = EventPathway(config, config.history)
        self.positive: EventPathway | None = None
        if config.positive_history is not None:
            self.positive = EventPathway(config, config.positive_history)
        actions = torch.tensor(_positive_actions(config, sizes), dtype=torch.int64)
        self.register_buffer("positive_actions", actions, persistent=False)
        self.positive_actions: Tensor
        salt = self._build_lifelong(salt=0)
        salt = self._build_encoder(salt)
        self._build_decoder(sizes.codebook_sizes, salt)

    def _build_lifelong(self, salt: int) -> int:
        config, lifelong = self.config, self.config.lifelong
        self.lifelong: EventPathway | None = None
        self.compressor: HistoryCompressor | None = None
        if lifelong is None:
            return salt
        self.lifelong = EventPathway(config, lifelong.history)
        self.compressor = HistoryCompressor(
            config.width,
            config.num_heads,
            config.feedforward_width,
            config.dropout,
            lifelong.num_queries,
            lifelong.num_layers,
            salt,
        )
        return salt + COMPRESSION_SITES * lifelong.num_layers

    def _build_encoder(self, salt: int) -> int:
        config = self.config
        self.encoder = nn.ModuleList(
            EncoderBlock(
                config.width,
                config.num_heads,
                config.feedforward_width,
                config.dropout,
                salt + at * ENCODER_SITES,
            )
            for at in range(config.num_encoder_layers)
        )
        self.encoder_norm = RMSNorm(config.width)
        return salt + ENCODER_SITES * config.num_encoder_layers

    def _build_decoder(self, codebook_sizes: tuple[int, ...], salt: int) -> None:
        config = self.config
        heads, head_width = config.num_heads, config.width // config.num_heads
        self.context_projections = nn.ModuleList(
            KeyValueProjection(config.width, heads, head_width)
            for _ in range(config.num_decoder_layers)
        )
        shape = BlockShape(
            width=config.width,
            num_heads=heads,
            kv_heads=heads,
            inner=config.feedforward_width,
            dropout=config.dropout,
            cross_first=False,
        )
        experts = [config.experts] * config.num_decoder_layers
        self.writer = CodeWriter(codebook_sizes, config.session_items, shape, experts, salt)

    def table_specs(self) -> tuple[TableSpec, ...]:
        return self.specs

    def encode(
        self,
        batch: JaggedBatch,
        embeddings: dict[str, Tensor],
        step_seed: int,
        positions: Literal["every", "last"],
    ) -> OneRecContext:
        assert positions == "last", "supervised at its last position only"
        check_windows(batch, self.longest_history)
        request_keys = None
        if self.training:
            requests = repeated_offsets(batch.num_sequences, 1, batch.offsets.device)
            request_keys = token_keys(step_seed, 1, batch.sample_ids, requests)
        x, offsets = concatenate(self._pathways(batch, embeddings, request_keys))
        token_dropout = code_dropout = None
        if request_keys is not None:
            token_dropout = token_keys(step_seed, 0, batch.sample_ids, offsets)
            code_dropout = sub_keys(request_keys, self.writer.num_positions)
        longest = longest_sequence(offsets, self._most_context_tokens())
        for block in self.encoder:
            x = block(x, offsets, longest, token_dropout)
        x = self.encoder_norm(x)
        reads = []
        for projection in self.context_projections:
            keys, values = projection(x)
            reads.append(context_keys(keys, values, offsets, longest))
        return OneRecContext(tuple(reads), code_dropout)

    def teacher_forced(self, context: OneRecContext, codes: Tensor) -> list[Tensor]:
        logits: list[Tensor] = self.writer(codes, context.reads, context.dropout_keys)
        return logits

    def new_cache(self, context: OneRecContext) -> BeamCache:
        keys = context.reads[0]
        return BeamCache(len(context.reads), keys.num_requests, keys.keys.device)

    def step(
        self, context: OneRecContext, cache: BeamCache, level: int, tokens: Tensor | None
    ) -> Tensor:
        return self.writer.step(context.reads, cache, level, tokens)

    def expert_load(self) -> Tensor | None:
        return expert_load(self)

    def update_balance(self, global_load: Tensor) -> None:
        update_balance(self, global_load)

    def flops_per_token(self, mean_length: float) -> float:
        """As the base says; exact where all histories are `mean_length` tokens long and, of the
        positive-feedback pathway, all feedback is positive."""
        static = 0.0 if self.static is None else 1.0
        pathways = [p for p in (self.short, self.positive) if p is not None]
        context_tokens = static + sum(min(mean_length, p.history) for p in pathways)
        request = 0.0 if self.static is None else self.static.flops_per_token()
        request += sum(min(mean_length, p.history) * p.network.flops_per_token() for p in pathways)
        if self.lifelong is not None and self.compressor is not None:
            events = min(mean_length, self.lifelong.history)
            request += events * self.lifelong.network.flops_per_token()
            request += self.compressor.flops(events)
            context_tokens += self.compressor.num_queries
        blocks = [block for block in self.encoder if isinstance(block, EncoderBlock)]
        request += context_tokens * sum(b.flops_per_token(context_tokens) for b in blocks)
        request += context_tokens * sum(
            linear_flops(projection.projection)
            for projection in self.context_projections
            if isinstance(projection, KeyValueProjection)
        )
        return (request + self.writer.flops(context_tokens)) / max(mean_length, 1.0)

    def positive_events(self, batch: JaggedBatch) -> Tensor:
        """Which events are positive feedback, by rating or by action: bool [T].

        Raises ValueError where the batch has neither ratings nor the actions to tell.
        """
        positive = torch.zeros(batch.num_tokens, dtype=torch.bool, device=batch.item_ids.device)
        known = batch.ratings is not None
        if batch.ratings is not None:
            positive = batch.ratings >= self.config.positive_from
        if batch.action_ids is not None and self.positive_actions.numel():
            positive = positive | torch.isin(batch.action_ids, self.positive_actions)
            known = True
        if not known:
            raise ValueError(
                "model.positive_history needs feedback, but the batches carry neither ratings nor "
                "positive_actions; map `rating` or `action` in data.source and prepare again, or "
                "set model.positive_history to null"
            )
        return positive

    def _pathways(
        self, batch: JaggedBatch, embeddings: dict[str, Tensor], request_keys: Tensor | None
    ) -> list[Jagged]:
        """Tokens of every pathway that is configured: static, short, positive, lifelong."""
        requests, device = batch.num_sequences, batch.offsets.device
        events = self._events(batch, embeddings)
        parts = []
        users = self.features.users(batch, embeddings)
        if self.static is not None and users is not None:
            parts.append((self.static(users), repeated_offsets(requests, 1, device)))
        parts.append(self.short(events, self._latest(batch, self.config.history)))
        if self.positive is not None:
            wanted = self.positive_events(batch)
            history = self.positive.history
            chosen = select_latest(batch.offsets, batch.num_tokens, history, wanted)
            parts.append(self.positive(events, chosen))
        if self.lifelong is not None and self.compressor is not None:
            tokens, offsets = self.lifelong(events, self._latest(batch, self.lifelong.history))
            queries = self.compressor.num_queries
            keys = None if request_keys is None else sub_keys(request_keys, queries)
            longest = longest_sequence(offsets, self.lifelong.history)
            compressed = self.compressor(tokens, offsets, longest, keys)
            parts.append((compressed.flatten(0, 1), repeated_offsets(requests, queries, device)))
        return parts

    def _events(self, batch: JaggedBatch, embeddings: dict[str, Tensor]) -> Tensor:
        """Codes and what else events carry: [T, D]."""
        events = self.writer.embedding.item_sums(batch)
        features = self.features.events(batch, embeddings, last_request_times(batch))
        return events if features is None else events + features

    def _latest(self, batch: JaggedBatch, history: int) -> Selection:
        """The latest events; all of them, without host synchronisation, where none is longer."""
        total = batch.num_tokens
        if history < self.longest_history:
            return select_latest(batch.offsets, total, history, None)
        everything = torch.arange(total, device=batch.offsets.device)
        return Selection(everything, batch.offsets, recency(batch.offsets, total))

    def _most_context_tokens(self) -> int:
        lifelong = 0 if self.config.lifelong is None else self.config.lifelong.num_queries
        events = self.config.history + (self.config.positive_history or 0)
        return int(self.static is not None) + events + lifelong


def _positive_actions(config: OneRecConfig, sizes: CatalogueSizes) -> list[int]:
    """Ids of the actions that are positive feedback."""
    unknown = [name for name in config.positive_actions if name not in sizes.action_names]
    if unknown:
        raise ValueError(
            f"model.positive_actions names {unknown}, but the prepared data set has the actions "
            f"{list(sizes.action_names)}; map `action` in data.source and prepare again, or remove "
            "them from the model"
        )
    return [sizes.action_names.index(name) + 1 for name in config.positive_actions]
