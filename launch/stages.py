"""The stages of a run: what each depends on, what it does, and what it leaves behind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs import storage
from configs.alignment import AlignmentBase, GBPOConfig, OfflineBase
from configs.decoders import FeatureInputs
from configs.layout import RunLayout, weights_hash
from configs.locations import absolute_locations
from configs.recipe import Recipe, StageName
from configs.terminal import say
from launch.stage_inputs import (
    Outputs,
    align_inputs,
    dump,
    evaluate_inputs,
    measured_policies,
    note_start,
    policies_of,
    prepare_inputs,
    prepare_settings,
    raw_url,
    recommend_inputs,
    report_inputs,
    start_checkpoint,
    tokenize_inputs,
    train_inputs,
)

if TYPE_CHECKING:
    from data_loaders.manifest import DatasetManifest


@dataclass(frozen=True)
class StageContext:
    """A stage about to run."""

    name: StageName
    recipe: Recipe
    layout: RunLayout
    fingerprint: str
    done: dict[str, Outputs]
    """Outputs of the stages before it."""

    def settings(self, **more: Any) -> dict[str, Any]:
        """What a worker group is told; its processes run in directories of their own."""
        return {
            "recipe": absolute_locations(self.recipe).model_dump(mode="json"),
            "output": self.layout.root,
            "fingerprint": self.fingerprint,
            "semantic_ids": self.done["tokenize"]["url"] if "tokenize" in self.done else None,
            **more,
        }

    def run_workers(self, entry: str, **more: Any) -> Any:
        """Run `module:function` on the recipe's worker group; begun anew, it begins at nothing."""
        return self._run(entry, False, more)

    def run_training(self, entry: str, **more: Any) -> Any:
        """As `run_workers`, of what goes on from its checkpoints with another number of workers."""
        return self._run(entry, True, more)

    def _run(self, entry: str, grows: bool, more: dict[str, Any]) -> Any:
        from launch.cluster import run_workers
        from launch.failures import Place

        recipe = self.recipe
        place = Place.of(self.layout, self.name, self.fingerprint)
        return run_workers(
            entry,
            self.settings(**more),
            recipe.cluster,
            recipe.failures,
            place,
            recipe.worker_sizes(),
            grows=grows,
        )


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
    check: Callable[[Outputs], None] | None = None
    """Raises ValueError, in a sentence, where a record's outputs are not what lies there now."""
    replaces_at_end: bool = False
    """Nothing of what the stage left before is touched until it succeeds, so that its record
    outlives an attempt that fails."""


# -- prepare ----------------------------------------------------------------------------------


def _prepare(context: StageContext) -> Outputs:
    from data_loaders.sequences import prepare
    from launch.shared_storage import check_inputs

    recipe, layout = context.recipe, context.layout
    check_inputs(recipe.data.source)
    manifest = prepare(recipe.data, recipe.name, layout.data, raw_url(recipe, layout))
    _check_features(recipe, manifest)
    return {
        "data": manifest.fingerprint,
        "settings": prepare_settings(recipe),
        "url": layout.data,
        "users": manifest.num_users,
        "items": manifest.num_items,
        "events": manifest.num_events,
    }


def _check_prepared_data(outputs: Outputs) -> None:
    from data_loaders.manifest import read_manifest

    if read_manifest(outputs["url"]).fingerprint != outputs["data"]:
        raise ValueError(f"{outputs['url']} holds another data set now")


def _check_features(recipe: Recipe, manifest: "DatasetManifest") -> None:
    """What the model looks up is there; of a public set that is known only now."""
    for kind, wanted, there in (
        ("user", recipe.model.user_features, manifest.user_features),
        ("side", recipe.model.side_features, manifest.side_features),
    ):
        unknown = [name for name in wanted if name not in there]
        if unknown:
            raise ValueError(
                f"model.{kind}_features names {', '.join(unknown)}, which the data set does not "
                f"have: there are {', '.join(there) or 'none'}"
            )
    if isinstance(recipe.model, FeatureInputs):
        recipe.model.check_events(
            rating=manifest.has_ratings, action=manifest.actions > 0, dwell=manifest.has_dwell_times
        )


# -- tokenize ---------------------------------------------------------------------------------


def _tokenize(context: StageContext) -> Outputs:
    from launch.cluster import check_resources
    from trainer.tokenize import tokenize

    config = context.recipe.tokenizer
    assert config is not None, "the tokenize stage exists only with a tokenizer block"
    url = context.layout.semantic_ids(context.fingerprint)
    recipe, data = context.recipe, context.layout.data
    device = recipe.cluster.device
    if device == "cuda":
        check_resources(recipe.cluster, "tokenize", {"GPU": 1})
    manifest = tokenize(config, data, url, seed=recipe.seed, say=say, device=device)
    return {"url": url, "semantic_ids": manifest.fingerprint}


def _check_table(outputs: Outputs) -> None:
    from data_loaders.semantic_ids import read_semantic_id_manifest

    if read_semantic_id_manifest(outputs["url"]).fingerprint != outputs["semantic_ids"]:
        raise ValueError(f"{outputs['url']} holds other semantic ids now")


# -- train ------------------------------------------------------------------------------------


