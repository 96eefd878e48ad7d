"""Product quantization, with a learned rotation (OPQ) or without: digits that have no order.

The embedding is cut into L slices and each is coded by itself, so that all digits may be
predicted at once (RPG, arXiv 2506.05781). OPQ (Ge et al., CVPR 2013) turns the coordinates before,
so that slices carry alike and share little.

Shape legend: n rows, C rows of a block, m sampled rows, D width, L digits, W = D/L, K codes.
"""

import torch
from torch import Tensor, nn

from configs.tokenizers import ProductQuantizerConfig
from models.tokenizers.kmeans import Progress, fit_kmeans, no_progress
from models.tokenizers.nearest import by_blocks, costs, nearest, turned
from models.tokenizers.quantizer import Quantizer
from models.tokenizers.shards import LocalShards, Shard, Shards, keyed_sample, measure

START_ITERATIONS = 5
"""k-means iterations of a slice before the rotation first moves."""


class ProductQuantizer(Quantizer):
    """One codebook for each slice of the (rotated) embedding."""

    ordered = False

    def __init__(self, config: ProductQuantizerConfig, width: int) -> None:
        """Identity rotation and codebooks of zeros; fitting fills them.

        Raises:
            ValueError: the width cannot be cut into equal slices.
        """
        super().__init__()
        if width % config.num_levels:
            raise ValueError(
                f"embeddings of width {width} cannot be cut into num_levels={config.num_levels} "
                "equal slices; choose a divisor of the width"
            )
        self.config, self.width, self.codebook_sizes = config, width, config.codebook_sizes
        slice_width = width // config.num_levels
        self.rotation = nn.Parameter(torch.eye(width))
        self.codebooks = nn.ParameterList(
            [torch.zeros(size, slice_width) for size in config.codebook_sizes]
        )
        self.requires_grad_(False)

    def rotate(self, x: Tensor) -> Tensor:
        """Embeddings [n, D] in the coordinates that are sliced."""
        return by_blocks(lambda block: turned(block, self.rotation), x)

    def slices(self, x: Tensor) -> tuple[Tensor, ...]:
        """The L slices [C, W] of a block of embeddings [C, D]."""
        return turned(x, self.rotation).chunk(len(self.codebooks), dim=1)

    def _encode_block(self, x: Tensor) -> Tensor:
        pairs = zip(self.slices(x), self.codebooks, strict=True)
        return torch.stack([nearest(part, codebook) for part, codebook in pairs], dim=1)

    def _decode_block(self, codes: Tensor) -> Tensor:
        digits = zip(self.codebooks, codes.unbind(1), strict=True)
        pieces = torch.cat([codebook[digit] for codebook, digit in digits], dim=1)
        return turned(pieces, self.rotation.T)

    def _last_costs(self, x: Tensor, codes: Tensor) -> Tensor:
        return costs(self.slices(x)[-1], self.codebooks[-1])


def fit_product_quantizer(
    shards: Shards,
    width: int,
    config: ProductQuantizerConfig,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> ProductQuantizer:
    """Learn the rotation on a keyed sample, then each slice's codebook on all shards.

    Each shard's `codes` are its rows' codes afterwards.

    Raises:
        ValueError: the width cannot be cut, fewer rows than codes, or numbers that are not finite.
    """
    model = ProductQuantizer(config, width)
    extent = measure(shards)
    rounds = config.rotation_rounds if config.rotation else 0
    per_digit = config.iterations * config.restarts
    steps = rounds + config.num_levels * per_digit
    if config.rotation:
        count = max(*config.codebook_sizes, 64) * config.rows_per_code
        sample = keyed_sample(shards, count, extent.rows, seed)
        learn_rotation(model, sample, rounds, seed, lambda s, _, loss: progress(s, steps, loss))
    shards.map(rotate_rows, model)
    for digit, size in enumerate(config.codebook_sizes):

        def report(step: int, _: int, loss: float, digit: int = digit) -> None:
            progress(rounds + digit * per_digit + step, steps, loss)

        shards.map(start_slice, digit, config.num_levels)
        clusters = fit_kmeans(
            shards,
            size,
            iterations=config.iterations,
            restarts=config.restarts,
            rows_per_code=config.rows_per_code,
            seed=seed + digit,
            progress=report,
        )
        with torch.no_grad():
            model.codebooks[digit].copy_(clusters.centroids)
    shards.map(encode_shard, model)
    return model


def learn_rotation(
    model: ProductQuantizer, sample: Tensor, rounds: int, seed: int, progress: Progress
) -> None:
    """Alternate codes, codebooks and rotation on `sample` [m, D]; no step raises the error.

    Starts from the identity. With codes and codebooks fixed, the best rotation of min ‖XR − X̂‖ is
    U Vᵀ of the singular value decomposition U S Vᵀ = XᵀX̂ (orthogonal Procrustes).
    """
    digits = len(model.codebooks)
    with torch.no_grad():
        for digit, part in enumerate(model.rotate(sample).chunk(digits, dim=1)):
            shards, size = LocalShards.of(part.contiguous()), model.codebook_sizes[digit]
            clusters = fit_kmeans(shards, size, iterations=START_ITERATIONS, seed=seed + digit)
            model.codebooks[digit].copy_(clusters.centroids)
        for step in range(rounds):
            codes = model.encode(sample)
            rotated = model.rotate(sample)
            _move_codebooks(model, rotated, codes)
            rebuilt = torch.cat([b[c] for b, c in zip(model.codebooks, codes.T, strict=True)], 1)
            progress(step + 1, rounds, float((rotated - rebuilt).square().sum(1).mean()))
            left, _, right = torch.linalg.svd(sample.double().T @ rebuilt.double())
            model.rotation.copy_(left @ right)


def _move_codebooks(model: ProductQuantizer, rotated: Tensor, codes: Tensor) -> None:
    parts = rotated.chunk(len(model.codebooks), dim=1)
    for codebook, part, digit in zip(model.codebooks, parts, codes.T, strict=True):
        sums = torch.zeros_like(codebook).index_add_(0, digit, part)
        counts = torch.bincount(digit, minlength=len(codebook))[:, None]
        codebook.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), codebook))


def rotate_rows(shard: Shard, model: ProductQuantizer) -> None:
    """Task: keep the rotated embeddings for all slices to come."""
    shard.rotated = model.to(shard.rows.device).rotate(shard.rows)


def start_slice(shard: Shard, digit: int, digits: int) -> None:
    """Task: the next level quantizes this slice of the rotated embeddings."""
    shard.work = shard.rotated.chunk(digits, dim=1)[digit].contiguous()
    shard.labels.fill_(-1)


def encode_shard(shard: Shard, model: Quantizer) -> None:
    """Task: the frozen model's codes of the shard's rows; lets go of what fitting kept."""
    shard.codes = model.to(shard.rows.device).encode(shard.rows)
    shard.work = shard.rotated = shard.rows
