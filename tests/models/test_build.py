"""From configuration to model and tables."""

from dataclasses import replace

import pytest
import torch

from configs.decoders import (
    Decoder,
    HSTUDecoderConfig,
    LazyDecoderConfig,
    OneRecConfig,
    TIGERConfig,
)
from configs.models import HSTUConfig, InitConfig, Model, SASRecConfig
from models.base import CatalogueSizes, TableSpec
from models.build import build_decoder, build_model
from models.hstu import HSTU
from models.hstu_decoder import HSTUDecoder
from models.lazy_decoder import LazyDecoder
from models.onerec import OneRec
from models.sasrec import SASRec
from models.tiger import TIGER

SIZES = CatalogueSizes(
    num_items=30, num_users=9, user_features={"age": 7, "sex": 2}, side_features={"device": 4}
)


@pytest.mark.parametrize(
    ("config", "kind", "positions"),
    [
        (HSTUConfig(width=8, attention_slack=11), HSTU, 31),
        (SASRecConfig(width=8, num_heads=2), SASRec, 20),
    ],
)
def test_each_kind_is_built(config: Model, kind: type, positions: int) -> None:
    model = build_model(config, SIZES, InitConfig(std=0.1), max_length=20)
    assert type(model) is kind
    assert model.table_specs() == (TableSpec("item", 31, 8, 0.1),)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["sequence_input.positions"] == (positions, 8)


def test_named_features_become_tables_in_order() -> None:
    config = HSTUConfig(width=8, user_features=("sex", "age"), side_features=("device",))
    specs = build_model(config, SIZES, InitConfig(), max_length=20).table_specs()
    assert [(s.name, s.num_rows) for s in specs] == [
        ("item", 31),
        ("user_sex", 3),
        ("user_age", 8),
        ("side_device", 5),
    ]
    assert {s.width for s in specs} == {8}


def test_a_feature_that_the_data_lack_is_refused() -> None:
    with pytest.raises(ValueError, match=r"side_features.*'hour'.*'device'"):
        build_model(HSTUConfig(side_features=("hour",)), SIZES, InitConfig(), max_length=20)


def test_initial_values() -> None:
    """Positions: truncated normal, std √(1/D); HSTU weights and biases: normal, std .02."""
    torch.manual_seed(0)
    model = build_model(HSTUConfig(width=64), SIZES, InitConfig(), max_length=400)
    values = dict(model.named_parameters())
    positions = values["sequence_input.positions"]
    assert positions.abs().max() <= 2 * 64**-0.5
    assert positions.std().item() == pytest.approx(64**-0.5 * 0.88, rel=0.03)
    for name in ("uvqk", "position_bias", "time_bias"):
        assert values[f"blocks.0.{name}"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not values["blocks.0.output.bias"].any()
    bound = (6 / (64 + 50)) ** 0.5
    assert bound * 0.99 < values["blocks.0.output.weight"].abs().max() <= bound


@pytest.mark.parametrize(
    ("config", "kind", "longest"),
    [
        (TIGERConfig(history=7), TIGER, 7),
        (OneRecConfig(history=8), OneRec, 8),
        (LazyDecoderConfig(history=9), LazyDecoder, 9),
        (HSTUDecoderConfig(), HSTUDecoder, 20),
    ],
)
def test_each_kind_of_decoder_is_built(config: Decoder, kind: type, longest: int) -> None:
    sizes = replace(SIZES, codebook_sizes=(4, 6))
    plain = build_decoder(config, sizes, InitConfig(), max_length=20)
    assert type(plain) is kind
    assert plain.table_specs() == ()
    assert (plain.codebook_sizes, plain.longest_history) == ((4, 6), longest)
    names = {"item_table": True, "user_features": ("sex",), "side_features": ("device",)}
    featured = build_decoder(config.model_copy(update=names), sizes, InitConfig(std=0.1), 20)
    assert featured.table_specs() == (
        TableSpec("item", 31, config.width, 0.1),
        TableSpec("user_sex", 3, config.width, 0.1),
        TableSpec("side_device", 5, config.width, 0.1),
    )


def test_a_decoder_without_semantic_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenize stage"):
        build_decoder(TIGERConfig(), SIZES, InitConfig(), max_length=20)
