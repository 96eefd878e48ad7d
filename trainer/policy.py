"""Assemble a stage's policy on this rank: data set, model, tables, engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from configs.layout import RunLayout
from configs.recipe import Recipe
from configs.training import OptimizerConfig
from data_loaders.dataset import SequenceDataset
from models.base import CatalogueSizes, SequenceModel
from models.build import build_model
from sharding.checkpoint import CheckpointInfo, CheckpointStore
from sharding.parallelize import LossModule, ParallelModel, parallelize
from sharding.process_group import DistributedContext, current_context

Say = Callable[[str], None]
TRAVELLING_VERSIONS = ("torch", "torchrec", "deepspeed", "ray", "pyarrow")


@dataclass(frozen=True)
class Worker:
    """What every stage's worker starts from."""

    recipe: Recipe
    layout: RunLayout
    ctx: DistributedContext
    dataset: SequenceDataset
    say: Say

    def tell(self, line: str) -> None:
        """Print a line on the terminal of the run, once."""
        if self.ctx.rank == 0:
            self.say(line)

    @property
    def num_items(self) -> int:
        """Items of the catalogue."""
        return self.dataset.manifest.num_items


def start_worker(settings: dict[str, Any], say: Say) -> Worker:
    """Join the process group, seed, and open the prepared data set.

    Args:
        settings: `recipe` (resolved, JSON) and `output` (absolute URL of the run).
        say: prints a line at the driver.
    """
    recipe = Recipe.model_validate(settings["recipe"])
    torch.set_num_threads(recipe.cluster.threads_per_worker)
    ctx = current_context(recipe.cluster.device)
    torch.manual_seed(recipe.seed)
    layout = RunLayout(settings["output"])
    dataset = SequenceDataset(layout.data, recipe.data.loader.cached_row_groups)
    return Worker(recipe, layout, ctx, dataset, say)


def build_sequence_model(worker: Worker) -> SequenceModel:
    """The recipe's model, sized by the data set."""
    manifest = worker.dataset.manifest
    sizes = CatalogueSizes(
        num_items=manifest.num_items,
        num_users=manifest.num_users,
        user_features=manifest.user_features,
        side_features=manifest.side_features,
    )
    recipe = worker.recipe
    return build_model(recipe.model, sizes, recipe.tables, recipe.data.loader.max_length)


def parallelize_policy(
    worker: Worker,
    model: SequenceModel,
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
    return {"data": worker.dataset.manifest.fingerprint, **hashes, **versions}


def checkpoint_reference(info: CheckpointInfo) -> dict[str, Any]:
    """How a stage's outputs name a checkpoint."""
    return {"url": info.url, "hash": info.hash, "step": info.step}


def open_checkpoint(
    worker: Worker, reference: dict[str, Any]
) -> tuple[CheckpointStore, CheckpointInfo]:
    """The verified checkpoint that an earlier stage named.

    Raises:
        ValueError: it is gone, damaged, or another one lies there now.
    """
    root = reference["url"].rsplit("/", 1)[0]
    store = CheckpointStore(root, keep=2, ctx=worker.ctx)
    info = store.newest()
    if info is None or info.hash != reference["hash"]:
        raise ValueError(
            f"checkpoint {reference['url']} is missing, damaged or changed since its stage ended; "
            "run that stage again with --force"
        )
    return store, info
