"""A recipe: every setting of a run, and the checks that concern more than one block."""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from configs.alignment import (
    Alignment,
    GBPOConfig,
    GeneratedPairsBase,
    OfflineBase,
    OnlineBase,
    rewards_of,
)
from configs.base import Config
from configs.cluster import ClusterConfig
from configs.data import ColumnMap, DataConfig, LeaveLastOut
from configs.decoders import (
    Decoder,
    FeatureInputs,
    HSTUDecoderConfig,
    LazyDecoderConfig,
    OneRecConfig,
    TIGERConfig,
)
from configs.evaluation import DEFAULT_CHUNK, EvaluationConfig, RecommendConfig
from configs.failures import FailuresConfig
from configs.generation import AncestralConfig, SearchConfig
from configs.locations import Location
from configs.measured import check_metrics
from configs.models import HSTURankingConfig, InitConfig, Model
from configs.objectives import MultiTaskConfig, NextCodeConfig, Objective, SampledSoftmaxConfig
from configs.preferences import LabelRule, PreferenceRule, RatingRule, WatchTimeRule
from configs.rewards import QuotaReward, check_codes_are_written
from configs.schema import closest
from configs.sharding import ShardingConfig
from configs.tokenize import TokenizerConfig
from configs.training import TrainingConfig

StageName = Literal["prepare", "tokenize", "train", "align", "evaluate", "recommend", "report"]
STAGES: tuple[StageName, ...] = get_args(StageName)


