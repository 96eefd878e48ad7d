"""What OneRec-V1's encoder is made of (arXiv 2506.13695, section 2.2).

Shape legend: N requests, T tokens, D width, H heads, Dh head width, q learned queries, S longest
sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch import JaggedBatch
from models.layers.code_writer import drop
from models.layers.decoder_attention import (
    ContextAttention,
    KeyValueProjection,
    context_keys,
)
from models.layers.feedforward import GatedFeedForward, linear_flops
from models.layers.norms import RMSNorm
from models.ops.jagged_attention import jagged_self_attention

ENCODER_SITES = 2
"""Dropout sites of an `EncoderBlock`."""
COMPRESSION_SITES = 2
"""Dropout sites of a `CompressionBlock`."""


class PathwayNetwork(nn.Module):
    """Dense(LeakyReLU(Dense(x))): what a pathway's embeddings pass."""

    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, inner)
        self.contract = nn.Linear(inner, out)
        for linear in (self.expand, self.contract):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] → [T, out]."""
        return self.contract(F.leaky_relu(self.expand(x)))

    def flops_per_token(self) -> float:
        """Forward FLOPs, multiply-adds counted as two."""
        return linear_flops(self.expand) + linear_flops(self.contract)


class EncoderBlock(nn.Module):
    """x + attention of every token to every token of its request, then x + feed-forward."""

    def __init__(self, width: int, num_heads: int, inner: int, dropout: float, salt: int) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.salt = num_heads, dropout, salt
        self.attention_norm, self.feedforward_norm = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.feedforward = GatedFeedForward(width, inner)
        for linear in (self.qkv, self.output):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(
        self, x: Tensor, offsets: Tensor, longest: int, dropout_keys: Tensor | None
    ) -> Tensor:
        """[T, D] → [T, D]; `offsets` [N + 1], no sequence longer than `longest`."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        attended = jagged_self_attention(qkv, offsets, max(longest, 1)).flatten(1)
        x = x + drop(self.output(attended), dropout_keys, self.dropout, self.salt)
        hidden = self.feedforward(self.feedforward_norm(x))
        return x + drop(hidden, dropout_keys, self.dropout, self.salt + 1)

    def flops_per_token(self, seen: float) -> float:
        """Forward FLOPs of a token that sees `seen` tokens."""
        width = self.output.in_features
        return 8.0 * width * width + 4.0 * width * seen + self.feedforward.flops_per_token()


class CompressionBlock(nn.Module):
    """Queries read the long history, then pass a feed-forward layer."""

    def __init__(self, width: int, num_heads: int, inner: int, dropout: float, salt: int) -> None:
        super().__init__()
        self.dropout, self.salt = dropout, salt
        self.reading_norm, self.feedforward_norm = RMSNorm(width), RMSNorm(width)
        self.reading = ContextAttention(width, num_heads, width // num_heads)
        self.history = KeyValueProjection(width, num_heads, width // num_heads)
        self.feedforward = GatedFeedForward(width, inner)

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        offsets: Tensor,
        longest: int,
        dropout_keys: Tensor | None,
    ) -> Tensor:
        """[N, q, D] → [N, q, D]; reads tokens [T, D] at offsets [N + 1]."""
        keys, values = self.history(tokens)
        read = context_keys(keys, values, offsets, longest)
        x = self.reading(self.reading_norm(queries), read)
        queries = queries + drop(x, dropout_keys, self.dropout, self.salt)
        x = self.feedforward(self.feedforward_norm(queries))
        return queries + drop(x, dropout_keys, self.dropout, self.salt + 1)

    def flops(self, queries: int, tokens: float) -> float:
        """Forward FLOPs of a request."""
        each = self.reading.flops(tokens) + self.feedforward.flops_per_token()
        return queries * each + tokens * linear_flops(self.history.projection)


class HistoryCompressor(nn.Module):
    """Learned queries that stand for a long history (the QFormer of section 2.2.4)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        inner: int,
        dropout: float,
        num_queries: int,
        num_layers: int,
        salt: int,
    ) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.queries = nn.Parameter(torch.randn(num_queries, width) * width**-0.5)
        self.blocks = nn.ModuleList(
            CompressionBlock(width, num_heads, inner, dropout, salt + at * COMPRESSION_SITES)
            for at in range(num_layers)
        )

    def forward(
        self, tokens: Tensor, offsets: Tensor, longest: int, dropout_keys: Tensor | None
    ) -> Tensor:
        """Histories tokens [T, D] at offsets [N + 1] → [N, q, D]; `dropout_keys` [N, q]."""
        x = self.queries.expand(offsets.numel() - 1, -1, -1)
        for block in self.blocks:
            x = block(x, tokens, offsets, longest, dropout_keys)
        return x

    def flops(self, tokens: float) -> float:
        """Forward FLOPs of a request whose long history has `tokens` events."""
        blocks = [block for block in self.blocks if isinstance(block, CompressionBlock)]
        return sum(block.flops(self.num_queries, tokens) for block in blocks)


def check_windows(batch: JaggedBatch, longest: int) -> None:
    """Raise ValueError for a sequence of more events than the model reads.

    Only where lengths can be read without stalling an accelerator; there the lookup itself fails.
    """
    if batch.offsets.device.type != "cpu" or batch.num_sequences == 0:
        return
    found = int(batch.lengths.max())
    if found > longest:
        raise ValueError(
            f"a history of {found} events exceeds the {longest} that the model reads; cut it into "
            "windows (models.ops.windows.sliding_windows) or raise model.history"
        )
