"""Pretraining, evaluation and recommendation of a model that writes semantic ids, on real ranks."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from data_loaders.evaluation import evaluation_batches
from data_loaders.items import ItemFeature, train_counts
from data_loaders.semantic_ids import write_semantic_ids
from data_loaders.synthetic import write_synthetic
from models.base import CodeDecoder, TableModel
from models.generation.log_probs import sequence_log_probs
from tests.harness import run_ranks
from tests.trainer.runs import ITEMS, STEPS_PER_EPOCH, USERS, logged, quiet, settings_of
from trainer.allow_lists import AllowLists
from trainer.codes import last_requests, with_codes
from trainer.evaluate import evaluate_worker, evaluation_policy, load_policy
from trainer.generate import ItemGenerator
from trainer.policy import start_worker
from trainer.pretrain import train_worker
from trainer.recommend import recommend_worker

SIZES = (4, 4, 4)
BLOCKS: dict[str, Any] = {
    "tokenizer": {"embeddings": [{"kind": "text"}], "collisions": "keep"},
    "model": {
        "kind": "lazy_decoder",
        "width": 8,
        "num_heads": 2,
        "num_layers": 2,
        "feedforward_width": 8,
        "history": 4,
        "item_table": True,
    },
    "objective": {"kind": "next_code", "normalization": "catalogue"},
    "generation": {"beams": 64},
    "alignment": None,
}


def settings_for(root: Path, fingerprint: str, workers: int = 1, **more: Any) -> dict[str, Any]:
    blocks = BLOCKS | {"cluster": {"num_workers": workers}}
    return settings_of(root, fingerprint, blocks, semantic_ids=str(root / "codes"), **more)


def write_run(root: Path) -> None:
    """A data set and semantic ids, two of them the same."""
    write_synthetic(str(root / "data"), USERS, ITEMS, 9, 3, rows_per_group=16)
    codes = torch.randint(0, 4, (ITEMS + 1, 3), generator=torch.Generator().manual_seed(5))
    codes[2] = codes[1]
    write_semantic_ids(str(root / "codes"), str(root / "data"), codes, SIZES, tokenizer="random")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two epochs on one rank; items have random ids, some of them the same."""
    root: Path = tmp_path_factory.mktemp("codes")
    write_run(root)
    [outputs] = run_ranks(1, train_worker, settings_for(root, "one"), quiet)
    return root, outputs


def test_the_world_changes_no_loss(run: tuple[Path, dict[str, Any]]) -> None:
    root, _ = run
    outputs = run_ranks(2, train_worker, settings_for(root, "two", 2), quiet)
    assert outputs[0] == outputs[1]
    alone, shared = logged(root, "train", "one"), logged(root, "train", "two")
    assert list(alone) == list(shared) == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    for step, row in alone.items():
        assert shared[step]["train/loss"] == pytest.approx(row["train/loss"], rel=1e-4)
    assert alone[2 * STEPS_PER_EPOCH]["train/loss"] < alone[1]["train/loss"]