class Recipe(Config):
    """A run from raw logs to an aligned, evaluated model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: Location = Field(pattern=r"\S")
    """Directory (any URL all nodes see) that receives data, checkpoints and results."""
    seed: int = Field(0, ge=0, lt=1 << 63)
    data: DataConfig
    tokenizer: TokenizerConfig | None = None
    """Gives items semantic ids; models that write them need it."""
    model: Annotated[Model | Decoder | HSTURankingConfig, Field(discriminator="kind")]
    tables: InitConfig = InitConfig()
    sharding: ShardingConfig = ShardingConfig()
    objective: Objective = SampledSoftmaxConfig()
    training: TrainingConfig = TrainingConfig()
    alignment: Alignment | None = None
    generation: SearchConfig = SearchConfig()
    """How models that write semantic ids search for items in evaluation and recommendation."""
    evaluation: EvaluationConfig = EvaluationConfig()
    recommend: RecommendConfig = RecommendConfig()
    cluster: ClusterConfig = ClusterConfig()
    failures: FailuresConfig = FailuresConfig()

    @model_validator(mode="after")
    def _blocks_agree(self) -> "Recipe":
        for check in (
            _objective_fits_model,
            _validation_exists,
            _features_are_mapped,
            _sessions_are_written,
            _histories_are_delivered,
            _decoding_applies,
            _metric_is_measured,
            _placed_tables_exist,
            _batch_deals,
            _rollouts_are_possible,
        ):
            check(self)
        return self

    def stages(self) -> tuple[StageName, ...]:
        """The stages of this recipe in order; without what the recipe does not configure."""
        absent = {"tokenize": self.tokenizer is None, "align": self.alignment is None}
        absent["recommend"] = self.ranks_candidates  # it judges what others recommend
        return tuple(stage for stage in STAGES if not absent.get(stage, False))

    @property
    def writes_codes(self) -> bool:
        """Whether the model writes semantic ids instead of scoring items."""
        return isinstance(self.model, FeatureInputs)

    @property
    def ranks_candidates(self) -> bool:
        """Whether the model says what users would do with given candidates (a reward model)."""
        return isinstance(self.model, HSTURankingConfig)

    def worker_sizes(self) -> tuple[int, ...]:
        """Numbers of workers that may run a stage, ascending: those that divide every batch."""
        sizes = range(self.cluster.least_workers, self.cluster.num_workers + 1)
        batches = _batches(self).values()
        return tuple(w for w in sizes if not any(size % w for size in batches))

    def table_names(self) -> tuple[str, ...]:
        """Embedding tables that the model will describe: item (a model that writes codes may have
        none), user_<f>, side_<f>."""
        item_table = not isinstance(self.model, FeatureInputs) or self.model.item_table
        return (
            *(("item",) if item_table else ()),
            *(f"user_{name}" for name in self.model.user_features),
            *(f"side_{name}" for name in self.model.side_features),
        )


def _objective_fits_model(recipe: Recipe) -> None:
    kind = recipe.model.kind
    if recipe.ranks_candidates or isinstance(recipe.objective, MultiTaskConfig):
        if not (recipe.ranks_candidates and isinstance(recipe.objective, MultiTaskConfig)):
            raise ValueError(
                f"model.kind={kind!r} and objective.kind={recipe.objective.kind!r} do not go "
                "together: objective.kind=multi_task trains model.kind=hstu_ranking, and nothing "
                "else does"
            )
        if recipe.alignment is not None:
            raise ValueError(
                f"model.kind={kind!r} recommends nothing that could be aligned: set alignment to "
                "null"
            )
    if not recipe.writes_codes:
        if isinstance(recipe.objective, NextCodeConfig):
            raise ValueError(
                f"objective.kind='next_code' trains models that write semantic ids, but "
                f"model.kind={kind!r} scores items: use sampled_softmax or full_softmax"
            )
        if recipe.tokenizer is not None:
            raise ValueError(f"model.kind={kind!r} reads no semantic ids: set tokenizer to null")
        return
    if recipe.tokenizer is None:
        raise ValueError(
            f"model.kind={kind!r} writes semantic ids: add a `tokenizer` block that makes them"
        )
    if not isinstance(recipe.objective, NextCodeConfig):
        raise ValueError(
            f"model.kind={kind!r} writes semantic ids, which objective.kind="
            f"{recipe.objective.kind!r} does not train: use objective.kind=next_code"
        )
    if max(recipe.evaluation.ks) > recipe.generation.beams:
        raise ValueError(
            f"evaluation.ks asks for the first {max(recipe.evaluation.ks)} items, but "
            f"generation.beams={recipe.generation.beams} finds no more than that many ids: raise "
            "the beams or lower the largest k"
        )
    if recipe.recommend.top_k > recipe.generation.beams:
        raise ValueError(
            f"recommend.top_k={recipe.recommend.top_k} exceeds generation.beams="
            f"{recipe.generation.beams}: raise the beams"
        )


def _sessions_are_written(recipe: Recipe) -> None:
    model = recipe.model
    if recipe.generation.next_item_alone and not (
        isinstance(model, OneRecConfig) and model.session_items > 1
    ):
        raise ValueError(
            f"generation.next_item_alone is for models that write sessions, and model.kind="
            f"{model.kind!r} writes one item a request: set model.session_items of an onerec, or "
            "leave it out"
        )


def _histories_are_delivered(recipe: Recipe) -> None:
    """A model that cuts its own histories gets as long ones as it asks for."""
    model, delivered = recipe.model, recipe.data.loader.max_length
    asked: dict[str, int | None] = {}
    if isinstance(model, TIGERConfig | OneRecConfig | LazyDecoderConfig):
        asked["history"] = model.history
    if isinstance(model, OneRecConfig):
        asked["positive_history"] = model.positive_history
        asked["lifelong.history"] = model.lifelong.history if model.lifelong is not None else None
    for name, events in asked.items():
        if events is not None and events > delivered:
            raise ValueError(
                f"model.{name}={events} events are never delivered: data.loader.max_length="
                f"{delivered} cuts what is read of a user; raise it or lower model.{name}"
            )


def _decoding_applies(recipe: Recipe) -> None:
    """Options of search, ranking and windows that the model has no use for are refused."""
    kind = recipe.model.kind
    if recipe.ranks_candidates:
        recipe.evaluation.check_for_candidates(kind)
        if recipe.recommend != RecommendConfig():
            raise ValueError(f"model.kind={kind!r} recommends nothing: remove recommend")
    if not recipe.writes_codes and recipe.generation != SearchConfig():
        raise ValueError(
            f"generation says how models search that write semantic ids, and model.kind={kind!r} "
            "scores every item: remove it"
        )
    if recipe.writes_codes and recipe.evaluation.catalogue_chunk != DEFAULT_CHUNK:
        raise ValueError(
            f"evaluation.catalogue_chunk is for models that score every item, and model.kind="
            f"{kind!r} writes semantic ids: remove it"
        )
    if not recipe.table_names() and recipe.tables != InitConfig():
        raise ValueError(
            f"tables.std is of embedding tables; model.kind={kind!r} has none: remove it"
        )
    objective = recipe.objective
    windows = objective.windows_per_user if isinstance(objective, NextCodeConfig) else None
    if windows is not None and isinstance(recipe.model, HSTUDecoderConfig):
        raise ValueError(
            f"objective.windows_per_user={windows} cuts windows for models that learn from their "
            f"last position, and model.kind={kind!r} learns from every one: remove it"
        )


def _validation_exists(recipe: Recipe) -> None:
    split = recipe.data.split
    if isinstance(split, LeaveLastOut) and split.include_validation_in_training:
        blocks = [("training", recipe.training.validation)]
        if recipe.alignment is not None:
            blocks.append(("alignment", recipe.alignment.validation))
        for name, block in blocks:
            if block is not None:
                raise ValueError(
                    f"{name}.validation must be null when data.split."
                    "include_validation_in_training is true: no item is left to select on"
                )


def _features_are_mapped(recipe: Recipe) -> None:
    source = recipe.data.source
    text = None if source.kind == "public" else source.item_text
    known_item = text.features if text is not None else ()
    recipe.recommend.check_features(known_item)
    for reward in rewards_of(recipe.alignment):
        if isinstance(reward, QuotaReward) and reward.feature not in (None, *known_item):
            raise ValueError(
                f"alignment.rewards has a quota of feature={reward.feature!r}, which "
                f"data.source.item_text.features {list(known_item)} does not provide"
            )
    if source.kind == "public":
        return  # known only once it is prepared; the stage checks it then
    table = source.user_table
    known_user = table.features if table is not None else ()
    for name in recipe.model.user_features:
        if name not in known_user:
            raise ValueError(
                f"model.user_features names {name!r}, which data.source.user_table.features "
                f"{list(known_user)} does not provide"
            )
    for name in recipe.model.side_features:
        if name not in source.columns.side_features:
            raise ValueError(
                f"model.side_features names {name!r}, which data.source.columns.side_features "
                f"{list(source.columns.side_features)} does not map"
            )
    if isinstance(recipe.model, FeatureInputs):
        names = ("rating", "action", "dwell")
        recipe.model.check_events(
            **{name: getattr(source.columns, name) is not None for name in names}
        )
    if recipe.data.cleaning.min_rating is not None and source.columns.rating is None:
        raise ValueError(
            f"data.cleaning.min_rating={recipe.data.cleaning.min_rating} needs a rating: map "
            "data.source.columns.rating"
        )
    if recipe.alignment is not None and recipe.alignment.rule is not None:
        _rule_is_mapped("alignment.rule", recipe.alignment.rule, source.columns)
    if isinstance(recipe.alignment, GBPOConfig) and recipe.alignment.logged is not None:
        _rule_is_mapped("alignment.logged.rule", recipe.alignment.logged.rule, source.columns)
    if isinstance(recipe.objective, MultiTaskConfig):
        _tasks_are_mapped(recipe.objective, source.columns)


def _rule_is_mapped(place: str, rule: PreferenceRule, columns: ColumnMap) -> None:
    named: tuple[str, ...] = ()
    match rule:
        case RatingRule():
            if columns.rating is None:
                raise ValueError(
                    f"{place} needs liked and disliked items: map data.source.columns.rating, "
                    f"choose another {place}.kind, or set alignment to null"
                )
        case LabelRule():
            named = (*rule.liked, *rule.disliked)
        case WatchTimeRule():
            named = rule.negative
            if columns.dwell is None or columns.duration is None:
                raise ValueError(
                    f"{place}.kind='watch_time' compares how long items were watched: map "
                    "data.source.columns.dwell and data.source.columns.duration"
                )
    unknown = [name for name in named if name not in columns.labels]
    if unknown:
        raise ValueError(
            f"{place} names the labels {unknown}, which data.source.columns.labels "
            f"{list(columns.labels)} does not map"
        )


def _tasks_are_mapped(objective: MultiTaskConfig, columns: ColumnMap) -> None:
    wanted = [task.label for task in objective.tasks if task.kind == "label"]
    wanted += list(objective.p_score.weights) if objective.p_score is not None else []
    unknown = sorted({name for name in wanted if name not in columns.labels})
    if unknown:
        raise ValueError(
            f"objective names the labels {unknown}, which data.source.columns.labels "
            f"{list(columns.labels)} does not map"
        )
    if columns.dwell is None and any(task.kind == "dwell" for task in objective.tasks):
        raise ValueError("objective.tasks has kind: dwell: map data.source.columns.dwell")
    if not columns.labels:
        raise ValueError(
            "model.kind='hstu_ranking' reads what users did: map data.source.columns.labels"
        )


def _metric_is_measured(recipe: Recipe) -> None:
    check_metrics(
        recipe.objective,
        recipe.evaluation.ks,
        recipe.training.validation,
        recipe.alignment,
        writes_codes=recipe.writes_codes,
    )


def _placed_tables_exist(recipe: Recipe) -> None:
    tables = recipe.table_names()
    unknown = [name for name in recipe.sharding.placement if name not in tables]
    sentences = []
    for name in unknown:
        guess = closest(name, tables)
        sentences.append(
            f"sharding.placement.{name}={recipe.sharding.placement[name]} names no table of this "
            f"model: choose one of {', '.join(tables)}"
            + (f"; did you mean {guess}?" if guess is not None else "")
        )
    if sentences:
        raise ValueError("\n".join(sentences))
    recipe.sharding.check_for_tables(tables, recipe.model.kind)


def _batches(recipe: Recipe) -> dict[str, int]:
    """What is dealt over the workers: recipe key → samples."""
    batches = {"data.loader.global_batch": recipe.data.loader.global_batch}
    if isinstance(recipe.alignment, OfflineBase):
        batches["alignment.pairs_per_step"] = recipe.alignment.pairs_per_step
    elif isinstance(recipe.alignment, OnlineBase | GeneratedPairsBase):
        batches["alignment.prompts.per_step"] = recipe.alignment.prompts.per_step
    return batches


def _batch_deals(recipe: Recipe) -> None:
    cluster = recipe.cluster
    ends = {"cluster.num_workers": cluster.num_workers, "cluster.min_workers": cluster.min_workers}
    for name, size in _batches(recipe).items():
        for key, workers in ends.items():
            if workers is not None and size % workers:
                raise ValueError(f"{name}={size} must be a multiple of {key}={workers}")


def _rollouts_are_possible(recipe: Recipe) -> None:
    """Room for rollout actors; options of generation that need a model that writes codes."""
    config, cluster = recipe.alignment, recipe.cluster
    if isinstance(config, OnlineBase) and config.rollout_actors is not None:
        count = config.rollout_actors.count
        needed = (cluster.num_workers + count) * cluster.cpus_per_worker
        if cluster.address == "local" and cluster.device == "cpu" and needed > cluster.data_cpus:
            raise ValueError(
                f"alignment.rollout_actors.count={count} beside cluster.num_workers="
                f"{cluster.num_workers} needs {needed:g} CPUs of the embedded Ray, which has "
                f"cluster.data_cpus={cluster.data_cpus}: raise those"
            )
    if recipe.writes_codes:
        return
    if not isinstance(config, OnlineBase | GeneratedPairsBase):
        return
    check_codes_are_written(rewards_of(config), recipe.model.kind)
    if isinstance(config.generation, AncestralConfig) and config.generation.top_p < 1:
        raise ValueError(
            f"alignment.generation.top_p={config.generation.top_p} cuts off codes, but "
            f"model.kind={recipe.model.kind!r} scores whole items: set top_p to 1 and lower the "
            "temperature instead"
        )
