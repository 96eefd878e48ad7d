"""A model that writes sessions, trained, evaluated and asked for recommendations on real ranks."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from data_loaders.evaluation import evaluation_batches
from data_loaders.items import train_counts
from data_loaders.semantic_ids import write_semantic_ids
from data_loaders.synthetic import write_synthetic
from models.base import CodeDecoder, TableModel
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.log_probs import sequence_log_probs
from tests.harness import run_ranks
from tests.trainer.runs import ITEMS, STEPS_PER_EPOCH, USERS, logged, quiet, settings_of
from trainer.codes import last_requests, with_codes
from trainer.evaluate import evaluate_worker, evaluation_policy, load_policy
from trainer.generate import ItemGenerator
from trainer.policy import start_worker
from trainer.pretrain import train_worker
from trainer.recommend import recommend_worker

SIZES = (2, 3, 2)
S = 2
"""Items of a session."""
K = 10
ONEREC: dict[str, Any] = {
    "kind": "onerec",
    "width": 8,
    "num_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "feedforward_width": 8,
    "history": 4,
    "session_items": S,
    "dwell_times": True,
}
BLOCKS: dict[str, Any] = {
    "tokenizer": {"embeddings": [{"kind": "text"}], "collisions": "keep"},
    "model": ONEREC,
    "objective": {"kind": "next_code", "normalization": "catalogue"},
    "training": {"validation": {"metric": "ndcg@10", "max_users": 8}},
    "generation": {"beams": 150},  # more than there are sessions
    "alignment": None,
}


def settings_for(root: Path, **more: Any) -> dict[str, Any]:
    generation = BLOCKS["generation"] | more.pop("generation", {})
    blocks = BLOCKS | {"generation": generation}
    return settings_of(root, "sessions", blocks, semantic_ids=str(root / "codes"), **more)


def counted(worker: Any, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """What a worker answers, and how often it sorted the catalogue into a trie."""
    with mock.patch.object(CatalogueTrie, "build", wraps=CatalogueTrie.build) as build:
        answer = worker(settings, quiet)
    return answer, build.call_count


@dataclass(frozen=True)
class Run:
    """What the stages answered."""

    losses: dict[int, dict[str, float]]
    exhaustive: dict[str, Any]
    evaluated: dict[str, Any]
    recommended: list[dict[str, Any]]
    """Sessions, and the next item alone."""
    builds: dict[str, int]
    """How often a stage sorted the catalogue into a trie."""


def trained(settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    return counted(train_worker, settings)


def measured(root: Path, reference: dict[str, Any]) -> dict[str, Any]:
    """All that is asked of the trained policy, in one process."""
    more = {"policies": {"pretrained": reference}, "pairs": None}
    evaluated, builds = counted(evaluate_worker, settings_for(root, **more))
    recommended = [
        recommend_worker(
            settings_for(root, generation={"next_item_alone": alone}, policy=reference), quiet
        )["users"]
        for alone in (False, True)
    ]
    return {
        "exhaustive": exhaustive(settings_for(root), reference),
        "evaluated": evaluated,
        "recommended": recommended,
        "builds": builds,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs with a validation each; most items share their id with others."""
    root: Path = tmp_path_factory.mktemp("sessions")
    write_synthetic(str(root / "data"), USERS, ITEMS, 9, 3, rows_per_group=16, dwell_times=True)
    drawn = torch.Generator().manual_seed(5)
    codes = torch.stack([torch.randint(0, k, (ITEMS + 1,), generator=drawn) for k in SIZES], 1)
    write_semantic_ids(str(root / "codes"), str(root / "data"), codes, SIZES, tokenizer="random")
    [(outputs, builds)] = run_ranks(1, trained, settings_for(root))
    [answers] = run_ranks(1, measured, root, outputs["checkpoint"])
    answers["builds"] = {"train": builds, "evaluate": answers["builds"]}
    return Run(logged(root, "train", "sessions"), **answers)


def test_training_learns_and_stages_sort_the_catalogue_once(run: Run) -> None:
    assert run.losses[2 * STEPS_PER_EPOCH]["train/loss"] < run.losses[1]["train/loss"]
    assert len([row for row in run.losses.values() if "validation/ndcg@10" in row]) == 2
    assert run.builds == {"train": 1, "evaluate": 1}


