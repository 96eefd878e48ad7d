"""A reward model as a run: the same on every world size, resumed, measured plainly, and asked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import storage
from configs.evaluation import EvaluationConfig
from configs.layout import RunLayout
from data_loaders.histories import held_out_batches
from data_loaders.synthetic import LABELS, write_synthetic
from models.batch import JaggedBatch
from tests.harness import run_ranks
from tests.models.sequences import take
from tests.trainer.runs import LENGTH, logged, quiet, settings_of
from trainer.align import align_worker
from trainer.policy import start_worker
from trainer.pretrain import train_worker as pretrain_worker
from trainer.reward_model import evaluate_worker, open_reward_model, train_worker

USERS, ITEMS = 60, 30
BLOCKS: dict[str, Any] = {
    "model": {"kind": "hstu_ranking", "width": 8, "num_layers": 1, "num_heads": 1, "qk_width": 8}
    | {"v_width": 8, "mlp_width": 16, "head_width": 16, "action_width": 4, "dropout": 0.1}
    | {"user_features": ["segment"], "side_features": ["genre"]},
    "objective": {
        "kind": "multi_task",
        "candidates": 3,
        "tasks": [
            {"kind": "label", "label": "hate"},
            {"kind": "dwell", "weight": 0.1},
            {"kind": "label", "label": "like"},
        ],
        "p_score": {"weights": {"like": 1.0, "hate": -1.0}},
    },
    "training": {
        "epochs": 2,
        "log_every_steps": 1,
        "optimizer": {"lr": 5e-3},
        "validation": {"metric": "auc"},
    },
    "evaluation": {"ks": EvaluationConfig().ks},  # it ranks no catalogue
    "alignment": None,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward")
    more = {"ratings": False, "labels": True, "dwell_times": True}
    write_synthetic(str(path / "data"), USERS, ITEMS, 9, 3, rows_per_group=16, **more)
    return path


@pytest.fixture(scope="module")
def outputs(root: Path) -> dict[str, Any]:
    [found] = run_ranks(1, train_worker, settings_of(root, "one", BLOCKS), quiet)
    record = {"outputs": found}
    storage.write_json(RunLayout(str(root)).stage_record("train"), record)
    return found


def test_the_world_changes_nothing_and_selection_is_by_auc(
    root: Path, outputs: dict[str, Any]
) -> None:
    alone = logged(root, "train", "one")
    more = {**BLOCKS, "cluster": {"num_workers": 2}}
    found = run_ranks(2, train_worker, settings_of(root, "two", more), quiet)
    assert found[0] == found[1]
    shared = logged(root, "train", "two")
    assert shared.keys() == alone.keys()
    for step, row in alone.items():
        for tag in ("train/loss", "train/loss_hate", "train/loss_dwell", "train/loss_p_score"):
            assert shared[step][tag] == pytest.approx(row[tag], rel=1e-3), (step, tag)
    steps = sorted(alone)
    assert alone[steps[-1]]["train/loss"] < alone[steps[0]]["train/loss"]
    aucs = [row["validation/auc"] for row in alone.values() if "validation/auc" in row]
    assert outputs["best_value"] == max(aucs) and len(aucs) == 2


def interrupting(line: str) -> None:
    if line.startswith("validation after epoch 2"):
        raise InterruptedError


def train_until(settings: dict[str, Any]) -> None:
    try:
        train_worker(settings, interrupting)
    except InterruptedError:
        return
    raise AssertionError("it was not interrupted")


def test_going_on_after_an_interruption_changes_no_loss(
    root: Path, outputs: dict[str, Any]
) -> None:
    settings = settings_of(root, "cut", BLOCKS)
    run_ranks(1, train_until, settings)
    run_ranks(1, train_worker, settings, quiet)
    whole, again = (logged(root, "train", name) for name in ("one", "cut"))
    assert again == whole


def asked(settings: dict[str, Any], url: str) -> dict[str, Any]:
    """Scores of test events one request at a time, all at once, and of other candidates."""
    worker = start_worker(settings, quiet)
    scorer = open_reward_model(worker, url)
    batch = next(iter(_test_batches(worker)))
    contexts, ids = batch
    together = scorer.score(contexts, ids)
    alone = [
        scorer.score(_only(contexts, b), ids[b : b + 1, :2]) for b in range(contexts.num_sequences)
    ]
    with pytest.raises(ValueError, match="carry no labels"):
        scorer.score(replace(contexts, labels=None), ids)
    with pytest.raises(ValueError, match="holds no trained model"):
        open_reward_model(worker, url + "/nowhere")
    return {"together": together, "alone": alone, "outputs": scorer.outputs}


def _test_batches(worker: Any) -> Any:
    for batch, first in held_out_batches(
        worker.dataset, "test", users_per_batch=16, max_length=3 * LENGTH, rank=0, world_size=1
    ):
        draw = torch.Generator().manual_seed(1)
        yield batch, torch.randint(1, ITEMS + 1, (len(first), 5), generator=draw)


def _only(batch: JaggedBatch, b: int) -> JaggedBatch:
    assert batch.labels is not None
    own = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
    return replace(take(batch, [b]), labels=batch.labels[own])


def test_scores_of_candidates_depend_on_their_own_request_alone(
    root: Path, outputs: dict[str, Any]
) -> None:
    [found] = run_ranks(1, asked, settings_of(root, "asked", BLOCKS), str(root))
    assert found["outputs"] == ("hate", "dwell", "like", "p_score")
    for name, values in found["together"].items():
        assert values.shape[1] == 5
        for b, own in enumerate(found["alone"]):
            torch.testing.assert_close(own[name][0], values[b, :2], rtol=1e-4, atol=1e-5)
        assert (values >= 0).all() and (name == "dwell" or (values <= 1).all())
        assert values.std() > 1e-4


def test_evaluation_is_the_same_on_two_ranks_and_stands_beside_item_rates(
    root: Path, outputs: dict[str, Any]
) -> None:
    policies = {"policies": {"pretrained": outputs["checkpoint"]}, "pairs": None}
    settings = settings_of(root, "evaluate", BLOCKS, **policies)
    [alone] = run_ranks(1, evaluate_worker, settings, quiet)
    shared = run_ranks(2, evaluate_worker, settings, quiet)
    assert shared[0] == shared[1]
    assert set(alone["models"]) == {"item rates", "reward model"}
    assert alone["protocol"]["candidates"] == "logged events"
    for name, model in alone["models"].items():
        for part in ("validation", "test"):
            other = shared[0]["models"][name][part]
            assert other == pytest.approx(model[part], rel=1e-3, abs=2e-3)
            assert set(model["calibration"]) == {"hate", "like"} < set(LABELS)
        # Users of three events or more have one of them in each part.
        assert model["test"]["events"] == model["validation"]["events"] > USERS / 2
    found = alone["models"]["reward model"]["test"]
    only_the_models = {"r2/dwell", "auc/p_score:like", "auc/p_score:no_hate"}
    assert only_the_models <= found.keys()
    assert not only_the_models & alone["models"]["item rates"]["test"].keys()
    assert found["auc"] == pytest.approx((found["auc/hate"] + found["auc/like"]) / 2)


def test_a_policy_is_aligned_by_the_reward_model(root: Path, outputs: dict[str, Any]) -> None:
    blocks: dict[str, Any] = {"alignment": None, "evaluation": {"ks": [10], "users_per_batch": 16}}
    [start] = run_ranks(1, pretrain_worker, settings_of(root, "policy", blocks), quiet)
    blocks["alignment"] = {
        "kind": "grpo",
        "rule": None,
        "epochs": 8,
        "prompts": {"per_step": 32},
        "generation": {"kind": "ancestral", "samples": 6},
        "rewards": [{"kind": "model", "run": str(root), "tasks": {"like": 1.0, "p_score": 0.5}}],
        "log_every_steps": 1,
        "supervised_weight": 0.0,
        "optimizer": {"lr": 0.01},
    }
    urls = {"pairs": None, "reference": None, "start": start["checkpoint"]}
    measured = []
    for workers in (1, 2):
        name = f"aligned-{workers}"
        more = {**blocks, "cluster": {"num_workers": workers}}
        run_ranks(workers, align_worker, settings_of(root, name, more, **urls), quiet)
        measured.append(logged(root, "align", name))
    alone, shared = ([row for step, row in sorted(rows.items()) if step] for rows in measured)
    rewards = [row["train/reward/model"] for row in alone if "train/reward/model" in row]
    assert shared[0]["train/reward/model"] == pytest.approx(rewards[0], rel=1e-4)
    assert 0 < rewards[0] < 1.5
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4  # it is what the policy learns
