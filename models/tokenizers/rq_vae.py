"""RQ-VAE: an autoencoder whose latent is quantized by residuals (TIGER, arXiv 2305.05065, 3.1).

L = ‖x − D(z + sg[ẑ − z])‖² + Σ_l ‖sg[r_l] − e‖² + β ‖r_l − sg[e]‖², ẑ = Σ_l e_{c_l}, mean over
rows. r_{l+1} = r_l − sg[e_{c_l}]: every level's commitment pulls the encoder, and a codebook learns
from its own level alone.

Shape legend: B rows of a batch, C rows of a block, D width, W latent width, L levels, K codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from configs.tokenizers import RQVAEConfig
from models.tokenizers.kmeans import fit_kmeans
from models.tokenizers.nearest import by_blocks, costs
from models.tokenizers.residual_quantizer import ResidualQuantizer
from models.tokenizers.shards import LocalShards
from models.tokenizers.sinkhorn import spread_codes

START_ITERATIONS = 10


@dataclass(frozen=True)
class RQVAELoss:
    """Terms of a batch, each a scalar mean over rows."""

    reconstruction: Tensor
    codebook: Tensor
    commitment: Tensor
    codes: Tensor
    """[B, L] int64."""
    residuals: tuple[Tensor, ...]
    """What each level quantized, [B, W], detached."""

    def total(self, beta: float) -> Tensor:
        """What is minimised."""
        return self.reconstruction + self.codebook + beta * self.commitment


class RQVAE(ResidualQuantizer):
    """Encoder, codebooks and decoder."""

    config: RQVAEConfig

    def __init__(self, config: RQVAEConfig, width: int) -> None:
        super().__init__(width, config.code_width, config.codebook_sizes, normalize=False)
        self.config = config
        widths = (width, *config.hidden, config.code_width)
        self.encoder = _perceptron(widths)
        self.decoder = _perceptron(widths[::-1])
        self.center: Tensor
        self.scale: Tensor
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        self.usage = nn.ParameterList(
            [
                nn.Parameter(torch.full((k,), 1 / k), requires_grad=False)
                for k in self.codebook_sizes
            ]
        )
        """Running share of rows that each code of a level got."""

    def latent(self, x: Tensor) -> Tensor:
        """z [C, W] of embeddings [C, D]."""
        return self.encoder((x - self.center) / self.scale)

    def output(self, z: Tensor) -> Tensor:
        """Embeddings [C, D] of latents [C, W]."""
        return self.decoder(z) * self.scale + self.center

    def forward(self, x: Tensor) -> RQVAELoss:
        """Loss terms of `x` [B, D], whose coordinates are brought to mean square one before."""
        target = (x - self.center) / self.scale
        z = self.encoder(target)
        residual, quantized = z, torch.zeros_like(z)
        codes, residuals, codebook, commitment = [], [], z.new_zeros(()), z.new_zeros(())
        for level, vectors in enumerate(self.codebooks):
            chosen = self.assign(residual.detach(), level)
            embedding = vectors[chosen]
            codebook = codebook + _mean_square(residual.detach() - embedding)
            commitment = commitment + _mean_square(residual - embedding.detach())
            codes.append(chosen)
            residuals.append(residual.detach())
            quantized = quantized + embedding.detach()
            residual = residual - embedding.detach()
        straight_through = z + (quantized - z).detach()
        reconstruction = _mean_square(target - self.decoder(straight_through))
        all_codes = torch.stack(codes, dim=1)
        return RQVAELoss(reconstruction, codebook, commitment, all_codes, tuple(residuals))

    @torch.no_grad()
    def assign(self, residual: Tensor, level: int) -> Tensor:
        """Codes [B] of residuals [B, W] in training: nearest, or spread on the last level."""
        vectors, sinkhorn = self.codebooks[level], self.config.sinkhorn
        half = costs(residual, vectors, middle=torch.zeros_like(vectors[0]))  # latents are centred
        if sinkhorn is None or level < len(self.codebooks) - 1:
            return half.argmin(1)
        distances = (2 * half + residual.square().sum(1, keepdim=True)).clamp(min=0)
        return spread_codes(distances, sinkhorn.epsilon, sinkhorn.iterations)

    @torch.no_grad()
    def fit_scale(self, rows: Tensor) -> None:
        """Centre and scale of the data from `rows` [m, D]."""
        self.center.copy_(rows.mean(0))
        spread = (rows - self.center).square().mean().sqrt()
        self.scale.copy_(spread if float(spread) > 0 else torch.ones(()))

    @torch.no_grad()
    def start_codebooks(self, rows: Tensor, seed: int) -> None:
        """Codebooks by k-means of what each level sees of `rows` [m, D].

        Raises:
            ValueError: fewer rows than codes of a level.
        """
        residual = by_blocks(self.latent, rows)
        for level, size in enumerate(self.codebook_sizes):
            shards = LocalShards.of(residual)
            clusters = fit_kmeans(shards, size, iterations=START_ITERATIONS, seed=seed + level)
            self.codebooks[level].copy_(clusters.centroids)
            residual = residual - self.codebooks[level][shards.shards[0].labels]

    def plain_loss(self, x: Tensor) -> Tensor:
        """Mean ‖x − D(E(x))‖² of `x` [B, D], without codes: what the warm-up minimises."""
        target = (x - self.center) / self.scale
        return _mean_square(target - self.decoder(self.encoder(target)))

    @torch.no_grad()
    def track_usage(self, codes: Tensor) -> None:
        """Update the running use of codes by those of a batch, [B, L]."""
        decay = self.config.usage_decay
        for level, usage in enumerate(self.usage):
            ones = torch.full_like(codes[:, level], 1 / len(codes), dtype=usage.dtype)
            share = torch.zeros_like(usage).index_add_(0, codes[:, level], ones)
            usage.mul_(decay).add_(share, alpha=1 - decay)

    @torch.no_grad()
    def revive(self, residuals: Sequence[Tensor], draws: Sequence[Tensor]) -> None:
        """Move dead codes to residuals of the batch and count them as evenly used.

        Args:
            residuals: what each level quantized, [B, W] each.
            draws: for each level int64 [K], which row of the batch each code would take.
        """
        for level, (usage, rows) in enumerate(zip(self.usage, draws, strict=True)):
            dead = usage < self.config.dead_code_threshold / len(usage)
            vectors = self.codebooks[level]
            vectors.copy_(torch.where(dead[:, None], residuals[level][rows], vectors))
            usage.copy_(torch.where(dead, torch.full_like(usage, 1 / len(usage)), usage))


def _perceptron(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().sum(1).mean()
