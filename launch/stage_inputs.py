"""What decides the result of each stage: settings and upstream hashes that its fingerprint covers.

A setting that changes no number of a stage is left out of its inputs, so that it costs no rerun.
"""

from typing import Any

from configs import storage
from configs.alignment import rewards_of
from configs.base import Config
from configs.layout import RunLayout, read_checkpoint_reference, weights_hash
from configs.recipe import Recipe
from configs.rewards import FunctionReward, ModelReward
from configs.sharding import Placement, ShardingConfig
from configs.training import TrainingConfig, ValidationConfig

Outputs = dict[str, Any]


def dump(*blocks: Any) -> list[Any]:
    """JSON-able settings of blocks."""
    return [None if block is None else block.model_dump(mode="json") for block in blocks]


def prepare_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    """Of `prepare`."""
    from data_loaders.sources import source_signature

    layout = RunLayout(storage.absolute(recipe.output))
    return {
        "settings": _prepare_settings(recipe),
        "source": source_signature(recipe.data.source, raw_url(recipe, layout)),
    }


def prepare_settings(recipe: Recipe) -> str:
    """Hash of the settings of `prepare`, whatever its source holds."""
    return storage.fingerprint(_prepare_settings(recipe))


def _prepare_settings(recipe: Recipe) -> list[Any]:
    data = recipe.data
    split = data.split.model_dump(mode="json")
    split.pop("include_validation_in_training", None)  # read by the loader, not by `prepare`
    return [*dump(data.source, data.cleaning, data.shards), split]


def raw_url(recipe: Recipe, layout: RunLayout) -> str:
    """Where the raw log lies, or a public set's copy will."""
    source = recipe.data.source
    if source.kind == "public":
        return source.url or layout.raw(source.name)
    return source.url


def tokenize_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    """Of `tokenize`."""
    from trainer.tokenize import tokenizer_inputs

    assert recipe.tokenizer is not None, "the tokenize stage exists only with a tokenizer block"
    if recipe.tokenizer.frozen is not None:
        _refuse_own_output(recipe, "tokenizer.frozen", recipe.tokenizer.frozen, "tokenizing")
    return {
        "data": done["prepare"]["data"],
        "seed": recipe.seed,
        "settings": tokenizer_inputs(recipe.tokenizer),
    }


def train_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    """Of `train`."""
    layout_free = recipe.training.model_copy(update={"zero_stage": TrainingConfig().zero_stage})
    settings = [
        *dump(recipe.data.split, recipe.model, recipe.tables),
        *dump(_as_it_counts(recipe.sharding), recipe.objective),
        _without(recipe.data.loader, *_OF_MEMORY),
        _without(layout_free, *_BY_THE_WAY, "start"),
        *_selecting(recipe, recipe.training.validation),
    ]
    return {**_meanings(done), "seed": recipe.seed, "settings": settings, **_start(recipe)}


def _start(recipe: Recipe) -> dict[str, Any]:
    reference = start_checkpoint(recipe)
    return {} if reference is None else {"start": weights_hash(reference)}


def start_checkpoint(recipe: Recipe) -> dict[str, Any] | None:
    """Reference of the checkpoint that training begins with, where that is another run's.

    A training that has begun does not need that run any more: where it is gone, what was noted
    when training began (`note_start`) says which training of this output is meant.

    Raises:
        ValueError: there is none, or the record that names it is damaged.
    """
    start = recipe.training.start
    if start is None:
        return None
    _refuse_own_output(recipe, "training.start.run", start.run, "training")
    noted = RunLayout(storage.absolute(recipe.output)).start_record(start.run)
    gone = not storage.exists(RunLayout(storage.absolute(start.run)).stage_record("train"))
    if gone and storage.exists(noted):
        return read_checkpoint_reference(noted)
    return trained_checkpoint(start.run, "training.start.run")


def note_start(recipe: Recipe, reference: dict[str, Any]) -> None:
    """Keep what a training begins with for the day on which that run is gone."""
    assert recipe.training.start is not None, "there is something to begin with"
    noted = RunLayout(storage.absolute(recipe.output)).start_record(recipe.training.start.run)
    storage.write_sealed(noted, {"outputs": {"checkpoint": reference}})


def _refuse_own_output(recipe: Recipe, place: str, run: str, stage: str) -> None:
    """Raises ValueError where what a stage goes on from is what it replaces."""
    if storage.resolved(run) == storage.resolved(recipe.output):
        raise ValueError(
            f"{place}={run!r} is this recipe's own output, which its {stage} replaces: name "
            "another run, or give this one another `output`"
        )


def trained_checkpoint(run: str, place: str) -> dict[str, Any]:
    """Reference of the checkpoint that a run's training selected; `place` is the recipe's key.

    Raises:
        ValueError: there is none, or the record that names it is damaged.
    """
    record = RunLayout(storage.absolute(run)).stage_record("train")
    if not storage.exists(record):
        raise ValueError(
            f"{place}={run!r} holds no finished training: run `tandem train` on its recipe first"
        )
    return read_checkpoint_reference(record)


def _as_it_counts(sharding: ShardingConfig) -> ShardingConfig:
    """A plan with what changes no number of a training at its default, so that a run goes on from
    its checkpoints under another: memory limits, and how a sharded table is cut. Column-wise blocks
    count under row-wise Adagrad, which sums each of them by itself."""
    cuts = {"auto", "row_wise", "table_wise"}
    if sharding.optimizer.kind != "rowwise_adagrad":
        cuts.add("column_wise")

    def counted(placement: Placement) -> Placement:
        return "auto" if placement in cuts else placement

    default = counted(sharding.default)
    placement = {name: counted(value) for name, value in sharding.placement.items()}
    return ShardingConfig(
        default=default,
        placement={name: value for name, value in placement.items() if value != default},
        optimizer=sharding.optimizer,
    )


