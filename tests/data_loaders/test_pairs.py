"""Pairs obey their rule, come out the same however the work is cut, and leak nothing."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.preferences import LabelRule, RatingRule, WatchTimeRule
from data_loaders.dataset import Slices
from data_loaders.manifest import ShardEntry, build_manifest, read_manifest, write_manifest
from data_loaders.pairs import (
    PairManifest,
    build_pairs,
    pair_table,
    read_pairs,
    select_pairs,
    validation_users,
)
from data_loaders.shards import write_table
from data_loaders.synthetic import write_synthetic

RULE = RatingRule(window=6, pairs_per_user=4, min_context=2)
Users = list[list[tuple[int, float]]]

ratings_strategy = st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, float("nan")])
users_strategy = st.lists(
    st.lists(st.tuples(st.integers(1, 6), ratings_strategy), max_size=12), max_size=5
)


def slices_of(users: Users, first_user: int = 1) -> Slices:
    lengths = [len(user) for user in users]
    events = [event for user in users for event in user]
    ids = np.arange(first_user, first_user + len(users))
    return Slices(
        sample_ids=ids - 1,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rows={"user_id": ids},
        events={
            "item_ids": np.array([e[0] for e in events], dtype=np.int64),
            "timestamps": np.arange(len(events), dtype=np.int64),
            "ratings": np.array([e[1] for e in events], dtype=np.float32),
        },
    )


def reference(users: Users, rule: RatingRule) -> set[tuple[int, int, int]]:
    """(user, chosen, rejected) as positions among all events, from the rule's words."""
    found, start = set(), 0
    for number, user in enumerate(users):
        for i, (item_i, rating_i) in enumerate(user):
            for j, (item_j, rating_j) in enumerate(user):
                liked, disliked = rating_i >= rule.liked_from, rating_j <= rule.disliked_to
                near = abs(i - j) < rule.window and min(i, j) >= rule.min_context
                if liked and disliked and near and item_i != item_j:
                    found.add((number, start + i, start + j))
        start += len(user)
    return found


def choices(users: Users, found: Iterable[tuple[int, int, int]]) -> set[tuple[int, int, int]]:
    """(end of the context, item chosen, item rejected) of each: what a model sees of a pair."""
    items = [item for user in users for item, _ in user]
    return {(min(a, b), items[a], items[b]) for _, a, b in found}


@given(users=users_strategy, window=st.integers(1, 13), min_context=st.integers(1, 5))
@settings(deadline=None, max_examples=200)
def test_every_pair_of_the_rule_is_a_candidate(users: Users, window: int, min_context: int) -> None:
    rule = RatingRule(window=window, pairs_per_user=1000, min_context=min_context)
    pairs = select_pairs(slices_of(users), rule, seed=0)
    found = list(
        zip(pairs.user.tolist(), pairs.chosen.tolist(), pairs.rejected[:, 0].tolist(), strict=True)
    )
    expected = reference(users, rule)
    assert pairs.candidates == len(expected) and set(found) <= expected
    assert len(found) == len(choices(users, found)), "no choice is there twice"
    assert choices(users, found) == choices(users, expected)
    assert pairs.earlier.tolist() == np.minimum(pairs.chosen, pairs.rejected[:, 0]).tolist()


@given(users=users_strategy, losers=st.integers(2, 4))
@settings(deadline=None, max_examples=100)
def test_lists_deal_every_loser_to_its_winner(users: Users, losers: int) -> None:
    """A loser is an item: one that a user disliked three times is no three negatives."""
    items = [item for user in users for item, _ in user]
    rule = RatingRule(window=9, pairs_per_user=1000, min_context=1, rejected_per_chosen=losers)
    pairs = select_pairs(slices_of(users), rule, seed=0)
    found: list[tuple[int, int, int]] = []
    written: list[tuple[int, ...]] = []
    lists: dict[int, list[int]] = {}
    rows = zip(pairs.user, pairs.chosen, pairs.rejected, pairs.earlier, strict=True)
    for user, chosen, rejected, earlier in rows:
        own = [int(r) for r in rejected if r >= 0]
        assert own and [int(r) for r in rejected] == own + [-1] * (losers - len(own))
        assert earlier == min(chosen, *own)
        assert max(abs(chosen - loser) for loser in own) < rule.window
        assert max(chosen, *own) - earlier < 2 * rule.window - 1  # on both sides of the winner
        found += [(int(user), int(chosen), r) for r in own]
        lists.setdefault(int(chosen), []).append(len(own))
        written.append((int(earlier), items[chosen], *sorted(items[r] for r in own)))
    assert len(written) == len(set(written)), "no list is there twice"
    candidates = reference(users, rule)
    assert len(candidates) == pairs.candidates and set(found) <= candidates
    lost = [(user, chosen, items[loser]) for user, chosen, loser in found]
    assert len(lost) == len(set(lost))
    sides = [{(user, items[a], items[b]) for user, a, b in each} for each in (found, candidates)]
    assert sides[0] == sides[1]
    for sizes in lists.values():  # as few lists as the winner's losers need
        assert sum(size < losers for size in sizes) <= 1


