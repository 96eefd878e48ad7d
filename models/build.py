"""From a recipe's model block to a module: one `match` arm per architecture."""

from typing import assert_never

from configs.decoders import (
    Decoder,
    FeatureInputs,
    HSTUDecoderConfig,
    LazyDecoderConfig,
    OneRecConfig,
    TIGERConfig,
)
from configs.models import HSTUConfig, HSTURankingConfig, InitConfig, Model, SASRecConfig
from models.base import CatalogueSizes, CodeDecoder, RankingModel, SequenceModel, TableSpec
from models.hstu import HSTU
from models.hstu_decoder import HSTUDecoder
from models.hstu_ranking import HSTURanking
from models.lazy_decoder import LazyDecoder
from models.onerec import OneRec
from models.sasrec import SASRec
from models.tiger import TIGER


def build_model(
    config: Model, sizes: CatalogueSizes, tables: InitConfig, max_length: int
) -> SequenceModel:
    """The dense half that `config` names, for sequences of at most `max_length` kept events.

    Raises ValueError where the model names a feature that the data set does not have.
    """
    specs = table_specs(config, sizes, tables)
    match config:
        case HSTUConfig():
            return HSTU(config, specs, max_length)
        case SASRecConfig():
            return SASRec(config, specs, max_length)
        case _:
            assert_never(config)


def build_decoder(
    config: Decoder, sizes: CatalogueSizes, tables: InitConfig, max_length: int
) -> CodeDecoder:
    """The generative recommender that `config` names, for at most `max_length` kept events.

    Raises ValueError where items have no semantic ids, or the model names a feature that the data
    set does not have.
    """
    if not sizes.codebook_sizes:
        raise ValueError(
            f"model.kind {config.kind} writes semantic ids, and the items have none; "
            "add a tokenize stage before this one"
        )
    specs = table_specs(config, sizes, tables)
    match config:
        case TIGERConfig():
            return TIGER(config, specs, sizes)
        case OneRecConfig():
            return OneRec(config, specs, sizes)
        case LazyDecoderConfig():
            return LazyDecoder(config, specs, sizes)
        case HSTUDecoderConfig():
            return HSTUDecoder(config, specs, sizes, max_length)
        case _:
            assert_never(config)


def build_ranking_model(
    config: HSTURankingConfig,
    sizes: CatalogueSizes,
    tables: InitConfig,
    max_length: int,
    *,
    num_tasks: int,
    p_score: bool,
) -> RankingModel:
    """The model of `num_tasks` tasks, and of a P-score with `p_score`, that `config` names.

    Raises ValueError where events carry no labels, or the data set lacks a feature.
    """
    if not sizes.labels:
        raise ValueError(
            f"model.kind {config.kind} reads what users did, and the events carry no labels; map "
            "data.source.columns.labels and prepare again"
        )
    specs = table_specs(config, sizes, tables)
    return HSTURanking(config, specs, max_length, len(sizes.labels), num_tasks, p_score)


def table_specs(
    config: Model | Decoder | HSTURankingConfig, sizes: CatalogueSizes, tables: InitConfig
) -> tuple[TableSpec, ...]:
    """The tables that a model of this config describes: item, then user_<f>, then side_<f>.

    A model that writes semantic ids has an item table only where its config asks for it.
    """
    item_table = not isinstance(config, FeatureInputs) or config.item_table
    rows = {"item": sizes.num_items + 1} if item_table else {}
    rows |= _feature_rows("user", config.user_features, sizes.user_features)
    rows |= _feature_rows("side", config.side_features, sizes.side_features)
    return tuple(TableSpec(name, count, config.width, tables.std) for name, count in rows.items())


def _feature_rows(kind: str, names: tuple[str, ...], known: dict[str, int]) -> dict[str, int]:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"model.{kind}_features names {unknown}, but the prepared data set has "
            f"{sorted(known)}; map it in data.source and prepare again, or remove it from the model"
        )
    return {f"{kind}_{name}": known[name] + 1 for name in names}
