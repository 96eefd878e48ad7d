"""Training that begins with another run's: old rows bit for bit, new ones as in a new model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_loaders.synthetic import write_synthetic
from models.base import TableModel
from sharding.checkpoint import CheckpointStore
from sharding.checkpoint_recut import same_rows
from sharding.checkpoint_tensors import CheckpointTensors
from sharding.parallelize import ParallelModel
from tests.data_loaders.test_continued import rename_items
from tests.harness import run_ranks
from tests.sharding.policies import differing, whole_state
from tests.trainer.runs import ITEMS, USERS, Pretrained, quiet, settings_of
from trainer.losses import pretraining_loss
from trainer.policy import Worker, parallelize_policy, start_worker
from trainer.pretrain import train_worker
from trainer.warm_start import WarmStart

NAMES = [f"item-{number}" for number in range(1, ITEMS + 1)]  # as the synthetic log writes them
GROWN = [*reversed(NAMES[5:]), *(f"new-{number}" for number in range(12))]
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"training": {"zero_stage": 3, "precision": "bf16"}, "sharding": {"default": "table_wise"}},
    {"training": {"zero_stage": 0}, "sharding": {"default": "replicated"}},
]


def grown_settings(pretrained: Pretrained, root: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Of a run over grown data that begins with the pretrained one."""
    training = {"start": {"run": str(pretrained.root)}} | layout.get("training", {})
    blocks = layout | {"training": training}
    return settings_of(root, "grown", blocks, start=pretrained.outputs["checkpoint"])


def policy_of(worker: Worker) -> ParallelModel:
    loss = pretraining_loss(worker)
    model: TableModel = loss.model
    recipe = worker.recipe
    return parallelize_policy(
        worker,
        model,
        loss,
        total_steps=10,
        optimizer=recipe.training.optimizer,
        sparse_lr=recipe.sharding.optimizer.lr,
    )


def begin(all_settings: list[dict[str, Any]]) -> list[tuple]:
    """State of a new model, state of one that begins with the other run's, and what was told."""
    outcomes = []
    for settings in all_settings:
        told: list[str] = []
        worker = start_worker(settings, told.append)
        fresh = whole_state(policy_of(worker))
        policy = policy_of(worker)
        WarmStart(worker, settings["start"])(policy, True)
        outcomes.append((fresh, whole_state(policy), told))
    return outcomes


def test_known_items_go_on_and_new_ones_begin(pretrained: Pretrained, tmp_path: Path) -> None:
    root = tmp_path / "grown"
    write_synthetic(str(root / "data"), USERS, len(GROWN), 9, 4, rows_per_group=16)
    names = rename_items(str(root / "data"), GROWN, 3)
    settings = [grown_settings(pretrained, root, layout) for layout in LAYOUTS]
    saved = CheckpointTensors(pretrained.outputs["checkpoint"]["url"])

    def before(key: str) -> Tensor:
        shape = saved.shape(key)
        return saved.rows(key, 0, shape[0] if shape else 1)

    known = torch.tensor([at for at, name in enumerate(names, 1) if name in NAMES])
    then = torch.tensor([NAMES.index(name) + 1 for name in names if name in NAMES])
    new = torch.tensor([0, *(at for at, name in enumerate(names, 1) if name not in NAMES)])
    for rank in run_ranks(2, begin, settings):
        for at, (fresh, state, told) in enumerate(rank):
            replicated = at == 2
            prefix = "dense/tables.item.weight/" if replicated else "tables/item."
            weight = state[prefix + "weight"]
            assert torch.equal(weight[known], before("tables/item.weight")[then])
            assert torch.equal(weight[new], fresh[prefix + "weight"][new])
            part = prefix + ("exp_avg_sq" if replicated else "momentum1")
            assert state[part][known].any() and not state[part][new].any()
            if not replicated:
                assert torch.equal(state[part][known], before("tables/item.momentum1")[then])
            dense = [key for key in saved.saved if key.startswith("dense/loss_module")]
            assert dense and all(torch.equal(state[key], before(key)) for key in dense)
            assert int(state["step"]) == 0 and state["adam_step"] == before("adam_step") > 0
            if told:  # by the first rank
                assert "table 'item': 35 rows go on, 12 are new" in told