_OF_MEMORY = ("prefetch", "cached_row_groups", "tokens_per_micro_batch", "accumulation")
"""Settings of a loader that change no step: what is in memory at once, and how a step is cut."""
_BY_THE_WAY = ("log_every_steps", "checkpoint")
"""Settings of a training stage that change none of its numbers."""


def _without(block: Config, *names: str) -> dict[str, Any]:
    return block.model_dump(mode="json", exclude=set(names))


def _selecting(recipe: Recipe, validation: ValidationConfig | None) -> list[Any]:
    """Settings that decide which policy validation selects."""
    if validation is None:
        return []
    settings: list[Any] = [recipe.evaluation.filter_seen]
    if recipe.writes_codes:
        settings += dump(recipe.generation)
        # Only what was searched for can be found: the longest list bounds a reciprocal rank.
        settings += [max(recipe.evaluation.ks)] if validation.metric == "mrr" else []
    return settings


def _meanings(done: dict[str, Outputs]) -> dict[str, Any]:
    """Hashes of what gives ids and codes their meaning."""
    codes = {"semantic_ids": done["tokenize"]["semantic_ids"]} if "tokenize" in done else {}
    return {"data": done["prepare"]["data"], **codes}


def _measuring(recipe: Recipe) -> tuple[Any, ...]:
    """Settings that decide what a policy's metrics are."""
    return (recipe.evaluation, *((recipe.generation,) if recipe.writes_codes else ()))


def align_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    """Of `align`."""
    return {
        "start": weights_hash(done["train"]["checkpoint"]),
        "data": done["prepare"]["data"],
        "settings": _alignment_settings(recipe),
        "train": train_inputs(recipe, done),
        **_reward_models(recipe),
        **_reward_functions(recipe),
    }


def _alignment_settings(recipe: Recipe) -> list[Any]:
    config = recipe.alignment
    assert config is not None, "the align stage exists only with an alignment block"
    guarded = config.guardrails.limits or config.guardrails.divergence is not None
    if guarded:  # they look at every metric, as often as steps are logged
        return [_without(config, "checkpoint"), *dump(*_measuring(recipe))]
    return [_without(config, *_BY_THE_WAY), *_selecting(recipe, config.validation)]


def _reward_models(recipe: Recipe) -> dict[str, Any]:
    """Reward models that online alignment asks, by run; one that is not there is null."""
    rewards = rewards_of(recipe.alignment)
    runs = {each.run for each in rewards if isinstance(each, ModelReward)}
    found: dict[str, Any] = {}
    for run in sorted(runs):
        record = RunLayout(storage.absolute(run)).stage_record("train")
        there = storage.exists(record)
        found[run] = weights_hash(read_checkpoint_reference(record)) if there else None
    return {"reward_models": found} if found else {}


def _reward_functions(recipe: Recipe) -> dict[str, Any]:
    """What the sources of the user's own rewards are, by dotted path."""
    rewards = rewards_of(recipe.alignment)
    paths = sorted({each.path for each in rewards if isinstance(each, FunctionReward)})
    if not paths:
        return {}
    from trainer.rewards.user_function import source_hash

    return {"reward_functions": {path: source_hash(path) for path in paths}}


def policies_of(done: dict[str, Outputs]) -> dict[str, Any]:
    """Checkpoint reference of each trained policy, in the order of training."""
    policies = {"pretrained": done["train"]["checkpoint"]}
    if "align" in done:
        policies["aligned"] = done["align"]["checkpoint"]
    return policies


def measured_policies(done: dict[str, Outputs]) -> dict[str, Any]:
    """As `policies_of`, and what alignment ended with where guardrails let none of it be handed on:
    what they spared the user is told, too."""
    policies, aligned = policies_of(done), done.get("align")
    if aligned is None or aligned["checkpoint"]["step"] or not aligned["last_checkpoint"]["step"]:
        return policies
    last = aligned["last_checkpoint"]
    ends = [alarm["action"] for alarm in aligned.get("alarms", ()) if alarm["step"] == last["step"]]
    if "roll_back" in ends:  # then it is the policy that was gone back to
        return policies
    return policies | {"not handed on": last}


def evaluate_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    """Of `evaluate`."""
    return {
        **_meanings(done),
        "policies": {name: entry["hash"] for name, entry in measured_policies(done).items()},
        "settings": [
            *dump(*_measuring(recipe), recipe.data.split),
            recipe.data.loader.max_length,
        ],
    }


def recommend_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    """Of `recommend`."""
    return {
        **_meanings(done),
        "policy": list(policies_of(done).values())[-1]["hash"],
        "settings": [
            *dump(recipe.recommend, *((recipe.generation,) if recipe.writes_codes else ())),
            recipe.data.loader.max_length,
        ],
    }


def report_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    """Of `report`."""
    return {
        "results": storage.sha256_file(done["evaluate"]["results"]),
        "recommendations": storage.sha256_file(done["recommend"]["recommendations"])
        if "recommend" in done
        else None,
        "metrics": [done[s]["metrics"] for s in ("train", "align") if s in done],
        **({"semantic_ids": done["tokenize"]["semantic_ids"]} if "tokenize" in done else {}),
    }