def test_labels_make_pairs_of_the_same_kind() -> None:
    slices = slices_of([[(item, 3.0) for item in range(1, 9)], [(1, 3.0), (2, 3.0)]])
    slices.events["labels"] = np.array([1, 0, 2, 4, 3, 0, 1, 8, 1, 2])  # like, hate, view, share
    names = ("like", "hate", "view", "share")
    explicit = LabelRule(liked=("like",), disliked=("hate",), min_context=2, pairs_per_user=9)
    pairs = select_pairs(slices, explicit, 0, names)
    found = zip(pairs.chosen.tolist(), pairs.rejected[:, 0].tolist(), strict=True)
    assert set(found) == {(6, 2), (6, 4)} and pairs.outcomes["disliked"] == 3
    skip = LabelRule(liked=("view",), skip_is_disliked=True, min_context=1, pairs_per_user=9)
    pairs = select_pairs(slices, skip, 0, names)
    found = zip(pairs.chosen.tolist(), pairs.rejected[:, 0].tolist(), strict=True)
    assert set(found) == {(3, 1), (3, 5)}
    assert pairs.outcomes == {"liked": 1, "disliked": 2, "neither": 7}


@given(users=users_strategy, cap=st.integers(1, 5), seed=st.integers(0, 9))
@example(users=[[(1, 1.0), (1, 4.0), (2, 1.0), (2, 1.0)]], cap=2, seed=0)  # one choice, twice
@settings(deadline=None)
def test_the_cap_keeps_the_same_pairs_however_users_are_grouped(
    users: Users, cap: int, seed: int
) -> None:
    rule = RatingRule(window=8, pairs_per_user=cap, min_context=1)
    together = pair_table(slices_of(users), select_pairs(slices_of(users), rule, seed), 3)
    alone = []
    for number, user in enumerate(users):
        slices = slices_of([user], first_user=number + 1)
        pairs = select_pairs(slices, rule, seed)
        assert len(pairs.user) == min(cap, len(choices([user], reference([user], rule))))
        alone += pair_table(slices, pairs, 3).drop_columns(["timestamps"]).to_pylist()
    kept = together.drop_columns(["timestamps"]).to_pylist()
    for row in (*kept, *alone):
        row.pop("request_timestamp")  # slices_of numbers times over all events
    assert repr(kept) == repr(alone)  # repr, because of NaN


def test_seeds_choose_other_pairs_and_other_validation_users() -> None:
    users = [[(item + 1, 5.0 if item % 2 else 1.0) for item in range(40)] for _ in range(20)]
    rule = RatingRule(pairs_per_user=3)
    first, second = (select_pairs(slices_of(users), rule, seed).chosen for seed in (0, 1))
    assert first.tolist() != second.tolist()
    ids = np.arange(1, 5001)
    held = [validation_users(ids, seed, 0.2) for seed in (0, 1)]
    assert all(abs(h.mean() - 0.2) < 0.02 for h in held) and (held[0] != held[1]).any()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_synthetic(
        str(path), 60, 40, 20, 5, num_shards=2, rows_per_group=8, empty_shards=1, actions=True
    )
    return path


def build(
    data: Path,
    output: Path,
    rule: RatingRule | WatchTimeRule = RULE,
    seed: int = 1,
    share: float = 0.25,
    trains: bool = True,
) -> PairManifest:
    settings = {"max_length": 7, "seed": seed, "validation_share": share, "trains": trains}
    return build_pairs(str(data), rule, str(output), **settings)


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    path = tmp_path_factory.mktemp("pairs")
    build(data, path)
    return path


def test_rows_are_what_the_log_says(data: Path, built: Path) -> None:
    manifest = read_pairs(str(built))
    users = {
        row["user_id"]: row
        for shard in read_manifest(str(data)).shards
        for row in pq.read_table(data / shard.path).to_pylist()
    }
    per_user: dict[int, int] = {}
    parts: dict[str, set[int]] = {"train": set(), "validation": set()}
    for shard in manifest.shards:
        rows = pq.read_table(built / shard.path).to_pylist()
        assert len(rows) == shard.rows == sum(shard.row_group_rows)
        for row in rows:
            user = users[row["user_id"]]
            parts[shard.part].add(row["user_id"])
            per_user[row["user_id"]] = per_user.get(row["user_id"], 0) + 1
            at = user["timestamps"].index(row["request_timestamp"])  # times are distinct here
            begin = max(at - 7, 0)
            assert row["length"] == at - begin and at >= RULE.min_context
            for name in ("item_ids", "timestamps", "ratings", "action_ids", "side_genre"):
                assert row[name] == user[name][begin:at]
            assert row["user_segment"] == user["user_segment"]
            later = range(at + 1, min(at + RULE.window, user["train_end"]))
            here = (user["item_ids"][at], user["ratings"][at])
            others = [(user["item_ids"][j], user["ratings"][j]) for j in later]
            pair = {row["chosen_id"], row["rejected_1"]}
            assert any(
                {here[0], item} == pair
                and {here[1] >= 4, rating >= 4} == {True, False}
                and {here[1] <= 2, rating <= 2} == {True, False}
                for item, rating in others
            )
    counts = [sum(s.rows for s in manifest.shards if s.part == part) for part in parts]
    assert manifest.num_pairs == sum(counts) and manifest.num_validation_pairs == counts[1] > 0
    assert not parts["train"] & parts["validation"]
    assert len(per_user) == manifest.num_users
    assert max(per_user.values()) == RULE.pairs_per_user
    assert manifest.num_candidates > manifest.num_pairs
    order = [shard.part for shard in manifest.shards]
    assert order == sorted(order)  # "train" < "validation"


