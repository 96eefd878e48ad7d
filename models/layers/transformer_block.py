"""The pre-norm transformer layer of SASRec.

Shape legend: T total tokens, D width, H heads.
"""

from torch import Tensor, nn

from configs.models import SASRecConfig
from models.batch import JaggedBatch
from models.layers.attention import causal_attention
from models.ops.dropout import keyed_dropout


class TransformerBlock(nn.Module):
    """x + Attention(LN(x)), then x + FeedForward(LN(x)), dropout on both branches and inside."""

    def __init__(self, config: SASRecConfig, salt: int) -> None:
        super().__init__()
        width, inner = config.width, config.feedforward_width
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.salt = salt
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, inner)
        self.contract = nn.Linear(inner, width)
        for linear in (self.qkv, self.output, self.expand, self.contract):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, batch: JaggedBatch, dropout_keys: Tensor | None) -> Tensor:
        """[T, D] → [T, D]; `dropout_keys` [T] switch dropout on."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        attended = self.output(causal_attention(q, k, v, batch.offsets).flatten(1))
        x = x + self._drop(attended, dropout_keys, 0)
        hidden = self._drop(self.expand(self.feedforward_norm(x)).relu(), dropout_keys, 1)
        return x + self._drop(self.contract(hidden), dropout_keys, 2)

    def _drop(self, x: Tensor, dropout_keys: Tensor | None, site: int) -> Tensor:
        return (
            x
            if dropout_keys is None
            else keyed_dropout(x, dropout_keys, self.dropout, self.salt + site)
        )


def transformer_block_flops(config: SASRecConfig, mean_length: float) -> float:
    """Forward FLOPs per token; a token attends to (mean_length + 1) / 2 tokens on average."""
    width, inner = config.width, config.feedforward_width
    projections = 2 * width * 4 * width + 2 * width * 2 * inner
    return projections + 2 * 2 * width * (mean_length + 1) / 2
