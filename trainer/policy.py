"""Assemble a stage's policy on this rank: data set, model, tables, engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch

from configs.decoders import FeatureInputs
from configs.layout import RunLayout
from configs.models import HSTURankingConfig
from configs.recipe import Recipe
from configs.training import OptimizerConfig
from data_loaders.dataset import SequenceDataset
from data_loaders.items import action_names, train_counts
from data_loaders.semantic_ids import SemanticIds, read_semantic_ids
from models.base import CatalogueSizes, CodeDecoder, SequenceModel, TableModel
from models.build import build_decoder, build_model
from sharding.checkpoint import CheckpointInfo, CheckpointStore
from sharding.parallelize import LossModule, ParallelModel, parallelize
from sharding.process_group import DistributedContext, current_context
from trainer.code_catalogue import CodeCatalogue

Say = Callable[[str], None]
TRAVELLING_VERSIONS = ("torch", "torchrec", "deepspeed", "ray", "pyarrow")


@dataclass(frozen=True)
class Worker:
    """What every stage's worker starts from."""

    recipe: Recipe
    layout: RunLayout
    fingerprint: str
    """Of the stage's settings and inputs."""
    ctx: DistributedContext
    dataset: SequenceDataset
    semantic_ids: SemanticIds | None
    say: Say

    def tell(self, line: str) -> None:
        """Print a line on the terminal of the run, once."""
        if self.ctx.rank == 0:
            self.say(line)

    @property
    def num_items(self) -> int:
        """Items of the catalogue."""
        return self.dataset.manifest.num_items

    @cached_property
    def catalogue(self) -> CodeCatalogue:
        """Semantic ids on the device; made when first asked for, and kept to the stage's end."""
        assert self.semantic_ids is not None, "a recipe that writes codes has a tokenizer"
        counts = train_counts(self.layout.data)
        return CodeCatalogue.build(self.semantic_ids, counts, self.ctx.device)


def start_worker(settings: dict[str, Any], say: Say) -> Worker:
    """Join the process group, seed, and open the prepared data set.

    Args:
        settings: `recipe` (resolved, JSON), `output` (absolute URL of the run), `fingerprint` (of
            the stage) and `semantic_ids` (URL, or null where the recipe has no tokenizer).
        say: prints a line at the driver.
    """
    recipe = Recipe.model_validate(settings["recipe"])
    torch.set_num_threads(recipe.cluster.threads_per_worker)
    ctx = current_context(recipe.cluster.device)
    recipe = _fewer_workers(recipe, ctx.world_size)
    torch.manual_seed(recipe.seed)
    layout = RunLayout(settings["output"])
    dataset = SequenceDataset(layout.data, recipe.data.loader.cached_row_groups)
    codes_url = settings["semantic_ids"]
    semantic_ids = None
    if codes_url is not None:
        semantic_ids = read_semantic_ids(codes_url, data_fingerprint=dataset.manifest.fingerprint)
    fingerprint = settings["fingerprint"]
    return Worker(recipe, layout, fingerprint, ctx, dataset, semantic_ids, say)


