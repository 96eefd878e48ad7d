"""The stages of a run: what each depends on, what it does, and what it leaves behind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from configs import storage
from configs.alignment import AlignmentBase, OnlineBase
from configs.layout import RunLayout
from configs.recipe import Recipe, StageName
from configs.rewards import ModelReward

Outputs = dict[str, Any]


@dataclass(frozen=True)
class StageContext:
    """A stage about to run."""

    recipe: Recipe
    layout: RunLayout
    fingerprint: str
    done: dict[str, Outputs]
    """Outputs of the stages before it."""

    def settings(self, **more: Any) -> dict[str, Any]:
        """What a worker group is told."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "output": self.layout.root,
            "fingerprint": self.fingerprint,
            "semantic_ids": self.done["tokenize"]["url"] if "tokenize" in self.done else None,
            **more,
        }

    def run_workers(self, entry: str, **more: Any) -> Any:
        """Run `module:function` on the recipe's worker group."""
        from launch.cluster import run_workers

        return run_workers(entry, self.settings(**more), self.recipe.cluster)


@dataclass(frozen=True)
class Stage:
    """One node of the graph."""

    name: StageName
    needs: tuple[StageName, ...]
    needs_ray: bool
    inputs: Callable[[Recipe, dict[str, Outputs]], dict[str, Any]]
    """Settings and upstream hashes that decide the stage's result; its fingerprint covers them."""
    run: Callable[[StageContext], Outputs]
    files: Callable[[Outputs], list[str]]
    """URLs that must still exist for the stage to be skipped."""
    intact: Callable[[Outputs], bool] | None = None
    """Whether a record's outputs are what lies there now; of a stage that replaces what it left
    before only at its end, so that its record outlives an attempt that fails."""


def _dump(*blocks: Any) -> list[Any]:
    return [None if block is None else block.model_dump(mode="json") for block in blocks]


# -- prepare ----------------------------------------------------------------------------------


def _prepare_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    from data_loaders.sources import source_signature

    data = recipe.data
    split = data.split.model_dump(mode="json")
    split.pop("include_validation_in_training", None)  # read by the loader, not by `prepare`
    layout = RunLayout(storage.absolute(recipe.output))
    return {
        "settings": [*_dump(data.source, data.cleaning, data.shards), split],
        "source": source_signature(data.source, _raw_url(recipe, layout)),
    }


def _raw_url(recipe: Recipe, layout: RunLayout) -> str:
    source = recipe.data.source
    if source.kind == "public":
        return source.url or layout.raw(source.name)
    return source.url


def _prepare(context: StageContext) -> Outputs:
    from data_loaders.sequences import prepare
    from launch.shared_storage import check_inputs

    recipe, layout = context.recipe, context.layout
    check_inputs(recipe.data.source)
    manifest = prepare(recipe.data, recipe.name, layout.data, _raw_url(recipe, layout))
    return {
        "data": manifest.fingerprint,
        "url": layout.data,
        "users": manifest.num_users,
        "items": manifest.num_items,
        "events": manifest.num_events,
    }


def _prepared_data_stand(outputs: Outputs) -> bool:
    from data_loaders.manifest import read_manifest

    try:
        return read_manifest(outputs["url"]).fingerprint == outputs["data"]
    except ValueError:
        return False


def _say(line: str) -> None:
    print(line, flush=True)


# -- tokenize ---------------------------------------------------------------------------------


def _tokenize_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    from trainer.tokenize import tokenizer_inputs

    assert recipe.tokenizer is not None, "the tokenize stage exists only with a tokenizer block"
    return {
        "data": done["prepare"]["data"],
        "seed": recipe.seed,
        "settings": tokenizer_inputs(recipe.tokenizer),
    }


def _tokenize(context: StageContext) -> Outputs:
    from trainer.tokenize import tokenize

    config = context.recipe.tokenizer
    assert config is not None, "the tokenize stage exists only with a tokenizer block"
    url = context.layout.semantic_ids(context.fingerprint)
    recipe, data = context.recipe, context.layout.data
    device = recipe.cluster.device
    manifest = tokenize(config, data, url, seed=recipe.seed, say=_say, device=device)
    return {"url": url, "semantic_ids": manifest.fingerprint}


