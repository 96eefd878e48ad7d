"""HSTU ranking (arXiv 2402.17152, section 3; algorithms reference §2): what a user would do.

Shape legend: B sequences, T history tokens of all, C contextual tokens, S = C + longest history, G
candidates, D width, A labels, K outputs.
"""

import math

import torch
from torch import Tensor, nn

from configs.models import HSTURankingConfig
from models.base import RankingModel, TableSpec
from models.batch import JaggedBatch
from models.layers.norms import LAYER_NORM_EPS
from models.layers.ranking_heads import PScoreHead, TaskHead
from models.layers.stu_block import STUBlock, stu_block_flops
from models.layers.swish_mlp import SwishMLP
from models.ops.dropout import keyed_dropout, sub_keys, token_keys
from models.ops.hstu_attention import TIME_BUCKETS, time_buckets
from models.ops.jagged import jagged_to_padded, lengths_to_offsets, segment_ids

INPUT_SALT = 0


class HSTURanking(RankingModel):
    """Stack of STU layers over [user attributes | history with what was done | candidates]."""

    def __init__(
        self,
        config: HSTURankingConfig,
        specs: tuple[TableSpec, ...],
        max_length: int,
        num_labels: int,
        num_tasks: int,
        p_score: bool,
    ) -> None:
        """`max_length` events of a history, `num_labels` bits of an event's labels.

        Outputs are `num_tasks` logits, and the P-score's behind them with `p_score`.
        """
        super().__init__()
        self.config, self.specs, self.max_length = config, specs, max_length
        width, hidden = config.width, config.mlp_width
        names = [spec.name for spec in specs]
        self.user_tables = tuple(name for name in names if name.startswith("user_"))
        self.token_tables = tuple(name for name in names if not name.startswith("user_"))
        self.content = SwishMLP(width, hidden, width)
        self.context = nn.ModuleList(SwishMLP(width, hidden, width) for _ in self.user_tables)
        self.num_labels = num_labels
        self.action_rows = nn.Linear(num_labels, config.action_width, bias=False)
        self.actions = SwishMLP(config.action_width, hidden, width)
        self.placeholder = nn.Parameter(torch.empty(width))
        self.positions = nn.Embedding(max_length + 1, width)
        self.elapsed = nn.Embedding(TIME_BUCKETS, width)
        std = math.sqrt(1.0 / width)
        nn.init.normal_(self.action_rows.weight, std=std)
        nn.init.normal_(self.placeholder, std=std)
        for table in (self.positions, self.elapsed):
            nn.init.trunc_normal_(table.weight, std=std, a=-2 * std, b=2 * std)
        # A candidate sees at most context, history and itself; constant, so that a score depends
        # neither on who shares its batch nor on how many candidates there are.
        divisor = len(self.user_tables) + max_length + 1
        self.blocks = nn.ModuleList(
            STUBlock(config, divisor, salt=1 + layer) for layer in range(config.num_layers)
        )
        self.output_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.item_side = SwishMLP(width, hidden, width)
        head = PScoreHead if p_score else TaskHead
        self.head = head(width, config.head_width, num_tasks)

    def table_specs(self) -> tuple[TableSpec, ...]:
        return self.specs

    def forward(
        self,
        batch: JaggedBatch,
        embeddings: dict[str, Tensor],
        candidates: Tensor,
        longest: int,
        step_seed: int,
    ) -> Tensor:
        context, groups = len(self.user_tables), candidates.shape[1]
        back, there = self._places(batch, longest)
        keys = self._dropout_keys(batch, back, groups, step_seed) if self.training else None
        content = self.content(candidates)
        x = self._history(batch, embeddings, back, longest)
        now = self.positions.weight[0] + self.elapsed.weight[0]
        y = (content + self.placeholder) * math.sqrt(self.config.width) + now
        if keys is not None:
            x, y = (self._drop(part, key) for part, key in zip((x, y), keys, strict=True))
        present = torch.cat([there.new_ones(len(there), context), there], dim=1).to(x.dtype)
        index = torch.arange(context + longest, device=there.device)
        sees = (index[None, :] <= index[:, None]) | (index[:, None] < context)
        visible = (sees * present[:, None, :])[:, None]
        for layer, block in enumerate(self.blocks, 1):
            last = layer == len(self.blocks)
            x, y = block(x, y, visible, present[:, None, None], keys, candidates_only=last)
        # ⊙ of the user as the candidate met them and of the item by itself.
        logits: Tensor = self.head(self.output_norm(y) * self.item_side(candidates))
        return logits.float()

    def _places(self, batch: JaggedBatch, longest: int) -> tuple[Tensor, Tensor]:
        """Places [B, longest] counted back from the last history item, which is 1; and bool, where
        there is one."""
        index = torch.arange(longest, device=batch.offsets.device)
        back = batch.lengths[:, None] - index
        return back.clamp(min=0), back > 0

    def _history(
        self, batch: JaggedBatch, embeddings: dict[str, Tensor], back: Tensor, longest: int
    ) -> Tensor:
        """[B, S, D], context first."""
        rows = embeddings[self.token_tables[0]]
        for name in self.token_tables[1:]:
            rows = rows + embeddings[name]
        x = (self.content(rows) + self._done(batch)) * math.sqrt(self.config.width)
        ends = torch.cat([batch.next_timestamps, batch.next_timestamps.new_zeros(1)])
        requested = ends[(batch.offsets[1:] - 1).clamp(min=0)]
        waited = requested[segment_ids(batch.offsets, batch.num_tokens)] - batch.timestamps
        x = x + self.elapsed(time_buckets(waited))
        padded = jagged_to_padded(x, batch.offsets, longest) + self.positions(back)
        context = [
            mlp(embeddings[name]).unsqueeze(1) * math.sqrt(self.config.width)
            for name, mlp in zip(self.user_tables, self.context, strict=True)
        ]
        return torch.cat([*context, padded], dim=1)

    def _done(self, batch: JaggedBatch) -> Tensor:
        """[T, D] of what the user did at each event."""
        assert batch.labels is not None, "the data set's events carry labels"
        bits = torch.arange(self.num_labels, device=batch.labels.device)
        many_hot = (batch.labels[:, None] >> bits) & 1
        return self.actions(self.action_rows(many_hot.to(self.placeholder.dtype)))

    def _dropout_keys(
        self, batch: JaggedBatch, back: Tensor, groups: int, step_seed: int
    ) -> tuple[Tensor, Tensor]:
        """Keys [B, S] and [B, G]: by place from the request on, so that padding changes none."""
        ones = torch.ones_like(batch.sample_ids)
        own = token_keys(step_seed, 0, batch.sample_ids, lengths_to_offsets(ones))
        context = len(self.user_tables)
        keys = sub_keys(own, context + groups + back.shape[1])
        history = keys[:, context + groups :].gather(1, (back - 1).clamp(min=0))
        return (
            torch.cat([keys[:, :context], history], dim=1),
            keys[:, context : context + groups],
        )

    def _drop(self, x: Tensor, keys: Tensor) -> Tensor:
        flat = keyed_dropout(x.flatten(0, 1), keys.flatten(), self.config.dropout, INPUT_SALT)
        return flat.view(x.shape)

    def flops_per_token(self, mean_length: float) -> float:
        mlps = self.content.flops_per_token() + self.actions.flops_per_token()
        return mlps + len(self.blocks) * stu_block_flops(self.config, mean_length)
