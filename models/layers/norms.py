"""Normalisations."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ops.rms_norm import rms_norm

LAYER_NORM_EPS = 1e-6
NORM_FLOOR = 1e-6


def l2_normalize(x: Tensor) -> Tensor:
    """`x` [..., D] over its Euclidean length (at least 1e-6), in float32; zero rows stay zero."""
    x = x.float()
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=NORM_FLOOR)


def plain_layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a scale, as T5 and the decoders of OneRec have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return rms_norm(x, self.weight, LAYER_NORM_EPS)