# -- train ------------------------------------------------------------------------------------


def _train_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    settings = _dump(
        recipe.data.split,
        recipe.data.loader,
        recipe.model,
        recipe.tables,
        recipe.sharding,
        recipe.objective,
        recipe.training,
        *(_measuring(recipe) if recipe.training.validation else ()),
    )
    return {**_meanings(done), "seed": recipe.seed, "settings": settings}


def _meanings(done: dict[str, Outputs]) -> dict[str, Any]:
    """Hashes of what gives ids and codes their meaning."""
    codes = {"semantic_ids": done["tokenize"]["semantic_ids"]} if "tokenize" in done else {}
    return {"data": done["prepare"]["data"], **codes}


def _measuring(recipe: Recipe) -> tuple[Any, ...]:
    """Settings that decide what a policy's metrics are."""
    return (recipe.evaluation, *((recipe.generation,) if recipe.writes_codes else ()))


def _train(context: StageContext) -> Outputs:
    module = "reward_model" if context.recipe.ranks_candidates else "pretrain"
    outputs: Outputs = context.run_workers(f"trainer.{module}:train_worker")
    return {**outputs, "metrics": context.layout.metrics("train", context.fingerprint)}


# -- align ------------------------------------------------------------------------------------


def _align_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    return {
        "start": done["train"]["checkpoint"]["hash"],
        "data": done["prepare"]["data"],
        "settings": _dump(recipe.alignment, *_measuring(recipe)),
        "train": _train_inputs(recipe, done),
        **_reward_models(recipe),
    }


def _reward_models(recipe: Recipe) -> dict[str, Any]:
    """Reward models that online alignment asks, by run; one that is not there is null."""
    if not isinstance(recipe.alignment, OnlineBase):
        return {}
    runs = {each.run for each in recipe.alignment.rewards if isinstance(each, ModelReward)}
    found: dict[str, Any] = {}
    for run in sorted(runs):
        record = RunLayout(storage.absolute(run)).stage_record("train")
        there = storage.exists(record)
        found[run] = storage.read_json(record)["outputs"]["checkpoint"]["hash"] if there else None
    return {"reward_models": found} if found else {}


def _align(context: StageContext) -> Outputs:
    layout, done, config = context.layout, context.done, context.recipe.alignment
    assert config is not None, "the align stage exists only with an alignment block"
    pairs = _pairs(context, config)
    start = done["train"]["checkpoint"]
    outputs: Outputs = context.run_workers(
        "trainer.align:align_worker",
        start=start,
        pairs=None if pairs is None else pairs["url"],
        reference=None if pairs is None else layout.reference(pairs["fingerprint"], start["hash"]),
    )
    return {**outputs, "pairs": pairs, "metrics": layout.metrics("align", context.fingerprint)}


def _pairs(context: StageContext, config: AlignmentBase) -> Outputs | None:
    """Build the pairs of alignment's rule, if it has one; where they are and what was counted."""
    from data_loaders.pairs import build_pairs

    if config.rule is None:
        return None
    recipe, layout = context.recipe, context.layout
    key = storage.fingerprint(
        [
            context.done["prepare"]["data"],
            *_dump(config.rule),
            config.validation_share,
            recipe.seed,
            recipe.data.loader.max_length,
        ]
    )
    url = layout.pairs(key)
    pairs = build_pairs(
        layout.data,
        config.rule,
        url,
        max_length=recipe.data.loader.max_length,
        seed=recipe.seed,
        validation_share=config.validation_share,
    )
    return {
        "url": url,
        "fingerprint": pairs.fingerprint,
        "pairs": pairs.num_pairs,
        "validation_pairs": pairs.num_validation_pairs,
        "candidates": pairs.num_candidates,
        "users": pairs.num_users,
        **pairs.outcomes,
    }


# -- evaluate, recommend, report --------------------------------------------------------------


