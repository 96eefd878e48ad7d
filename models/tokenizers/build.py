"""From a tokenizer's config to a quantizer: fresh, fitted, and to files and back.

A saved quantizer is `quantizer.safetensors` (tensors, no code) and `quantizer.json`, which is
written last and holds the config, the width and the hash of the tensors.
"""

from typing import assert_never

import safetensors
import safetensors.torch
from pydantic import TypeAdapter, ValidationError

from configs import storage
from configs.tokenizers import (
    ProductQuantizerConfig,
    ResidualKMeansConfig,
    RQVAEConfig,
)
from configs.tokenizers import Quantizer as QuantizerConfig
from models.tokenizers.kmeans import Progress, no_progress
from models.tokenizers.product_quantizer import ProductQuantizer, fit_product_quantizer
from models.tokenizers.quantizer import Quantizer
from models.tokenizers.residual_kmeans import ResidualKMeans, fit_residual_kmeans
from models.tokenizers.rq_vae import RQVAE
from models.tokenizers.rq_vae_training import fit_rq_vae
from models.tokenizers.shards import Shards

FORMAT = 1
TENSORS, DESCRIPTION = "quantizer.safetensors", "quantizer.json"
MEND = "run `tandem tokenize RECIPE --force`"


def build_quantizer(config: QuantizerConfig, width: int) -> Quantizer:
    """An unfitted quantizer of embeddings of `width` numbers.

    Raises:
        ValueError: the config does not fit the width.
    """
    match config:
        case RQVAEConfig():
            return RQVAE(config, width)
        case ResidualKMeansConfig():
            return ResidualKMeans(config, width)
        case ProductQuantizerConfig():
            return ProductQuantizer(config, width)
        case _:
            assert_never(config)


def fit_quantizer(
    config: QuantizerConfig,
    shards: Shards,
    width: int,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Quantizer:
    """Fit to the rows of all shards; each shard's `codes` [n, L] are set (fetch: `take_codes`).

    The result depends on no split of the catalogue over shards.

    Raises:
        ValueError: the config does not fit the data; the sentence says how to mend it.
    """
    match config:
        case RQVAEConfig():
            return fit_rq_vae(shards, width, config, seed=seed, progress=progress)
        case ResidualKMeansConfig():
            return fit_residual_kmeans(shards, width, config, seed=seed, progress=progress)
        case ProductQuantizerConfig():
            return fit_product_quantizer(shards, width, config, seed=seed, progress=progress)
        case _:
            assert_never(config)


def save_quantizer(model: Quantizer, config: QuantizerConfig, url: str) -> str:
    """Write a fitted quantizer below `url`; returns the hash of its description and tensors."""
    state = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    tensors = safetensors.torch.save(state)
    description = {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "width": model.width,
        "sha256": storage.sha256_bytes(tensors),
    }
    storage.write_bytes(storage.join(url, TENSORS), tensors)
    storage.write_json(storage.join(url, DESCRIPTION), description)
    return storage.fingerprint(description)


def load_quantizer(url: str) -> tuple[Quantizer, QuantizerConfig]:
    """The quantizer that was saved below `url`, frozen, and its config.

    Raises:
        ValueError: nothing is there, or it is damaged or of another format.
    """
    place = storage.join(url, DESCRIPTION)
    try:
        description = storage.read_json(place)
        tensors = storage.read_bytes(storage.join(url, TENSORS))
    except FileNotFoundError as error:
        raise ValueError(f"there is no whole tokenizer at {url}; {MEND}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{place} is not a tokenizer of format {FORMAT}; {MEND}")
    if storage.sha256_bytes(tensors) != description.get("sha256"):
        raise ValueError(f"{storage.join(url, TENSORS)} is damaged (its hash differs); {MEND}")
    adapter: TypeAdapter[QuantizerConfig] = TypeAdapter(QuantizerConfig)
    try:
        config = adapter.validate_python(description["config"], strict=False)
        model = build_quantizer(config, int(description["width"]))
        model.load_state_dict(safetensors.torch.load(tensors))
    except (ValidationError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{place} does not describe its tensors; {MEND}") from error
    return model.eval().requires_grad_(False), config
