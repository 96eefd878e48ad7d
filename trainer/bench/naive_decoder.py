"""The naive decoder-only generative recommender: history and codes in one causal sequence.

What OneRec-V2 (arXiv 2508.20900, section 3) measures its lazy decoder against: every history token
passes every block. For benches; it reads and writes as the other decoders do.

Shape legend: N requests, S events of each history, L code levels, P = S + L tokens, D width,
H heads, K_l codes of level l.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.code_embedding import CodeEmbedding
from models.layers.feedforward import GatedFeedForward, linear_flops
from models.layers.norms import RMSNorm


class NaiveBlock(nn.Module):
    """x + causal attention of the normed x, then x + feed-forward."""

    def __init__(self, width: int, num_heads: int, inner: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.feedforward_norm = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.feedforward = GatedFeedForward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        """[N, P, D] → [N, P, D]."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [N, H, P, D / H] each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.feedforward(self.feedforward_norm(x))


class NaiveDecoder(nn.Module):
    """[events, BOS, s_1, …] → blocks → a head a level; supervised at the newest item alone."""

    def __init__(
        self,
        codebook_sizes: tuple[int, ...],
        history: int,
        width: int,
        num_layers: int,
        num_heads: int,
        inner: int,
    ) -> None:
        super().__init__()
        self.history, self.width, self.levels = history, width, len(codebook_sizes)
        self.embedding = CodeEmbedding(codebook_sizes, width, width**-0.5)
        self.places = nn.Embedding(history + self.levels, width)
        self.blocks = nn.ModuleList(NaiveBlock(width, num_heads, inner) for _ in range(num_layers))
        self.norm = RMSNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, size, bias=False) for size in codebook_sizes)

    def forward(self, events: Tensor, codes: Tensor) -> list[Tensor]:
        """Histories' codes [N, S, L] and the item's codes [N, L] → L tensors [N, K_l].

        Every history has S events.
        """
        history = self.embedding(events).sum(2)
        written = F.pad(self.embedding(codes[:, :-1]), (0, 0, self.history, 0, 0, 0))
        x = F.pad(history, (0, 0, 0, self.levels)) + F.pad(written, (0, 0, 1, 0))
        x = x + self.places.weight
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, self.history :])
        return [head(x[:, level]) for level, head in enumerate(self.heads)]

    def flops(self) -> float:
        """Forward FLOPs of a request."""
        tokens = self.history + self.levels
        heads = [head for head in self.heads if isinstance(head, nn.Linear)]
        total = sum(linear_flops(head) for head in heads)
        for block in self.blocks:
            assert isinstance(block, NaiveBlock)
            each = linear_flops(block.qkv) + linear_flops(block.output)
            total += tokens * (each + block.feedforward.flops_per_token())
            total += 4.0 * self.width * tokens * (tokens + 1) / 2
        return total