def _policies(done: dict[str, Outputs]) -> dict[str, Any]:
    policies = {"pretrained": done["train"]["checkpoint"]}
    if "align" in done:
        policies["aligned"] = done["align"]["checkpoint"]
    return policies


def _evaluate_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    return {
        **_meanings(done),
        "policies": {name: entry["hash"] for name, entry in _policies(done).items()},
        "settings": [
            *_dump(*_measuring(recipe), recipe.data.split),
            recipe.data.loader.max_length,
        ],
    }


def _evaluate(context: StageContext) -> Outputs:
    from trainer.monitor.results import write_results

    done = context.done
    pairs = done["align"]["pairs"] if "align" in done else None
    module = "reward_model" if context.recipe.ranks_candidates else "evaluate"
    measured = context.run_workers(
        f"trainer.{module}:evaluate_worker",
        policies=_policies(done),
        pairs=None if pairs is None else pairs["url"],
    )
    alarms = done["align"]["alarms"] if "align" in done else []
    write_results(context.layout.results, context.recipe, measured, pairs, alarms)
    return {"results": context.layout.results}


def _recommend_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    return {
        **_meanings(done),
        "policy": list(_policies(done).values())[-1]["hash"],
        "settings": [
            *_dump(recipe.recommend, *((recipe.generation,) if recipe.writes_codes else ())),
            recipe.data.loader.max_length,
        ],
    }


def _recommend(context: StageContext) -> Outputs:
    policy = list(_policies(context.done).values())[-1]
    answer = context.run_workers("trainer.recommend:recommend_worker", policy=policy)
    storage.write_json(context.layout.recommendations, answer)
    return {"recommendations": context.layout.recommendations}


def _report_inputs(recipe: Recipe, done: dict[str, Outputs]) -> dict[str, Any]:
    return {
        "results": storage.sha256_file(done["evaluate"]["results"]),
        "recommendations": storage.sha256_file(done["recommend"]["recommendations"])
        if "recommend" in done
        else None,
        "metrics": [done[s]["metrics"] for s in ("train", "align") if s in done],
        **({"semantic_ids": done["tokenize"]["semantic_ids"]} if "tokenize" in done else {}),
    }


def _report(context: StageContext) -> Outputs:
    from trainer.monitor.report import write_report

    done = context.done
    return write_report(
        context.layout,
        metrics={s: done[s]["metrics"] for s in ("train", "align") if s in done},
        semantic_ids=done["tokenize"]["url"] if "tokenize" in done else None,
    )


def _checkpoint_files(outputs: Outputs) -> list[str]:
    return [storage.join(outputs["checkpoint"]["url"], "MANIFEST.json")]


GRAPH: dict[StageName, Stage] = {
    "prepare": Stage(
        "prepare",
        (),
        True,
        _prepare_inputs,
        _prepare,
        lambda outputs: [storage.join(outputs["url"], "manifest.json")],
        _prepared_data_stand,
    ),
    "tokenize": Stage(
        "tokenize",
        ("prepare",),
        True,
        _tokenize_inputs,
        _tokenize,
        lambda outputs: [storage.join(outputs["url"], "manifest.json")],
    ),
    "train": Stage(
        "train", ("prepare", "tokenize"), True, _train_inputs, _train, _checkpoint_files
    ),
    "align": Stage(
        "align", ("prepare", "tokenize", "train"), True, _align_inputs, _align, _checkpoint_files
    ),
    "evaluate": Stage(
        "evaluate",
        ("prepare", "tokenize", "train", "align"),
        True,
        _evaluate_inputs,
        _evaluate,
        lambda outputs: [outputs["results"]],
    ),
    "recommend": Stage(
        "recommend",
        ("prepare", "tokenize", "train", "align"),
        True,
        _recommend_inputs,
        _recommend,
        lambda outputs: [outputs["recommendations"]],
    ),
    "report": Stage(
        "report",
        ("prepare", "tokenize", "train", "align", "evaluate", "recommend"),
        False,
        _report_inputs,
        _report,
        lambda outputs: [outputs["report"]],
    ),
}
