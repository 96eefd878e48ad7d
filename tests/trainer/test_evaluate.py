"""Measured policies against a loop over users and pairs, written from the protocol."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from configs.layout import RunLayout
from configs.preferences import RatingRule
from data_loaders.pairs import read_pairs
from data_loaders.poison import PoisonedSampleError, quarantine
from tests.harness import run_ranks
from tests.trainer.runs import ITEMS, LENGTH, Pretrained, all_keys, query_of, quiet, settings_of
from tests.trainer.test_metrics import User, loop
from trainer.evaluate import evaluate_worker, evaluation_policy, load_policy, ranked_right
from trainer.policy import start_worker

KS = [1, 5, 10]
FINAL = {
    "data": {"split": {"kind": "leave_last_out", "include_validation_in_training": True}},
    "training": {"validation": None},
    "alignment": {"validation": None},
}
Rows = list[dict[str, Any]]


def evaluated(all_settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [evaluate_worker(settings, quiet)["models"] for settings in all_settings]


def scored_plainly(settings: dict[str, Any], users: Rows, pairs: Rows) -> dict[str, Any]:
    """Scores [n, V] of the whole catalogue, one user and one pair at a time."""
    worker = start_worker(settings, quiet)
    policy = evaluation_policy(worker)
    load_policy(worker, policy, settings["policies"]["pretrained"])
    keys = all_keys(policy)
    scores = {}
    for part, end in (("validation", "train_end"), ("test", "validation_end")):
        scores[part] = {
            row["user_id"]: keys @ query_of(policy, row, slice(max(0, at - LENGTH), at), request)
            for row in users
            if row["length"] >= 3
            for at in [row[end]]
            for request in [row["timestamps"][at]]
        }
    pair_scores = [keys @ query_of(policy, p, slice(None), p["request_timestamp"]) for p in pairs]
    return scores | {"pairs": torch.stack(pair_scores)}


def measured_plainly(
    users: Rows,
    part: str,
    scores: dict[int, Tensor],
    filter_seen: bool = True,
    counts: Counter[int] | None = None,
) -> dict[str, float]:
    """Metrics of users with three events or more, from scores [V] of each; `counts` are theirs."""
    counts = training_counts(users) if counts is None else counts
    head = sorted(range(1, ITEMS + 1), key=lambda item: (-counts[item], item))[: ITEMS // 5]
    found = []
    for row in users:
        if row["length"] < 3:
            continue
        at = row["train_end"] if part == "validation" else row["validation_end"]
        target, seen = row["item_ids"][at], set(row["item_ids"][:at]) if filter_seen else set()
        values = scores[row["user_id"]].tolist()
        order = sorted(range(1, ITEMS + 1), key=lambda item: (-values[item - 1], item))
        rivals = [item for item in order if item not in seen or item == target]
        top = [item for item in order if item not in seen]
        liked = row["ratings"][at] >= RatingRule().liked_from
        found.append(User(rivals.index(target) + 1, target, top, liked))
    cold = {item for item in range(1, ITEMS + 1) if not counts[item]}
    return loop(ITEMS, KS, set(head), found, cold)


def training_counts(users: Rows) -> Counter[int]:
    return Counter(item for row in users for item in row["item_ids"][: row["train_end"]])


def accuracy(pairs: Rows, scores: Tensor, held_out: bool) -> float:
    right = [
        bool(own[pair["chosen_id"] - 1] > own[pair["rejected_1"] - 1])
        for pair, own in zip(pairs, scores, strict=True)
        if pair["held_out"] == held_out
    ]
    return sum(right) / len(right)


def pairs_of(pretrained: Pretrained) -> Rows:
    return [
        row | {"held_out": shard.part == "validation"}
        for shard in read_pairs(pretrained.pairs).shards
        for row in pq.read_table(Path(pretrained.pairs) / shard.path).to_pylist()
    ]


def test_metrics_are_those_of_a_plain_loop_in_every_world(pretrained: Pretrained) -> None:
    more = {"policies": {"pretrained": pretrained.outputs["checkpoint"]}, "pairs": pretrained.pairs}
    variants = [{}, {"evaluation": {"filter_seen": False}}, FINAL]
    asked = [settings_of(pretrained.root, "evaluate", blocks, **more) for blocks in variants]
    users, pairs = pretrained.users, pairs_of(pretrained)
    [scores] = run_ranks(1, scored_plainly, asked[0], users, pairs)
    counts = training_counts(users)
    popular = torch.tensor([float(counts[item]) for item in range(1, ITEMS + 1)])
    everywhere = {row["user_id"]: popular for row in users}

    for world_size in (1, 2):
        for models in run_ranks(world_size, evaluated, asked):
            for answer, filter_seen in zip(models[:2], (True, False), strict=True):
                for part in ("validation", "test"):
                    plain = measured_plainly(users, part, scores[part], filter_seen)
                    assert answer["pretrained"][part] == pytest.approx(plain, abs=1e-9)
                    plain = measured_plainly(users, part, everywhere, filter_seen)
                    assert answer["popularity"][part] == pytest.approx(plain, abs=1e-9)
                right = accuracy(pairs, scores["pairs"], held_out=True)
                assert answer["pretrained"]["preference_accuracy"] == pytest.approx(right)
            assert set(models[2]["popularity"]) == {"test"}
            assert not {"validation"} & set(models[2]["pretrained"])
            assert models[2]["pretrained"]["test"] == models[0]["pretrained"]["test"]

    # What the assertions above tell apart does differ here.
    assert accuracy(pairs, scores["pairs"], False) != accuracy(pairs, scores["pairs"], True)
    every = Counter(item for row in users for item in row["item_ids"])
    of_all = torch.tensor([float(every[item]) for item in range(1, ITEMS + 1)])
    other = measured_plainly(users, "test", {row["user_id"]: of_all for row in users})
    assert other != measured_plainly(users, "test", everywhere)


def test_who_is_left_out_is_in_no_metric_and_counted(pretrained: Pretrained) -> None:
    """A user of every part, one without a target, and a held-out pair of somebody else."""
    more = {"policies": {"pretrained": pretrained.outputs["checkpoint"]}, "pairs": pretrained.pairs}
    settings = settings_of(pretrained.root, "lacking", {}, **more)
    users, pairs = pretrained.users, pairs_of(pretrained)
    short = next(row for row in users if row["length"] < 3)
    missing = {next(row for row in users if row["length"] > 3)["user_id"], short["user_id"]}
    pair = next(at for at, row in enumerate(pairs) if row["held_out"])
    url = RunLayout(str(pretrained.root)).quarantined("lacking")
    quarantine(url, PoisonedSampleError([user - 1 for user in missing], "there", "odd"))
    quarantine(url, PoisonedSampleError([pair], "there", "odd", "pair"))
    [scores] = run_ranks(1, scored_plainly, settings, users, pairs)
    there = [row for row in users if row["user_id"] not in missing]
    rest = [at for at in range(len(pairs)) if at != pair]
    for [answer] in run_ranks(2, evaluated, [settings]):
        for part in ("validation", "test"):
            # Popularity and the catalogue are the data's, whoever is asked.
            plain = measured_plainly(there, part, scores[part], counts=training_counts(users))
            found = answer["pretrained"][part]
            assert found == pytest.approx(plain | {"users_left_out": 2.0}, abs=1e-9)
            assert answer["popularity"][part]["users_left_out"] == 2
        right = accuracy([pairs[at] for at in rest], scores["pairs"][rest], held_out=True)
        assert answer["pretrained"]["preference_accuracy"] == pytest.approx(right)
    assert right != accuracy(pairs, scores["pairs"], held_out=True)


def test_a_tie_is_ranked_half_right() -> None:
    """Items of one semantic id are as likely; what is no loser does not count."""
    log_probs = torch.tensor([[-1.0, -1.0, -2.0], [-3.0, -2.0, -torch.inf], [-1.0, -1.0, -1.0]])
    there = torch.tensor([[True, True], [True, False], [False, False]])
    assert ranked_right(log_probs, there).tolist() == [1.5, 3.0]