def _train(context: StageContext) -> Outputs:
    module = "reward_model" if context.recipe.ranks_candidates else "pretrain"
    start = start_checkpoint(context.recipe)
    if start is not None:
        note_start(context.recipe, start)
    outputs: Outputs = context.run_training(f"trainer.{module}:train_worker", start=start)
    return {**outputs, "metrics": context.layout.metrics("train", context.fingerprint)}


# -- align ------------------------------------------------------------------------------------


def _align(context: StageContext) -> Outputs:
    layout, done, config = context.layout, context.done, context.recipe.alignment
    assert config is not None, "the align stage exists only with an alignment block"
    pairs, impressions = _pairs(context, config), _impressions(context, config)
    start = done["train"]["checkpoint"]
    outputs: Outputs = context.run_training(
        "trainer.align:align_worker",
        start=start,
        pairs=None if pairs is None else pairs["url"],
        reference=None
        if pairs is None
        else layout.reference(pairs["fingerprint"], weights_hash(start)),
    )
    return {
        **outputs,
        "pairs": pairs,
        "impressions": impressions,
        "metrics": layout.metrics("align", context.fingerprint),
    }


def _impressions(context: StageContext, config: AlignmentBase) -> dict[str, int] | None:
    """Count what alignment's rule of logged impressions says of them, if it learns from them."""
    from data_loaders.impressions import count_impressions

    if not isinstance(config, GBPOConfig) or config.logged is None:
        return None
    recipe = context.recipe
    return count_impressions(
        context.layout.data,
        config.logged.rule,
        latest=1 if config.prompts.position == "last" else recipe.data.loader.max_length,
        seed=recipe.seed,
        held_out=0.0 if config.rule is None else config.validation_share,
    )


def _pairs(context: StageContext, config: AlignmentBase) -> Outputs | None:
    """Build the pairs of alignment's rule, if it has one; where they are and what was counted."""
    from data_loaders.pairs import build_pairs

    if config.rule is None:
        return None
    recipe, layout = context.recipe, context.layout
    key = storage.fingerprint(
        [
            context.done["prepare"]["data"],
            *dump(config.rule),
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
        trains=isinstance(config, OfflineBase),
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


def _evaluate(context: StageContext) -> Outputs:
    from trainer.monitor.results import write_results

    done = context.done
    aligned = done.get("align")
    pairs = None if aligned is None else aligned["pairs"]
    module = "reward_model" if context.recipe.ranks_candidates else "evaluate"
    measured = context.run_workers(
        f"trainer.{module}:evaluate_worker",
        policies=measured_policies(done),
        pairs=None if pairs is None else pairs["url"],
    )
    write_results(context.layout.results, context.recipe, measured, aligned)
    return {"results": context.layout.results}


def _recommend(context: StageContext) -> Outputs:
    policy = list(policies_of(context.done).values())[-1]
    answer = context.run_workers("trainer.recommend:recommend_worker", policy=policy)
    storage.write_sealed(context.layout.recommendations, answer)
    return {"recommendations": context.layout.recommendations}


def _report(context: StageContext) -> Outputs:
    from trainer.monitor.report import write_report

    done = context.done
    return write_report(
        context.layout,
        metrics={s: done[s]["metrics"] for s in ("train", "align") if s in done},
        semantic_ids=done["tokenize"]["url"] if "tokenize" in done else None,
    )


def _trained_files(outputs: Outputs) -> list[str]:
    pairs = outputs.get("pairs")
    manifests = [] if pairs is None else [storage.join(pairs["url"], "manifest.json")]
    return [storage.join(outputs["checkpoint"]["url"], "MANIFEST.json"), *manifests]


def _check_checkpoint(outputs: Outputs) -> None:
    from sharding.checkpoint_manifest import look_over

    url = outputs["checkpoint"]["url"]
    try:
        look_over(url, outputs["checkpoint"]["hash"])
    except ValueError as error:
        raise ValueError(f"checkpoint {url} is damaged: {error}") from error


GRAPH: dict[StageName, Stage] = {
    "prepare": Stage(
        "prepare",
        (),
        True,
        prepare_inputs,
        _prepare,
        lambda outputs: [storage.join(outputs["url"], "manifest.json")],
        _check_prepared_data,
        replaces_at_end=True,
    ),
    "tokenize": Stage(
        "tokenize",
        ("prepare",),
        True,
        tokenize_inputs,
        _tokenize,
        lambda outputs: [storage.join(outputs["url"], "manifest.json")],
        _check_table,
    ),
    "train": Stage(
        "train",
        ("prepare", "tokenize"),
        True,
        train_inputs,
        _train,
        _trained_files,
        _check_checkpoint,
    ),
    "align": Stage(
        "align",
        ("prepare", "tokenize", "train"),
        True,
        align_inputs,
        _align,
        _trained_files,
        _check_checkpoint,
    ),
    "evaluate": Stage(
        "evaluate",
        ("prepare", "tokenize", "train", "align"),
        True,
        evaluate_inputs,
        _evaluate,
        lambda outputs: [outputs["results"]],
    ),
    "recommend": Stage(
        "recommend",
        ("prepare", "tokenize", "train", "align"),
        True,
        recommend_inputs,
        _recommend,
        lambda outputs: [outputs["recommendations"]],
    ),
    "report": Stage(
        "report",
        ("prepare", "tokenize", "train", "align", "evaluate", "recommend"),
        False,
        report_inputs,
        _report,
        lambda outputs: [outputs["report"]],
    ),
}
