"""Small runs for tests of the workers: settings as the launcher gives them, rows read plainly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from configs.layout import RunLayout
from configs.measured import GROUPS, training_metrics, validation_metrics
from configs.recipe import Recipe
from data_loaders.manifest import read_manifest
from models.batch import JaggedBatch
from sharding.parallelize import ParallelModel
from trainer.monitor.tracker import read_rows

USERS, ITEMS, LENGTH = 80, 40, 8
PER_STEP = 16
STEPS_PER_EPOCH = USERS // PER_STEP


def settings_of(root: Path, fingerprint: str, blocks: dict[str, Any], **more: Any) -> dict:
    """What a worker of the run below `root` is told; `blocks` replace settings of the recipe."""
    recipe: dict[str, Any] = {
        "name": "small",
        "output": str(root),
        "seed": 3,
        "data": {
            "source": {"kind": "public", "name": "ml-100k"},
            "loader": {"global_batch": PER_STEP, "max_length": LENGTH, "prefetch": 0},
        },
        "model": {"kind": "hstu", "width": 8, "qk_width": 8, "v_width": 8, "num_layers": 1},
        "sharding": {"default": "row_wise"},
        # Positives of the whole batch are among the negatives, so that ranks must exchange them.
        "objective": {"kind": "sampled_softmax", "negatives": "mixed", "shared": "batch"}
        | {"num_negatives": 8, "in_batch_negatives": 16},
        "training": {"epochs": 2, "log_every_steps": 1},
        "alignment": {
            "kind": "dpo",
            "epochs": 2,
            "pairs_per_step": 32,
            "log_every_steps": 1,
            "rule": {"kind": "rating", "window": 6, "pairs_per_user": 4, "min_context": 1},
            "validation_share": 0.3,
            "checkpoint": {"every_steps": 2},
        },
        "evaluation": {"ks": [1, 5, 10], "users_per_batch": 16},
        "cluster": {"num_workers": 1},
    }
    recipe = Recipe.model_validate(_merged(recipe, blocks)).model_dump(mode="json")
    settings = {"recipe": recipe, "output": str(root), "fingerprint": fingerprint}
    return settings | {"semantic_ids": None, "start": None} | more


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins; a block of another kind replaces the whole block."""
    both = {}
    for key, value in over.items():
        below = base.get(key)
        same_kind = isinstance(value, dict) and isinstance(below, dict)
        same_kind = same_kind and value.get("kind", below.get("kind")) == below.get("kind")
        both[key] = _merged(below, value) if same_kind else value
    return base | both


@dataclass(frozen=True)
class Pretrained:
    """A run that `prepare` and `train` have finished, with pairs to align on."""

    root: Path
    pairs: str
    outputs: dict[str, Any]

    @property
    def users(self) -> list[dict[str, Any]]:
        """All users as the data set's files have them, by user id."""
        data = self.root / "data"
        shards = read_manifest(str(data)).shards
        return [row for shard in shards for row in pq.read_table(data / shard.path).to_pylist()]


def quiet(line: str) -> None:
    """A `say` for what nobody reads."""


def logged(root: Path, stage: str, fingerprint: str) -> dict[int, dict[str, float]]:
    """Step → what a stage measured at it, without what depends on the clock."""
    rows: dict[int, dict[str, float]] = {}
    for row in read_rows(RunLayout(str(root)).metrics(stage, fingerprint)):
        kept = {k: v for k, v in row.values.items() if k.startswith(("train/", "validation/"))}
        assert not rows.get(row.step, {}).keys() & kept.keys(), f"step {row.step} is there twice"
        rows.setdefault(row.step, {}).update(kept)
    return rows


def assert_named(settings: dict[str, Any], rows: dict[int, dict[str, float]]) -> None:
    """An alignment measures exactly what recipes are held to; of groups, what has users."""
    recipe = Recipe.model_validate(settings["recipe"])
    assert recipe.alignment is not None
    codes, judged = recipe.writes_codes, recipe.alignment.rule is not None
    found = {tag.removeprefix("train/") for tag in rows[1] if tag.startswith("train/")}
    known = set(training_metrics(recipe.alignment))
    assert found - {"lr", "sparse_lr", "dense_grad_norm"} == known
    if recipe.alignment.validation is None:
        assert 0 not in rows
        return
    measured = validation_metrics(
        recipe.objective, recipe.evaluation.ks, judged=judged, writes_codes=codes
    )
    found = {tag.removeprefix("validation/") for tag in rows[0]}
    found = {name for name in found if not name.startswith("users")}
    assert found <= set(measured)
    assert {name for name in measured if not name.removesuffix("/id").endswith(GROUPS[1:])} <= found


def query_of(policy: ParallelModel, row: dict[str, Any], history: slice, request: int) -> Tensor:
    """Query [D] of one user alone, from a row of Parquet, at time `request`."""
    items, times = row["item_ids"][history], row["timestamps"][history]
    batch = JaggedBatch(
        sample_ids=torch.tensor([0]),
        user_ids=torch.tensor([row["user_id"]]),
        offsets=torch.tensor([0, len(items)]),
        item_ids=torch.tensor(items),
        timestamps=torch.tensor(times),
        next_timestamps=torch.tensor([*times[1:], request]),
        target_ids=torch.zeros(len(items), dtype=torch.int64),
    )
    return policy.query(batch)[-1]


def all_keys(policy: ParallelModel) -> Tensor:
    """Keys [V, D] of the whole catalogue."""
    return policy.item_keys(torch.arange(1, ITEMS + 1))
