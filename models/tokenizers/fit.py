"""Fit the quantizer that a config names to a catalogue in one or many places."""

from typing import assert_never

import torch

from configs.tokenizers import ProductQuantizerConfig, ResidualKMeansConfig, RQVAEConfig
from configs.tokenizers import Quantizer as QuantizerConfig
from models.tokenizers.kmeans import Progress, no_progress
from models.tokenizers.product_quantizer import fit_product_quantizer
from models.tokenizers.quantizer import Quantizer
from models.tokenizers.residual_kmeans import fit_residual_kmeans
from models.tokenizers.rq_vae_training import fit_rq_vae
from models.tokenizers.shards import Shards, measure

SMALLEST, LARGEST = 1e-12, 1e12
"""Between them, float32 holds the squares that distances and their gradients are made of."""


def fit_quantizer(
    shards: Shards,
    width: int,
    config: QuantizerConfig,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Progress = no_progress,
) -> Quantizer:
    """Fit to the rows [N, `width`] of all shards; each shard's `codes` [n, L] are set.

    The result depends on no split of the catalogue over shards. It is on the CPU and frozen.

    Args:
        device: where an RQ-VAE trains; k-means computes where the shards are.
        progress: called after each step with (step, total steps, loss); a fit that settles early
            jumps ahead.

    Raises:
        ValueError: the config does not fit the data; the sentence says how to mend it.
    """
    largest = measure(shards).largest
    if largest and not SMALLEST <= largest <= LARGEST:
        raise ValueError(
            f"the largest number of the embeddings is {largest:.1e}, whose squares float32 does "
            "not hold well: scale them, or set normalize of tokenizer.embeddings to true"
        )
    model: Quantizer
    match config:
        case RQVAEConfig():
            model = fit_rq_vae(shards, width, config, device=device, seed=seed, progress=progress)
        case ResidualKMeansConfig():
            model = fit_residual_kmeans(shards, width, config, seed=seed, progress=progress)
        case ProductQuantizerConfig():
            model = fit_product_quantizer(shards, width, config, seed=seed, progress=progress)
        case _:
            assert_never(config)
    return model.cpu().eval().requires_grad_(False)
