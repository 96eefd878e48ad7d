"""Residual k-means, plain (arXiv 2506.13695) or with equal sizes (arXiv 2502.18965).

Shape legend: n rows of a shard, D width, L levels, K codes.
"""

import math

import torch
from torch import Tensor

from configs.tokenizers import ResidualKMeansConfig
from models.layers.norms import l2_normalize
from models.tokenizers.balanced import fit_balanced
from models.tokenizers.exact_sums import grid_step, on_grid
from models.tokenizers.kmeans import Clusters, Progress, fit_kmeans, no_progress
from models.tokenizers.residual_quantizer import ResidualQuantizer
from models.tokenizers.shards import Shard, Shards, measure


class ResidualKMeans(ResidualQuantizer):
    """k-means of embeddings, then of what is left, level by level."""

    def __init__(self, config: ResidualKMeansConfig, width: int) -> None:
        super().__init__(width, width, config.codebook_sizes, config.normalize_residuals)
        self.config = config
        self.requires_grad_(False)

    def latent(self, x: Tensor) -> Tensor:
        """The embedding itself."""
        return x

    def output(self, z: Tensor) -> Tensor:
        """The sum of centroids itself."""
        return z


def fit_residual_kmeans(
    shards: Shards,
    width: int,
    config: ResidualKMeansConfig,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> ResidualKMeans:
    """Fit level by level; each shard's `codes` are its rows' codes afterwards.

    With `balanced` those codes are exactly balanced, while `encode` gives the cheapest codes under
    the fitted prices, which new items take (even in the mean, not exactly).

    Raises:
        ValueError: fewer rows than codes, or numbers that are not finite.
    """
    model = ResidualKMeans(config, width)
    steps = config.iterations * config.restarts
    if config.balanced:
        steps = config.iterations + 1
    shards.map(start_levels)
    for level, size in enumerate(config.codebook_sizes):
        if config.normalize_residuals:
            model.lengths[level] = _normalize(shards)

        def report(step: int, _: int, loss: float, level: int = level) -> None:
            progress(level * steps + step, config.num_levels * steps, loss)

        clusters = _fit_level(shards, size, config, seed + level, report)
        _fill(model.codebooks[level], clusters.centroids)
        _fill(model.prices[level], clusters.prices)
        shards.map(finish_level, clusters.centroids)
    shards.map(end_levels)
    return model


def _fit_level(
    shards: Shards, size: int, config: ResidualKMeansConfig, seed: int, progress: Progress
) -> Clusters:
    if config.balanced:
        return fit_balanced(
            shards,
            size,
            iterations=config.iterations,
            price_rounds=config.price_rounds,
            rows_per_code=config.rows_per_code,
            seed=seed,
            progress=progress,
        )
    return fit_kmeans(
        shards,
        size,
        iterations=config.iterations,
        restarts=config.restarts,
        rows_per_code=config.rows_per_code,
        seed=seed,
        progress=progress,
    )


def _fill(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)


def _normalize(shards: Shards) -> float:
    """Scale every row of `work` to length one; the mean length before."""
    extent = measure(shards)
    step = grid_step(extent.largest * math.sqrt(extent.width), extent.rows)
    return math.fsum(shards.map(normalize_work, step)) / extent.rows


def normalize_work(shard: Shard, step: float) -> float:
    """Task: scale rows of `work` to length one; the sum of their lengths, exact on the grid."""
    lengths = torch.linalg.vector_norm(shard.work, dim=1)
    shard.work = l2_normalize(shard.work)
    return float(on_grid(lengths, step).sum())


def start_levels(shard: Shard) -> None:
    """Task: the first level quantizes the embeddings; no codes yet."""
    shard.work, shard.codes = shard.rows, shard.codes[:, :0]
    shard.labels.fill_(-1)


def finish_level(shard: Shard, centroids: Tensor) -> None:
    """Task: keep the level's codes; what they left over is the next level's `work`."""
    shard.codes = torch.cat([shard.codes, shard.labels[:, None]], dim=1)
    shard.work = shard.work - centroids.to(shard.work.device)[shard.labels]
    shard.labels.fill_(-1)


def end_levels(shard: Shard) -> None:
    """Task: let go of the residuals."""
    shard.work = shard.rows
