"""Quantization of residuals: each level codes what the levels before it left over.

r_1 = z; c_l = argmin_k ‖r_l − e_k^l‖; r_{l+1} = r_l − e_{c_l} (arXiv 2305.05065, section 3.1).

Shape legend: n rows, C rows of a block, D width, W width of what is quantized, L levels, K codes.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from models.layers.norms import l2_normalize
from models.tokenizers.nearest import costs
from models.tokenizers.quantizer import Quantizer


class ResidualQuantizer(Quantizer):
    """Codebooks of L levels over a latent z of the embedding."""

    ordered = True

    def __init__(self, width: int, latent_width: int, sizes: tuple[int, ...], normalize: bool):
        """Codebooks of zeros; fitting fills them.

        Args:
            width: D of embeddings.
            latent_width: W of the latent.
            sizes: K of each level.
            normalize: scale each residual to length one before its level; `decode` then undoes it
                with the mean length of the level, since codes do not say an item's own.
        """
        super().__init__()
        self.width, self.codebook_sizes, self.normalize = width, sizes, normalize
        self.codebooks = nn.ParameterList([torch.zeros(size, latent_width) for size in sizes])
        self.lengths: Tensor
        self.register_buffer("lengths", torch.ones(len(sizes)))
        self.prices = nn.ParameterList(
            [nn.Parameter(torch.zeros(size), requires_grad=False) for size in sizes]
        )
        """Added to costs by level; zero unless sizes were balanced."""

    @abstractmethod
    def latent(self, x: Tensor) -> Tensor:
        """z [C, W] of embeddings [C, D]."""

    @abstractmethod
    def output(self, z: Tensor) -> Tensor:
        """Embeddings [C, D] of latents [C, W]."""

    def scaled(self, residual: Tensor) -> Tensor:
        """The residual [C, W] as its level sees it."""
        return l2_normalize(residual) if self.normalize else residual

    def _encode_block(self, x: Tensor) -> Tensor:
        residual, codes = self.latent(x), []
        for codebook, prices in zip(self.codebooks, self.prices, strict=True):
            residual = self.scaled(residual)
            codes.append(costs(residual, codebook, prices).argmin(1))
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, dim=1)

    def _decode_block(self, codes: Tensor) -> Tensor:
        z = torch.zeros(len(codes), self.codebooks[0].shape[1], device=codes.device)
        for level in reversed(range(len(self.codebooks))):
            z = (z + self.codebooks[level][codes[:, level]]) * self.lengths[level]
        return self.output(z)

    def _last_costs(self, x: Tensor, codes: Tensor) -> Tensor:
        residual = self.latent(x)
        for level, codebook in enumerate(list(self.codebooks)[:-1]):
            residual = self.scaled(residual) - codebook[codes[:, level]]
        return costs(self.scaled(residual), self.codebooks[-1], self.prices[-1])