def _fewer_workers(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with micro batches as large as the whole group's have, where fewer workers run."""
    loader = recipe.data.loader
    accumulation = -(-loader.accumulation * recipe.cluster.num_workers // world_size)
    if recipe.cluster.min_workers is None or accumulation == loader.accumulation:
        return recipe
    loader = loader.model_copy(update={"accumulation": accumulation})
    data = recipe.data.model_copy(update={"loader": loader})
    return recipe.model_copy(update={"data": data})


def build_sequence_model(worker: Worker) -> SequenceModel:
    """The recipe's model that scores items, sized by the data set."""
    recipe = worker.recipe
    assert not isinstance(recipe.model, FeatureInputs | HSTURankingConfig), "see a recipe's checks"
    sizes = catalogue_sizes(worker)
    return build_model(recipe.model, sizes, recipe.tables, recipe.data.loader.max_length)


def build_code_decoder(worker: Worker) -> CodeDecoder:
    """The recipe's model that writes semantic ids, sized by the data set and its codes."""
    recipe = worker.recipe
    assert isinstance(recipe.model, FeatureInputs), "a recipe's checks tell decoders apart"
    sizes = catalogue_sizes(worker)
    return build_decoder(recipe.model, sizes, recipe.tables, recipe.data.loader.max_length)


def catalogue_sizes(worker: Worker) -> CatalogueSizes:
    """What sizes the model's tables and vocabularies."""
    manifest, semantic_ids = worker.dataset.manifest, worker.semantic_ids
    return CatalogueSizes(
        num_items=manifest.num_items,
        num_users=manifest.num_users,
        user_features=manifest.user_features,
        side_features=manifest.side_features,
        codebook_sizes=() if semantic_ids is None else semantic_ids.codebook_sizes,
        num_actions=manifest.actions,
        action_names=action_names(worker.layout.data),
        has_dwell_times=manifest.has_dwell_times,
        labels=manifest.labels,
    )


def parallelize_policy(
    worker: Worker,
    model: TableModel,
    loss_module: LossModule,
    *,
    total_steps: int,
    optimizer: OptimizerConfig,
    sparse_lr: float,
) -> ParallelModel:
    """Shard, wrap, and print the plan."""
    started = time.monotonic()
    policy = parallelize(
        loss_module,
        model.table_specs(),
        worker.recipe,
        worker.ctx,
        total_steps=total_steps,
        optimizer=optimizer,
        sparse_lr=sparse_lr,
    )
    worker.tell(policy.tables.plan.render())
    training = worker.recipe.training
    worker.tell(
        f"dense half: {policy.engine.num_parameters:,} parameters, ZeRO {training.zero_stage}, "
        f"{training.precision}, {worker.ctx.world_size} ranks "
        f"({time.monotonic() - started:.1f} s)"
    )
    return policy


def provenance(worker: Worker, **hashes: str) -> dict[str, str]:
    """Hashes and versions that travel with a checkpoint."""
    versions = {f"version/{name}": version(name) for name in TRAVELLING_VERSIONS}
    return {**_meanings(worker), **hashes, **versions}


def _meanings(worker: Worker) -> dict[str, str]:
    """Hashes of what gives ids and codes their meaning."""
    hashes = {"data": worker.dataset.manifest.fingerprint}
    if worker.semantic_ids is not None:
        hashes["semantic_ids"] = worker.semantic_ids.fingerprint
    return hashes


def refuse_other_meanings(worker: Worker, info: CheckpointInfo) -> None:
    """Refuse weights that were trained on other ids or codes than the run has now.

    Raises:
        ValueError: names the checkpoint and what differs.
    """
    for name, now in _meanings(worker).items():
        then = info.fingerprints.get(name)
        if then != now:
            what = {"data": "data set", "semantic_ids": "semantic ids"}[name]
            raise ValueError(
                f"checkpoint {info.url} was trained on {what} {str(then)[:12]}, but the run has "
                f"{now[:12]} now, so its weights would mean other items; restore the {what}, or "
                f"train again with `tandem {RunLayout.stage_of(info.url)} RECIPE --force`"
            )


def checkpoint_reference(info: CheckpointInfo) -> dict[str, Any]:
    """How a stage's outputs name a checkpoint."""
    return {"url": info.url, "hash": info.hash, "weights": info.weights, "step": info.step}


def open_checkpoint(
    worker: Worker, reference: dict[str, Any]
) -> tuple[CheckpointStore, CheckpointInfo]:
    """The verified checkpoint that an earlier stage named.

    Raises:
        ValueError: it is gone, damaged, another one lies there now, or it was trained on other
            data.
    """
    store, info = named_checkpoint(worker, reference)
    refuse_other_meanings(worker, info)
    return store, info


def named_checkpoint(
    worker: Worker, reference: dict[str, Any]
) -> tuple[CheckpointStore, CheckpointInfo]:
    """As `open_checkpoint`, whatever data it was trained on.

    Raises:
        ValueError: it is gone, damaged, or another one lies there now.
    """
    root, name = reference["url"].rsplit("/", 1)
    store = CheckpointStore(root, keep=2, ctx=worker.ctx)
    info = store.at(name)
    if info is None or info.hash != reference["hash"]:
        why = f" ({'; '.join(store.skipped)})" if store.skipped else ""
        raise ValueError(
            f"checkpoint {reference['url']} is missing, damaged or changed since its stage ended"
            f"{why}; {_mend(root)}"
        )
    return store, info


def _mend(root: str) -> str:
    """What to do about a checkpoint that a stage ended with, which loses nothing that is whole."""
    return (
        f"restore its files, or remove that directory and run `tandem {RunLayout.stage_of(root)} "
        "RECIPE` of its run, which goes on with what is whole"
    )
