"""Quantizers on disk, and settings that are refused."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError

from configs.tokenizers import (
    ProductQuantizerConfig,
    Quantizer,
    ResidualKMeansConfig,
    RQVAEConfig,
    SinkhornConfig,
)
from models.tokenizers.build import load_quantizer, save_quantizer
from models.tokenizers.fit import fit_quantizer
from models.tokenizers.shards import LocalShards
from tests.models.tokenizers.clouds import clouds

CONFIGS: list[Quantizer] = [
    RQVAEConfig(
        codebook_size=(8, 4, 4), code_width=16, hidden=(16,), epochs=2, warmup_epochs=1,
        batch_size=64, sinkhorn=SinkhornConfig(),
    ),
    ResidualKMeansConfig(
        codebook_size=8, iterations=3, balanced=True, normalize_residuals=True
    ),
    ProductQuantizerConfig(num_levels=2, codebook_size=8, iterations=3, rotation_rounds=3),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_a_saved_quantizer_comes_back(config: Quantizer, tmp_path: Path) -> None:
    data = clouds(200, 8, 9, seed=1)
    model = fit_quantizer(LocalShards.of(data), 8, config)
    url = str(tmp_path / "quantizer")
    digest = save_quantizer(model, url)
    loaded = load_quantizer(url)
    assert loaded.config == config and loaded.width == 8
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    fresh = clouds(70, 8, 9, seed=2)
    codes = model.encode(fresh)
    assert torch.equal(loaded.encode(fresh), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    order = model.ranked_last_level(fresh, codes)
    assert torch.equal(loaded.ranked_last_level(fresh, codes), order)
    assert save_quantizer(loaded, str(tmp_path / "again")) == digest
    with torch.no_grad():
        loaded.codebooks[0][0, 0] += 1
    assert save_quantizer(loaded, str(tmp_path / "changed")) != digest


def test_damage_is_said(tmp_path: Path) -> None:
    url = str(tmp_path)
    with pytest.raises(ValueError, match="no whole tokenizer"):
        load_quantizer(url)
    model = fit_quantizer(LocalShards.of(clouds(50, 8, 9, seed=1)), 8, CONFIGS[1])
    save_quantizer(model, url)
    tensors, description = tmp_path / "quantizer.safetensors", tmp_path / "quantizer.json"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"damaged.*tokenize RECIPE --force"):
        load_quantizer(url)
    tensors.write_bytes(whole)
    text = description.read_text()
    description.write_text(text.replace('"width": 8', '"width": 9'))
    with pytest.raises(ValueError, match="does not describe its tensors"):
        load_quantizer(url)
    for width in ('"abc"', '"8"', "1e400", "-1", "8.0", "null", "1000000000000000"):
        description.write_text(text.replace('"width": 8', f'"width": {width}'))
        with pytest.raises(ValueError, match="does not describe its tensors"):
            load_quantizer(url)
    description.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="not a tokenizer of format 1"):
        load_quantizer(url)
    description.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_quantizer(url)


@pytest.mark.parametrize("change", ["infinite", "double", "missing"])
def test_tensors_that_fitting_cannot_have_left_are_refused(change: str, tmp_path: Path) -> None:
    model = fit_quantizer(LocalShards.of(clouds(50, 8, 9, seed=1)), 8, CONFIGS[1])
    save_quantizer(model, str(tmp_path))
    tensors, description = tmp_path / "quantizer.safetensors", tmp_path / "quantizer.json"
    state = safetensors.torch.load(tensors.read_bytes())
    name = min(state)
    if change == "infinite":
        state[name].view(-1)[0] = float("inf")
    elif change == "double":
        state[name] = state[name].double()
    else:
        del state[name]
    tensors.write_bytes(safetensors.torch.save(state))
    told = json.loads(description.read_text())
    told["sha256"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
    description.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"does not describe its tensors.*--force"):
        load_quantizer(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "rq_vae", "codebook_size": [4, 4]}, "names 2 levels and num_levels is 3"),
        ({"kind": "rq_vae", "codebook_size": 1}, "greater than or equal to 2"),
        (
            {"kind": "rq_vae", "batch_size": 64, "sinkhorn": {}},
            "batch_size is 64; raise batch_size",
        ),
        ({"kind": "rq_vae", "epochs": 5}, "warmup_epochs=10 leaves none of epochs=5"),
        ({"kind": "product", "num_levels": 1}, "set rotation=false or more levels"),
        ({"kind": "residual_kmeans", "beta": 1}, "Extra inputs are not permitted"),
        ({"kind": "residual_kmeans", "price_rounds": 3}, "price_rounds only serves balanced=true"),
        ({"kind": "residual_kmeans", "balanced": True, "restarts": 2}, "restarts=2"),
        ({"kind": "product", "rotation": False, "rotation_rounds": 2}, "only serves rotation=true"),
    ],
)
def test_wrong_settings_are_sentences(settings: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        TypeAdapter(Quantizer).validate_python(settings)
