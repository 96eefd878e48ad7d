"""Every target of a part is evaluated once, whatever the world size; what is liked is told."""

from collections.abc import Iterator

import numpy as np
import pytest

from configs.preferences import LabelRule, PreferenceRule, WatchTimeRule
from data_loaders.dataset import SequenceDataset
from data_loaders.evaluation import EvaluationBatch, evaluation_batches, recommendation_batch
from data_loaders.preference_rules import outcomes
from tests.data_loaders.conftest import LENGTH, USERS, known


def _evaluated(batches: Iterator[EvaluationBatch]) -> dict[int, tuple]:
    """user id → (inputs, their dwell times, next times, next items, target, seen)."""
    found = {}
    for entry in batches:
        batch = entry.batch
        for b, user in enumerate(batch.user_ids.tolist()):
            own = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
            seen = slice(int(entry.seen_offsets[b]), int(entry.seen_offsets[b + 1]))
            found[user] = (
                batch.item_ids[own].tolist(),
                known(batch.dwell_times[own].tolist()),
                batch.next_timestamps[own].tolist(),
                batch.target_ids[own].tolist(),
                int(entry.target_ids[b]),
                entry.seen_ids[seen].tolist(),
            )
    return found


@pytest.mark.parametrize(("part", "at"), [("validation", "train_end"), ("test", "validation_end")])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_covers_every_target_once(
    dataset: SequenceDataset, users: list[dict], part: str, at: str, world_size: int
) -> None:
    ranks = [
        list(
            evaluation_batches(
                dataset,
                part,
                users_per_batch=7,
                max_length=LENGTH,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    expected = {}
    for row in users:
        target = row[at]
        if target < row["length"]:
            begin = max(target - LENGTH, 0)
            expected[row["user_id"]] = (
                row["item_ids"][begin:target],
                known(row["dwell_times"][begin:target]),  # not the target's
                row["timestamps"][begin + 1 : target + 1],
                row["item_ids"][begin + 1 : target + 1],
                row["item_ids"][target],
                row["item_ids"][:target],
            )
    found = [_evaluated(iter(batches)) for batches in ranks]
    assert sum(map(len, found)) == len(expected)
    assert {k: v for part_ in found for k, v in part_.items()} == expected
    assert 0 < len(expected) < USERS
    moved = ranks[0][0].to("cpu")
    assert moved.target_ids.tolist() == ranks[0][0].target_ids.tolist()


def test_more_ranks_than_users_and_a_limit(dataset: SequenceDataset, users: list[dict]) -> None:
    ranks = [
        list(
            evaluation_batches(
                dataset,
                "test",
                users_per_batch=4,
                max_length=LENGTH,
                rank=rank,
                world_size=4,
                max_users=3,
            )
        )
        for rank in range(4)
    ]
    assert [len(batches) for batches in ranks] == [1, 1, 1, 1]
    evaluated = sorted(u for batches in ranks for u in _evaluated(iter(batches)))
    assert evaluated == [row["user_id"] for row in users[:3] if row["length"] >= 3]


def test_recommendation_takes_the_whole_history(
    dataset: SequenceDataset, users: list[dict]
) -> None:
    picked = np.array([50, 3, 17])
    users_batch = recommendation_batch(dataset, picked, LENGTH)
    assert (users_batch.batch.user_ids - 1).tolist() == picked.tolist()  # in the order asked for
    found = _evaluated(iter([users_batch]))
    for sample in picked:
        row = users[sample]
        items, times = row["item_ids"][-LENGTH:], row["timestamps"][-LENGTH:]
        dwelt = known(row["dwell_times"][-LENGTH:])
        expected = (items, dwelt, [*times[1:], times[-1]], [*items[1:], 0], 0, row["item_ids"])
        assert found[sample + 1] == expected
    assert dataset.raw_users(picked) == [users[sample]["user"] for sample in picked]
    nobody = recommendation_batch(dataset, picked[:0], LENGTH)
    assert nobody.batch.num_sequences == nobody.target_ids.numel() == 0
    assert nobody.seen_offsets.tolist() == [0]


@pytest.mark.parametrize(
    "rule",
    [
        LabelRule(kind="labels", liked=("like",), skip_is_disliked=True),
        WatchTimeRule(kind="watch_time", liked_share=0.5, disliked_share=0.25),
    ],
    ids=["labels", "watch_time"],
)
def test_a_rule_tells_which_targets_were_liked(
    dataset: SequenceDataset, users: list[dict], rule: PreferenceRule
) -> None:
    """As for the whole history with the target at its end; batches and ranks change nothing."""
    wanted, found = {}, {}
    for row in users:
        if row["validation_end"] < row["length"]:
            ends = np.array([row["validation_end"] + 1])
            whole = dataset.reader.slices(np.array([row["user_id"] - 1]), ends * 0, ends)
            wanted[row["user_id"]] = outcomes(whole, rule, dataset.manifest.labels).liked[-1]
    for rank in range(2):
        sizes = {"users_per_batch": 7, "max_length": LENGTH, "rank": rank, "world_size": 2}
        for entry in evaluation_batches(dataset, "test", rule=rule, **sizes):
            assert entry.liked is not None and entry.to("cpu").liked is not None
            found |= zip(entry.batch.user_ids.tolist(), entry.liked.tolist(), strict=True)
    assert found == wanted and len(set(found.values())) == 2
