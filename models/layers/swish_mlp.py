"""The two-layer network that HSTU ranking makes its inputs with.

Shape legend: ... any leading dimensions.
"""

import torch
from torch import Tensor, nn

from models.layers.feedforward import linear_flops
from models.layers.norms import LAYER_NORM_EPS


class SwishLayerNorm(nn.Module):
    """x ⊙ sigmoid(LN(x)), LN with scale and shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return x * torch.sigmoid(self.norm(x))


class SwishMLP(nn.Module):
    """Linear → SwishLN → Linear → LN (algorithms reference §2, content)."""

    def __init__(self, width: int, hidden: int, output: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, output)
        self.swish = SwishLayerNorm(hidden)
        self.norm = nn.LayerNorm(output, eps=LAYER_NORM_EPS)
        for linear in (self.first, self.second):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → [..., output]."""
        normed: Tensor = self.norm(self.second(self.swish(self.first(x))))
        return normed

    def flops_per_token(self) -> float:
        """Forward FLOPs, multiply-adds counted as two."""
        return linear_flops(self.first) + linear_flops(self.second)