def exhaustive(settings: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Every user's offer, and log π of every session by teacher forcing each of them."""
    worker = start_worker(settings, quiet)
    policy = evaluation_policy(worker)
    load_policy(worker, policy, reference)
    generator = ItemGenerator(worker, policy)
    assert worker.semantic_ids is not None and isinstance(policy.model, CodeDecoder)
    codes = worker.semantic_ids.codes.long()
    [users] = evaluation_batches(
        worker.dataset, "test", users_per_batch=USERS, max_length=8, rank=0, world_size=1
    )
    offer = generator.offer(users, K, filter_seen=True)
    batch = with_codes(last_requests(policy.model, users.batch), codes)
    hidden = [
        [i for i in part.tolist() if i != target]
        for part, target in zip(
            users.seen_ids.split(users.seen_offsets.diff().tolist()),
            users.target_ids.tolist(),
            strict=True,
        )
    ]
    exclude = torch.zeros(batch.num_sequences, max(map(len, hidden)), dtype=torch.int64)
    for row, items in enumerate(hidden):
        exclude[row, : len(items)] = torch.tensor(items)
    ids = sorted({tuple(row) for row in codes[1:].tolist()})

    def use(model: TableModel, embeddings: dict[str, torch.Tensor]) -> torch.Tensor:
        assert isinstance(model, CodeDecoder)
        context = model.encode(batch, embeddings, 0, "last")
        scores = []
        for session in itertools.product(ids, repeat=S):
            asked = torch.tensor(session).expand(batch.num_sequences, -1, -1)
            logits = model.teacher_forced(context, asked.flatten(1))
            levels = len(SIZES)
            parts = [
                sequence_log_probs(
                    logits[at * levels : (at + 1) * levels],
                    asked[:, at],
                    generator.trie,
                    exclude=exclude,
                )
                for at in range(S)
            ]
            scores.append(sum(part.sum(1) for part in parts))
        return torch.stack(scores, dim=1)  # type: ignore[arg-type]

    return {
        "items": offer.items.tolist(),
        "scores": offer.scores.tolist(),
        "sessions": policy.infer(batch, use).tolist(),
        "ids": ids,
        "codes": [tuple(row) for row in codes.tolist()],
        "hidden": hidden,
        "targets": users.target_ids.tolist(),
        "counts": train_counts(worker.layout.data).tolist(),
    }


def expected_offer(found: dict[str, Any], row: int) -> list[tuple[int, float]]:
    """Items of the best sessions with the score of theirs, from the list of all sessions."""
    hidden, counts = set(found["hidden"][row]), found["counts"]
    sessions = list(itertools.product(found["ids"], repeat=S))
    scores = found["sessions"][row]
    offered: dict[int, float] = {}
    for at in sorted(range(len(sessions)), key=lambda at: -scores[at]):
        for wanted in sessions[at] if math.isfinite(scores[at]) else ():
            same = [i for i in range(1, ITEMS + 1) if found["codes"][i] == wanted]
            for item in sorted(same, key=lambda i: (-counts[i - 1], i)):
                if item not in hidden:
                    offered.setdefault(item, scores[at])
    return list(offered.items())[:K]


def test_offers_are_the_items_of_the_best_sessions(run: Run) -> None:
    found, hits = run.exhaustive, 0
    for row, items in enumerate(found["items"]):
        expected = expected_offer(found, row)
        assert items == [item for item, _ in expected] + [0] * (K - len(expected))
        scores = [score for score in found["scores"][row] if math.isfinite(score)]
        assert scores == pytest.approx([score for _, score in expected], abs=1e-3)
        hits += found["targets"][row] in items
    metrics = run.evaluated["models"]["pretrained"]["test"]
    assert metrics["hr@10"] == pytest.approx(hits / len(found["items"]))
    assert metrics["legality"] == 1.0


def test_recommendations_are_sessions_unless_the_next_item_alone_is_asked_for(run: Run) -> None:
    for sessions, single in zip(*run.recommended, strict=True):
        assert len(set(sessions["items"])) == len(sessions["items"]) == K
        assert sessions["scores"] == sorted(sessions["scores"])[::-1]
        # A session is less probable than its first item, whose id scores higher by itself.
        assert sessions["scores"][0] < single["scores"][0]


def test_the_switch_is_refused_where_one_item_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generation\.next_item_alone is for models that write"):
        blocks = BLOCKS | {"model": ONEREC | {"session_items": 1}}
        blocks["generation"] = {"beams": 150, "next_item_alone": True}
        settings_of(tmp_path, "x", blocks)
