"""OneRec-V2's lazy decoder (arXiv 2508.20900): histories are projected, not encoded.

Shape legend: N requests (one a sequence), T history tokens, S context tokens of a request, D width,
G key-value heads, Dh head width, L code levels, P code positions (= L), K_l codes of level l.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from configs.decoders import LazyDecoderConfig
from models.base import CatalogueSizes, CodeDecoder, TableSpec
from models.batch import JaggedBatch
from models.generation.kv_cache import BeamCache
from models.layers.code_embedding import EventFeatures, last_request_times
from models.layers.code_writer import BlockShape, CodeWriter, drop
from models.layers.decoder_attention import ContextKeys, context_keys
from models.layers.experts import expert_load, update_balance
from models.layers.norms import RMSNorm
from models.layers.pathways import PathwayNetwork, check_windows
from models.ops.dropout import sub_keys, token_keys
from models.ops.jagged_select import concatenate, longest_sequence, recency, repeated_offsets


@dataclass(frozen=True)
class LazyContext:
    """What N requests know."""

    sets: tuple[ContextKeys, ...]
    """L_kv sets of keys and values."""
    dropout_keys: Tensor | None
    """[N, P] int64 of the code positions; None in evaluation."""


class ContextProcessor(nn.Module):
    """Normalised keys and values out of context tokens; all that blocks ever see of them.

    A token becomes S_kv·L_kv vectors C_j of G_kv·Dh numbers; k_l = RMSNorm(C_{l·S_kv}), and
    v_l = RMSNorm(C_{l·S_kv + 1}), or k_l where S_kv = 1 (section 3.1).
    """

    def __init__(self, config: LazyDecoderConfig) -> None:
        super().__init__()
        self.layers, self.split, self.groups = config.kv_layers, config.kv_split, config.kv_heads
        chunk = config.kv_heads * (config.width // config.num_heads)
        chunks = self.layers * self.split
        self.network = PathwayNetwork(config.width, config.feedforward_width, chunks * chunk)
        self.norms = nn.ModuleList(RMSNorm(chunk) for _ in range(chunks))

    def forward(self, tokens: Tensor, offsets: Tensor, longest: int) -> tuple[ContextKeys, ...]:
        """L_kv sets for the contexts tokens [T, D], offsets [N + 1], none beyond `longest`."""
        vectors = self.network(tokens).chunk(len(self.norms), dim=-1)
        normed = [norm(vector.float()) for norm, vector in zip(self.norms, vectors, strict=True)]
        heads = [x.unflatten(-1, (self.groups, -1)) for x in normed]
        return tuple(
            context_keys(heads[at * self.split], heads[(at + 1) * self.split - 1], offsets, longest)
            for at in range(self.layers)
        )


class LazyDecoder(CodeDecoder):
    """Context tokens (user, events) → keys and values → blocks that write codes."""

    supervision: ClassVar[Literal["every_position", "last_position"]] = "last_position"

    def __init__(
        self, config: LazyDecoderConfig, specs: tuple[TableSpec, ...], sizes: CatalogueSizes
    ) -> None:
        """Raises ValueError where the model wants actions and the data set has none."""
        super().__init__()
        self.config = config
        self.specs = specs
        self.codebook_sizes = sizes.codebook_sizes
        self.longest_history = config.history
        self.features = EventFeatures(config, specs, sizes, config.width)
        self.recencies = nn.Embedding(config.history, config.width)
        nn.init.normal_(self.recencies.weight, std=config.width**-0.5)
        self.processor = ContextProcessor(config)
        shape = BlockShape(
            width=config.width,
            num_heads=config.num_heads,
            kv_heads=config.kv_heads,
            inner=config.feedforward_width,
            dropout=config.dropout,
            cross_first=True,
        )
        experts = [
            None if at < config.dense_layers else config.experts for at in range(config.num_layers)
        ]
        self.writer = CodeWriter(sizes.codebook_sizes, 1, shape, experts, salt=1)

    def table_specs(self) -> tuple[TableSpec, ...]:
        return self.specs

    def encode(
        self,
        batch: JaggedBatch,
        embeddings: dict[str, Tensor],
        step_seed: int,
        positions: Literal["every", "last"],
    ) -> LazyContext:
        assert positions == "last", "supervised at its last position only"
        check_windows(batch, self.longest_history)
        token_dropout = request_dropout = None
        if self.training:
            token_dropout = token_keys(step_seed, 0, batch.sample_ids, batch.offsets)
            requests = repeated_offsets(batch.num_sequences, 1, batch.offsets.device)
            request_keys = token_keys(step_seed, 1, batch.sample_ids, requests)
            request_dropout = sub_keys(request_keys, self.writer.num_positions)
        tokens = self._event_tokens(batch, embeddings)
        parts = [(drop(tokens, token_dropout, self.config.dropout, 0), batch.offsets)]
        users = self.features.users(batch, embeddings)
        if users is not None:
            each = repeated_offsets(batch.num_sequences, 1, batch.offsets.device)
            parts.insert(0, (users.to(tokens.dtype), each))
        joined, offsets = concatenate(parts)
        longest = longest_sequence(offsets, self.longest_history + len(parts) - 1)
        return LazyContext(self.processor(joined, offsets, longest), request_dropout)

    def teacher_forced(self, context: LazyContext, codes: Tensor) -> list[Tensor]:
        logits: list[Tensor] = self.writer(codes, self._reads(context), context.dropout_keys)
        return logits

    def new_cache(self, context: LazyContext) -> BeamCache:
        keys = context.sets[0]
        return BeamCache(self.config.num_layers, keys.num_requests, keys.keys.device)

    def step(
        self, context: LazyContext, cache: BeamCache, level: int, tokens: Tensor | None
    ) -> Tensor:
        return self.writer.step(self._reads(context), cache, level, tokens)

    def expert_load(self) -> Tensor | None:
        return expert_load(self)

    def update_balance(self, global_load: Tensor) -> None:
        update_balance(self, global_load)

    def flops_per_token(self, mean_length: float) -> float:
        """As the base says; exact where all histories are `mean_length` tokens long."""
        context_tokens = mean_length + (1 if self.features.user_tables else 0)
        request = context_tokens * self.processor.network.flops_per_token()
        return (request + self.writer.flops(context_tokens)) / max(mean_length, 1.0)

    def _event_tokens(self, batch: JaggedBatch, embeddings: dict[str, Tensor]) -> Tensor:
        """Codes, what else the events carry, and how long ago they were: [T, D]."""
        tokens = self.writer.embedding.item_sums(batch)
        tokens = tokens + self.recencies(recency(batch.offsets, batch.num_tokens))
        features = self.features.events(batch, embeddings, last_request_times(batch))
        return tokens if features is None else tokens + features

    def _reads(self, context: LazyContext) -> list[ContextKeys]:
        """Block i reads set ⌊i·L_kv / blocks⌋."""
        config = self.config
        return [
            context.sets[at * config.kv_layers // config.num_layers]
            for at in range(config.num_layers)
        ]
