"""The HSTU layer (arXiv 2402.17152, section 3): pointwise projection, SiLU attention, gating.

Shape legend: T total tokens, D width, H heads, N divisor and bias range of the attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.decoders import HSTUDecoderConfig
from configs.models import HSTUConfig
from models.batch import JaggedBatch
from models.layers.norms import plain_layer_norm
from models.ops.dropout import keyed_dropout
from models.ops.hstu_attention import TIME_BUCKETS, hstu_attention

INIT_STD = 0.02


class HSTUBlock(nn.Module):
    """W_o dropout(u ⊙ LN(attention(q, k, v))) + x, with [u, v, q, k] = SiLU(LN(x) W)."""

    def __init__(self, config: HSTUConfig | HSTUDecoderConfig, max_length: int, salt: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.widths = [
            config.num_heads * width
            for width in (config.v_width, config.v_width, config.qk_width, config.qk_width)
        ]
        self.max_length = max_length
        self.dropout = config.dropout
        self.salt = salt
        self.uvqk = nn.Parameter(torch.empty(config.width, sum(self.widths)))
        self.position_bias = nn.Parameter(torch.empty(2 * max_length - 1))
        self.time_bias = nn.Parameter(torch.empty(TIME_BUCKETS))
        self.output = nn.Linear(config.num_heads * config.v_width, config.width)
        for parameter in (self.uvqk, self.position_bias, self.time_bias):
            nn.init.normal_(parameter, std=INIT_STD)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, batch: JaggedBatch, dropout_keys: Tensor | None) -> Tensor:
        """[T, D] → [T, D]; `dropout_keys` [T] switch dropout on."""
        projected = F.silu(plain_layer_norm(x) @ self.uvqk)
        u, v, q, k = projected.split(self.widths, dim=-1)
        attended = hstu_attention(
            q.unflatten(-1, (self.num_heads, -1)),
            k.unflatten(-1, (self.num_heads, -1)),
            v.unflatten(-1, (self.num_heads, -1)),
            batch.offsets,
            batch.timestamps,
            batch.next_timestamps,
            self.position_bias,
            self.time_bias,
            self.max_length,
        )
        # The norm runs over all heads together, as the public model does.
        gated = u * plain_layer_norm(attended.flatten(1))
        if dropout_keys is not None:
            gated = keyed_dropout(gated, dropout_keys, self.dropout, self.salt)
        return self.output(gated) + x


def hstu_block_flops(config: HSTUConfig | HSTUDecoderConfig, mean_length: float) -> float:
    """Forward FLOPs per token; a token attends to (mean_length + 1) / 2 tokens on average."""
    qk_width, v_width = config.num_heads * config.qk_width, config.num_heads * config.v_width
    projections = 2 * config.width * (2 * qk_width + 2 * v_width) + 2 * v_width * config.width
    return projections + 2 * (qk_width + v_width) * (mean_length + 1) / 2