def test_the_grown_run_trains_to_its_end_and_resumes(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    root = tmp_path / "grown"
    write_synthetic(str(root / "data"), USERS, len(GROWN), 9, 4, rows_per_group=16)
    rename_items(str(root / "data"), GROWN, 1)
    settings = grown_settings(pretrained, root, LAYOUTS[1])
    [outputs] = run_ranks(1, train_worker, settings, quiet)
    assert outputs["steps"] == 10
    [again] = run_ranks(1, train_worker, settings, quiet)
    assert again["checkpoint"] == outputs["checkpoint"]  # its own checkpoint, not the start's


@pytest.mark.parametrize("validated", [True, False])
def test_no_step_at_all_serves_the_weights_as_they_are(
    validated: bool, pretrained: Pretrained, tmp_path: Path
) -> None:
    root = tmp_path / "grown"
    write_synthetic(str(root / "data"), USERS, len(GROWN), 9, 4, rows_per_group=16)
    names = rename_items(str(root / "data"), GROWN, 1)
    validation = {} if validated else {"validation": None}
    settings = grown_settings(pretrained, root, {"training": {"max_steps": 0} | validation})
    [outputs] = run_ranks(1, train_worker, settings, quiet)
    assert outputs["steps"] == 0
    served = CheckpointTensors(outputs["checkpoint"]["url"])
    before = CheckpointTensors(pretrained.outputs["checkpoint"]["url"])
    known = torch.tensor([at for at, name in enumerate(names, 1) if name in NAMES])
    then = torch.tensor([NAMES.index(name) + 1 for name in names if name in NAMES])
    rows = [
        each.rows("tables/item.weight", 0, each.shape("tables/item.weight")[0])
        for each in (served, before)
    ]
    assert torch.equal(rows[0][known], rows[1][then])
    for key in before.saved:
        if key.startswith("dense/loss_module") and key.endswith("/weight"):
            count = before.shape(key)[0] if before.shape(key) else 1
            assert torch.equal(served.rows(key, 0, count), before.rows(key, 0, count)), key
    [again] = run_ranks(1, train_worker, settings, quiet)
    assert again["checkpoint"] == outputs["checkpoint"]


def add_then_remove(settings: dict[str, Any], root: str) -> None:
    """A table that the other run lacked begins; one that this model lacks is left out."""
    told: list[str] = []
    features = settings["recipe"]["model"] | {"user_features": ["segment"]}
    recipe = settings["recipe"] | {"model": features}
    worker = start_worker(settings | {"recipe": recipe}, told.append)
    rich, fresh = policy_of(worker), whole_state(policy_of(worker))
    WarmStart(worker, settings["start"])(rich, True)
    state = whole_state(rich)
    assert "table 'user_segment' is new: it begins with nothing" in told
    new = [key for key in state if "user_segment" in key]
    assert len(new) == 2 and all(torch.equal(state[key], fresh[key]) for key in new)

    store = CheckpointStore(root, 2, worker.ctx)
    info = store.save(rich, 1, {}, {}, {})
    plain = policy_of(start_worker(settings, quiet))
    store.load_warm(plain, info, {"item": same_rows})
    assert store.notes == ("table 'user_segment' is left out: no such table here",)
    assert differing({k: v for k, v in state.items() if k not in new}, whole_state(plain)) == []


def test_tables_may_be_added_and_removed(pretrained: Pretrained, tmp_path: Path) -> None:
    settings = grown_settings(pretrained, pretrained.root, {"training": {"precision": "bf16"}})
    run_ranks(1, add_then_remove, settings, str(tmp_path))


def refusals(cases: list[dict[str, Any]]) -> list[str]:
    sentences = []
    for settings in cases:
        worker = start_worker(settings, quiet)
        with pytest.raises(ValueError) as error:
            WarmStart(worker, settings["start"])(policy_of(worker), True)
        sentences.append(str(error.value))
    return sentences


def test_what_does_not_fit_is_refused_in_a_sentence(pretrained: Pretrained, tmp_path: Path) -> None:
    strange, grown = tmp_path / "strange", tmp_path / "grown"
    write_synthetic(str(strange / "data"), USERS, ITEMS, 9, 4, rows_per_group=16)
    rename_items(str(strange / "data"), [f"other-{number}" for number in range(ITEMS)], 1)
    write_synthetic(str(grown / "data"), USERS, len(GROWN), 9, 4, rows_per_group=16)
    rename_items(str(grown / "data"), GROWN, 1)
    moved = grown_settings(pretrained, grown, {})
    moved["recipe"]["training"]["start"]["run"] = str(grown)
    cases = {
        "no item of": grown_settings(pretrained, strange, {}),
        "not there any more": moved,
        "tables/item.weight": grown_settings(pretrained, grown, {"model": {"width": 12}}),
        "another architecture": grown_settings(pretrained, grown, {"model": {"num_layers": 2}}),
    }
    [sentences] = run_ranks(1, refusals, list(cases.values()))
    for part, sentence in zip(cases, sentences, strict=True):
        assert part in sentence and "\n" not in sentence, sentence
