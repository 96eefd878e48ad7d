"""Small clustered data for the tests of tokenizers."""

import torch
from torch import Tensor


def clouds(rows: int, width: int, centers: int, seed: int, noise: float = 0.3) -> Tensor:
    """`rows` points [n, D] float32 around `centers` random centres, of unequal popularity."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centers, width, generator=generator)
    which = (torch.rand(rows, generator=generator).square() * centers).long()
    return middle[which] + noise * torch.randn(rows, width, generator=generator)