def exhaustive(settings: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Every user's offer, and the scores of all items by teacher forcing each of their ids."""
    worker = start_worker(settings, quiet)
    policy = evaluation_policy(worker)
    load_policy(worker, policy, reference)
    counts = train_counts(worker.layout.data)
    generator = ItemGenerator(worker, policy)
    assert worker.semantic_ids is not None
    codes = worker.semantic_ids.codes.long()
    [users] = evaluation_batches(
        worker.dataset, "test", users_per_batch=USERS, max_length=8, rank=0, world_size=1
    )
    offer = generator.offer(users, 10, filter_seen=True)
    even = torch.arange(ITEMS + 1) % 2 == 0
    listed = torch.arange(len(users.target_ids)) % 3 == 0  # the others may get everything
    lists = AllowLists(torch.stack([torch.ones_like(even), even]), listed.long())
    allowed = generator.offer(users, 10, filter_seen=True, lists=lists)
    seen = [part.tolist() for part in users.seen_ids.split(users.seen_offsets.diff().tolist())]
    batch = with_codes(last_requests(policy.model, users.batch), codes)  # type: ignore[arg-type]

    def use(model: TableModel, embeddings: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        assert isinstance(model, CodeDecoder)
        context = model.encode(batch, embeddings, 0, "last")
        every = []
        for item in range(1, ITEMS + 1):
            asked = codes[item].expand(batch.num_sequences, -1)
            logits = model.teacher_forced(context, asked)
            exclude = torch.zeros(batch.num_sequences, max(map(len, seen)), dtype=torch.int64)
            for row, items in enumerate(seen):
                kept = [i for i in items if i != users.target_ids[row]]
                exclude[row, : len(kept)] = torch.tensor(kept)
            every.append(sequence_log_probs(logits, asked, generator.trie, exclude=exclude).sum(1))
        return every

    scores = torch.stack(policy.infer(batch, use), dim=1)
    return {
        "items": offer.items.tolist(),
        "scores": offer.scores.tolist(),
        "even": allowed.items.tolist(),
        "all": scores.tolist(),
        "seen": seen,
        "targets": users.target_ids.tolist(),
        "counts": counts.tolist(),
    }


def test_offers_are_the_best_of_all_items(run: tuple[Path, dict[str, Any]]) -> None:
    root, outputs = run
    settings = settings_for(root, "one")
    [found] = run_ranks(1, exhaustive, settings, outputs["checkpoint"])
    hits = 0
    for row, items in enumerate(found["items"]):
        target, scores = found["targets"][row], found["all"][row]
        hidden = {item for item in found["seen"][row] if item != target}
        rivals = [item for item in range(1, ITEMS + 1) if item not in hidden]
        counts = found["counts"]
        rivals.sort(key=lambda i: (-round(scores[i - 1], 4), -counts[i - 1], i))
        offered = [round(score, 3) for score in found["scores"][row]]
        assert offered == pytest.approx([scores[i - 1] for i in rivals[:10]], abs=2e-3)
        assert not hidden & set(items) and len(set(items)) == 10
        hits += target in items
        if row % 3:
            assert found["even"][row] == items
            continue
        even = set(found["even"][row]) - {0}
        left = [item for item in rivals if item % 2 == 0]
        assert even <= set(left) and len(even) == min(10, len(left))
    [answer] = run_ranks(
        1,
        evaluate_worker,
        settings_for(root, "one", policies={"pretrained": outputs["checkpoint"]}, pairs=None),
        quiet,
    )
    metrics = answer["models"]["pretrained"]["test"]
    assert metrics["hr@10"] == pytest.approx(hits / len(found["items"]))
    assert metrics["legality"] == 1.0
    for name in ("hr@10", "ndcg@10", "mrr", "hr@10/head", "hr@10/tail", "mrr/tail"):
        assert metrics[f"{name}/id"] >= metrics[name], name  # an id names every item that has it
    heads = metrics["users/head"] / metrics["users"]
    both = heads * metrics["hr@10/head/id"] + (1 - heads) * metrics["hr@10/tail/id"]
    assert both == pytest.approx(metrics["hr@10/id"]) and 0 < heads < 1
    assert not {"users/id", "coverage@10/id"} & set(metrics)


def test_every_rank_counts_once(run: tuple[Path, dict[str, Any]]) -> None:
    root, outputs = run
    more = {"policies": {"pretrained": outputs["checkpoint"]}, "pairs": None}
    [alone] = run_ranks(1, evaluate_worker, settings_for(root, "one", **more), quiet)
    both = run_ranks(2, evaluate_worker, settings_for(root, "one", 2, **more), quiet)
    for answer in both:
        for part, metrics in alone["models"]["pretrained"].items():
            if part in ("validation", "test"):
                assert answer["models"]["pretrained"][part] == pytest.approx(metrics, abs=1e-9)


def test_recommendations_name_unseen_items(run: tuple[Path, dict[str, Any]]) -> None:
    root, outputs = run
    settings = settings_for(root, "one", policy=outputs["checkpoint"])
    [answer] = run_ranks(1, recommend_worker, settings, quiet)
    assert len(answer["users"]) == 3
    for user in answer["users"]:
        assert len(set(user["items"])) == 10 and user["scores"] == sorted(user["scores"])[::-1]


LISTED: dict[str, Any] = {
    "kind": "csv",
    "url": "log.csv",
    "item_text": {"url": "items.csv", "features": ["kind"]},
}
KINDS = ItemFeature(
    torch.tensor([0, *(1 + item % 2 for item in range(1, ITEMS + 1))], dtype=torch.int32),
    ("even", "odd"),
)


def recommended(settings: dict[str, Any]) -> dict[str, Any]:
    """Of a data set whose items are even or odd."""
    with mock.patch("trainer.allow_lists.item_feature", return_value=KINDS):
        return recommend_worker(settings, quiet)


def test_users_get_what_their_own_lists_allow(run: tuple[Path, dict[str, Any]]) -> None:
    root, outputs = run
    settings = settings_for(root, "one", workers=2, policy=outputs["checkpoint"])
    names = [user["user"] for user in recommended_by(2, settings, {})]
    asked = {
        "users": names[::-1],
        "allow": [{"feature": "kind", "values": ["even"]}],
        "allow_for": {names[0]: [{"feature": "kind", "values": ["odd"]}], names[1]: []},
    }
    answer = recommended_by(2, settings, asked)
    assert [user["user"] for user in answer] == names[::-1]
    kinds = [{int(item.removeprefix("item-")) % 2 for item in user["items"]} for user in answer]
    assert kinds == [{0}, {0, 1}, {1}]


def recommended_by(workers: int, settings: dict[str, Any], asked: dict[str, Any]) -> list[Any]:
    recipe = settings["recipe"] | {"recommend": settings["recipe"]["recommend"] | asked}
    recipe["data"] = recipe["data"] | {"source": LISTED}
    users: list[Any] = run_ranks(workers, recommended, settings | {"recipe": recipe})[0]["users"]
    return users


def refuse(settings: dict[str, Any], reference: dict[str, Any]) -> str:
    worker = start_worker(settings, quiet)
    try:
        load_policy(worker, evaluation_policy(worker), reference)
    except ValueError as error:
        return str(error)
    return ""


def test_weights_of_other_semantic_ids_are_refused(run: tuple[Path, dict[str, Any]]) -> None:
    root, outputs = run
    other = str(root / "other_codes")
    codes = torch.zeros(ITEMS + 1, 3, dtype=torch.int64)
    write_semantic_ids(other, str(root / "data"), codes, SIZES, tokenizer="other")
    settings = settings_for(root, "one") | {"semantic_ids": other}
    [sentence] = run_ranks(1, refuse, settings, outputs["checkpoint"])
    assert "was trained on semantic ids" in sentence and "--force" in sentence
