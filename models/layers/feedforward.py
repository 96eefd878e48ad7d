"""The gated feed-forward layer that decoders share.

Shape legend: ... any leading dimensions, D width, F inner width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedFeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): (SiLU(x W_gate) ⊙ x W_up) W_down, without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        nn.init.normal_(self.gate_up.weight, std=width**-0.5)
        nn.init.normal_(self.down.weight, std=inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return self.down(gated(self.gate_up(x)))

    def flops_per_token(self) -> float:
        """Forward FLOPs, multiply-adds counted as two."""
        return linear_flops(self.gate_up) + linear_flops(self.down)


def linear_flops(linear: nn.Linear) -> float:
    """Forward FLOPs per token. (ZeRO 3 empties weights; what a layer was built with stays.)"""
    return 2.0 * linear.in_features * linear.out_features


def gated(hidden: Tensor) -> Tensor:
    """SiLU of the first half of the last dimension times the second half: [..., 2F] → [..., F]."""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_matmul(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows of group e times `weights[e]`: [n, D] × [E, D, F] → [n, F].

    Args:
        x: rows sorted by group.
        weights: a matrix per group; a group without rows gets a zero gradient.
        ends: [E] int32, where each group's rows end; the last one is n.

    On CUDA one grouped kernel in bfloat16 without host synchronisation (in float32 PyTorch loops
    over groups and waits for `ends`); on the CPU a loop over groups, which is fastest there.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weights = x.to(dtype), weights.to(dtype)
    if device == "cuda" and x.shape[0] > 0:
        return F.grouped_mm(x, weights, offs=ends)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist() if x.shape[0] else [0] * len(weights)
    parts = zip(x.split(counts), weights.unbind(), strict=True)
    return torch.cat([rows @ weight for rows, weight in parts])
