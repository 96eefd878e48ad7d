"""Blocks of T5's encoder and decoder (arXiv 1910.10683): pre-RMSNorm, no biases, ReLU.

Differences to the paper: logits are divided by √Dh, with weights that start larger by as much. At
the start both are the same function, but T5's smaller weights need an optimizer that scales its
steps by the weights (Adafactor); under Adam ours train like any other transformer. As in our other
models there is no dropout on attention weights.

Shape legend: N requests, P code positions, W beams, T total history tokens, D width, H heads.
"""

from torch import Tensor, nn

from configs.decoders import TIGERConfig
from models.layers.decoder_attention import (
    CodeSelfAttention,
    ContextAttention,
    ContextKeys,
    SelfAttentionCache,
)
from models.layers.norms import RMSNorm
from models.ops.dropout import keyed_dropout, keyed_relu_dropout
from models.ops.relative_attention import relative_attention

ENCODER_SITES = 3
"""Dropout sites of an encoder block."""
DECODER_SITES = 4


class FeedForward(nn.Module):
    """dropout(ReLU(x W_in)) W_out; two dropout sites, the second is the branch's."""

    def __init__(self, width: int, inner: int, dropout: float, salt: int) -> None:
        super().__init__()
        self.dropout, self.salt = dropout, salt
        self.expand = nn.Linear(width, inner, bias=False)
        self.contract = nn.Linear(inner, width, bias=False)
        nn.init.normal_(self.expand.weight, std=width**-0.5)
        nn.init.normal_(self.contract.weight, std=inner**-0.5)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """[..., D] → [..., D]; `keys` [...] switch dropout on."""
        hidden = self.expand(x)
        if keys is None:
            hidden = hidden.relu_()  # the product's backward does not read its result
        else:
            hidden = hidden.flatten(0, -2)
            hidden = keyed_relu_dropout(hidden, keys.flatten(), self.dropout, self.salt)
            hidden = hidden.unflatten(0, keys.shape)
        return dropped(self.contract(hidden), keys, self.dropout, self.salt + 1)

    def flops(self) -> float:
        """Forward FLOPs per token."""
        return 2.0 * (self.expand.weight.numel() + self.contract.weight.numel())


class EncoderBlock(nn.Module):
    """x + Attention(norm(x)), then x + FeedForward(norm(x)), over jagged tokens."""

    def __init__(self, config: TIGERConfig, salt: int) -> None:
        super().__init__()
        width, inner = config.width, config.num_heads * config.head_width
        self.num_heads, self.dropout, self.salt = config.num_heads, config.dropout, salt
        self.attention_norm = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)
        self.feedforward_norm = RMSNorm(width)
        self.feedforward = FeedForward(width, config.feedforward_width, config.dropout, salt + 1)
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.output.weight, std=inner**-0.5)

    def forward(
        self, x: Tensor, bias: Tensor, offsets: Tensor, longest: int, keys: Tensor | None
    ) -> Tensor:
        """[T, D] → [T, D]; `bias` [H, 2 longest - 1]; `keys` [T] switch dropout on."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        attended = relative_attention(qkv, bias, offsets, longest).flatten(1)
        x = x + dropped(self.output(attended), keys, self.dropout, self.salt)
        return x + self.feedforward(self.feedforward_norm(x), keys)

    def flops(self, mean_length: float) -> float:
        """Forward FLOPs of a token that sees `mean_length` tokens."""
        inner = self.output.weight.shape[1]
        projections = 2 * (self.qkv.weight.numel() + self.output.weight.numel())
        return projections + 2 * 2 * inner * mean_length + self.feedforward.flops()


class DecoderBlock(nn.Module):
    """Causal attention over the codes so far, attention to the context, feed-forward."""

    def __init__(self, config: TIGERConfig, salt: int) -> None:
        super().__init__()
        width, heads, head_width = config.width, config.num_heads, config.head_width
        self.dropout, self.salt = config.dropout, salt
        self.self_norm, self.context_norm, self.feedforward_norm = (
            RMSNorm(width) for _ in range(3)
        )
        self.self_attention = CodeSelfAttention(width, heads, head_width)
        self.context_attention = ContextAttention(width, heads, head_width)
        self.feedforward = FeedForward(width, config.feedforward_width, config.dropout, salt + 2)

    def forward(self, x: Tensor, context: ContextKeys, bias: Tensor, keys: Tensor | None) -> Tensor:
        """All positions at once, [N, P, D] → [N, P, D]; `bias` [H, P, P], `keys` [N, P]."""
        attended = self.self_attention(self.self_norm(x), bias)
        x = x + dropped(attended, keys, self.dropout, self.salt)
        return self._read(x, context, keys)

    def step(
        self, x: Tensor, context: ContextKeys, cache: SelfAttentionCache, layer: int, bias: Tensor
    ) -> Tensor:
        """The newest position p of each beam, [N, W, D] → [N, W, D]; `bias` [H, p + 1]."""
        x = x + self.self_attention.step(self.self_norm(x), cache, layer, bias)
        return self._read(x, context, None)

    def flops(self, positions: int) -> float:
        """Forward FLOPs per request, without the products with context tokens."""
        attention = self.self_attention.flops(positions)
        return attention + positions * (self.context_attention.flops(0) + self.feedforward.flops())

    def _read(self, x: Tensor, context: ContextKeys, keys: Tensor | None) -> Tensor:
        read = self.context_attention(self.context_norm(x), context)
        x = x + dropped(read, keys, self.dropout, self.salt + 1)
        return x + self.feedforward(self.feedforward_norm(x), keys)


def dropped(x: Tensor, keys: Tensor | None, p: float, salt: int) -> Tensor:
    """Keyed dropout of `x` [..., C] with `keys` [...]; without keys `x` itself."""
    if keys is None:
        return x
    flat = keyed_dropout(x.flatten(0, keys.dim() - 1), keys.flatten(), p, salt)
    return flat.view(x.shape)