def _with_other_futures(data: Path, copy: Path) -> None:
    """The same data set, but every validation and test event is another one."""
    manifest = read_manifest(str(data))
    shards = []
    for shard in manifest.shards:
        table = pq.read_table(data / shard.path)
        rows = table.to_pylist()
        for row in rows:
            for name, other in (("item_ids", 7), ("ratings", 5.0), ("side_genre", 3)):
                held = len(row[name]) - row["train_end"]
                row[name][row["train_end"] :] = [other] * held
            for index in range(row["train_end"], row["length"]):
                row["timestamps"][index] += 12345
        changed = pa.Table.from_pylist(rows, schema=table.schema)
        entry = write_table(str(copy), shard.path, changed, rows_per_group=8)
        shards.append(ShardEntry(**(shard.model_dump() | entry.model_dump())))
    content = manifest.model_dump(exclude={"fingerprint", "shards"})
    write_manifest(str(copy), build_manifest(**content, shards=shards))


def test_watch_time_pairs_go_through_files(
    tmp_path: Path, local_ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    more = {"ratings": False, "labels": True, "dwell_times": True, "durations": True}
    write_synthetic(str(tmp_path / "data"), 40, 30, 25, 3, **more)
    rule = WatchTimeRule(negative=("hate",), rejected_per_chosen=2, min_context=2)
    manifest = build(tmp_path / "data", tmp_path / "pairs", rule)
    assert read_pairs(str(tmp_path / "pairs")).rule == rule
    trained = sum(
        row["train_end"]
        for shard in read_manifest(str(tmp_path / "data")).shards
        for row in pq.read_table(tmp_path / "data" / shard.path).to_pylist()
    )
    assert sum(manifest.outcomes.values()) == trained and min(manifest.outcomes.values()) > 0
    rows = [
        r for s in manifest.shards for r in pq.read_table(tmp_path / "pairs" / s.path).to_pylist()
    ]
    assert {"labels", "dwell_times", "durations"} < set(rows[0])
    assert any(row["rejected_2"] for row in rows) and all(row["rejected_1"] for row in rows)


def test_no_validation_or_test_event_is_used(data: Path, built: Path, tmp_path: Path) -> None:
    _with_other_futures(data, tmp_path / "data")
    other = build(tmp_path / "data", tmp_path / "pairs")
    assert other.shards == read_pairs(str(built)).shards  # same bytes, by their hashes


def test_building_again_gives_the_same_pairs(data: Path, built: Path, tmp_path: Path) -> None:
    first = read_pairs(str(built))
    assert build(data, tmp_path) == first
    assert build(data, tmp_path, seed=2).fingerprint != first.fingerprint


def test_nothing_to_prefer_is_said(data: Path, tmp_path: Path, local_ray: None) -> None:
    rule = RatingRule(min_context=10_000)
    with pytest.raises(
        ValueError, match="alignment.rule finds no pair to train on: of [1-9].*loosen"
    ):
        build(data, tmp_path / "pairs", rule)
    write_synthetic(str(tmp_path / "plain"), 10, 10, 5, 0, ratings=False)
    with pytest.raises(ValueError, match="has no ratings.*data.source.columns.rating"):
        build(tmp_path / "plain", tmp_path / "pairs")
    with pytest.raises(ValueError, match="no pairs were written there"):
        read_pairs(str(tmp_path / "pairs"))


def test_a_part_that_is_needed_is_never_empty(data: Path, tmp_path: Path, local_ray: None) -> None:
    """Each is told before alignment; who trains on no pairs needs only those that measure."""
    for trains in (True, False):
        with pytest.raises(ValueError, match=r"no pair to measure with: .* 0 for vali.* or raise"):
            build(data, tmp_path / "pairs", share=1e-9, trains=trains)
    with pytest.raises(ValueError, match=r"no pair to train on: .* 0 were kept .* or lower"):
        build(data, tmp_path / "pairs", share=1 - 1e-9)
    held_out = build(data, tmp_path / "pairs", share=1 - 1e-9, trains=False)
    assert held_out.num_pairs == held_out.num_validation_pairs > 0


def test_a_corrupt_shard_stops_the_build_in_one_sentence(tmp_path: Path, local_ray: None) -> None:
    write_synthetic(str(tmp_path / "data"), 30, 20, 20, 0)
    file = tmp_path / "data" / "sequences" / "part-00001.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"part-00001\.parquet is .*damaged.*--force"):
        build(tmp_path / "data", tmp_path / "pairs")
