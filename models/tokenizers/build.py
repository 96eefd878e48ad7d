"""From a config to a quantizer, and to files and back.

A saved quantizer is `quantizer.safetensors` (tensors, no code) and `quantizer.json`, which is
written last and holds the config, the width and the hash of the tensors.
"""

import json
from typing import assert_never

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter
from torch import Tensor

from configs import storage
from configs.tokenizers import (
    ProductQuantizerConfig,
    ResidualKMeansConfig,
    RQVAEConfig,
)
from configs.tokenizers import Quantizer as QuantizerConfig
from models.tokenizers.product_quantizer import ProductQuantizer
from models.tokenizers.quantizer import Quantizer
from models.tokenizers.residual_kmeans import ResidualKMeans
from models.tokenizers.rq_vae import RQVAE

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


def save_quantizer(model: Quantizer, url: str) -> str:
    """Write a fitted quantizer below `url`; returns the hash of its description and tensors."""
    state = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    tensors = safetensors.torch.save(state)
    description = {
        "format": FORMAT,
        "config": model.config.model_dump(mode="json"),
        "width": model.width,
        "sha256": storage.sha256_bytes(tensors),
    }
    storage.write_bytes(storage.join(url, TENSORS), tensors)
    storage.write_json(storage.join(url, DESCRIPTION), description)
    return storage.fingerprint(description)


def load_quantizer(url: str) -> Quantizer:
    """The quantizer that was saved below `url`, on the CPU and frozen.

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
        config = adapter.validate_json(json.dumps(description["config"]))
        model = _with_tensors(config, description["width"], safetensors.torch.load(tensors))
    except (
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,  # pydantic's too
        safetensors.SafetensorError,
    ) as error:
        raise ValueError(f"{place} does not describe its tensors; {MEND}") from error
    return model.eval().requires_grad_(False)


def _with_tensors(config: QuantizerConfig, width: object, tensors: dict[str, Tensor]) -> Quantizer:
    """Raises ValueError before anything is allocated that the tensors do not have."""
    if type(width) is not int or width < 1:
        raise ValueError(f"width {width!r} is no number of columns")
    with torch.device("meta"):
        expected = build_quantizer(config, width).state_dict()
    if {name: (t.shape, t.dtype) for name, t in expected.items()} != {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }:
        raise ValueError("names, shapes or types differ")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError("not all numbers are finite")
    model = build_quantizer(config, width)
    model.load_state_dict(tensors)
    return model
