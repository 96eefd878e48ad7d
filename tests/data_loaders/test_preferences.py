"""Pairs in batches: each training pair once an epoch on any world size, with its reference."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.data import LoaderConfig
from configs.preferences import RatingRule
from data_loaders.loader import LoaderState
from data_loaders.pairs import build_pairs, read_pairs
from data_loaders.preferences import (
    PairDataset,
    PreferenceLoader,
    commit_reference,
    preference_batches,
    read_reference,
    write_reference,
)
from data_loaders.synthetic import write_synthetic
from models.batch import PreferenceBatch

LENGTH = 6


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    path = tmp_path_factory.mktemp("preferences")
    write_synthetic(str(path / "data"), 40, 30, 15, 5, num_shards=2, rows_per_group=8, actions=True)
    build_pairs(
        str(path / "data"),
        RatingRule(window=6, pairs_per_user=3, min_context=1),
        str(path / "pairs"),
        max_length=LENGTH,
        seed=1,
        validation_share=0.25,
        trains=True,
    )
    return path / "pairs"


@pytest.fixture(scope="module")
def rows(built: Path) -> list[dict]:
    """All pairs, by pair id."""
    shards = read_pairs(str(built)).shards
    return [row for shard in shards for row in pq.read_table(built / shard.path).to_pylist()]


@pytest.fixture(scope="module")
def with_reference(built: Path, rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference of three ranks, chosen -id and rejected -id - 0.5."""
    path = tmp_path_factory.mktemp("reference")
    for rank in range(3):
        ids = np.arange(len(rows) * rank // 3, len(rows) * (rank + 1) // 3)
        write_reference(str(path), rank, ids, -1.0 * ids, -1.0 * ids[:, None] - 0.5)
    commit_reference(str(path), 3, "the-policy")
    return path


def described(batch: PreferenceBatch) -> dict[int, dict]:
    """Pair id → what the batch says about it, in the words of the files."""
    found = {}
    inner = batch.batch
    assert inner.sample_ids.tolist() == batch.pair_ids.tolist()
    for b, pair in enumerate(batch.pair_ids.tolist()):
        own = slice(int(inner.offsets[b]), int(inner.offsets[b + 1]))
        targets, nexts = inner.target_ids[own].tolist(), inner.next_timestamps[own].tolist()
        items, times = inner.item_ids[own].tolist(), inner.timestamps[own].tolist()
        assert targets[:-1] == items[1:] and nexts[:-1] == times[1:]
        assert targets[-1] == batch.chosen_ids[b]
        found[pair] = {
            "user_id": int(inner.user_ids[b]),
            "length": len(items),
            "request_timestamp": nexts[-1],
            "chosen_id": int(batch.chosen_ids[b]),
            "rejected_1": int(batch.rejected_ids[b, 0]),
            "item_ids": items,
            "timestamps": times,
            "ratings": inner.ratings[own].tolist(),
            "action_ids": inner.action_ids[own].tolist(),
            "side_genre": inner.side_features["genre"][own].tolist(),
            "user_segment": int(inner.user_features["segment"][b]),
        }
    return found


def loader_of(url: Path, rank: int, world_size: int, **options: object) -> PreferenceLoader:
    given_options = {"pairs_per_step": 16, "state": None, "reference_url": None} | options
    return PreferenceLoader(
        str(url),
        loader=LoaderConfig(shuffle_window=3, prefetch=0, tokens_per_micro_batch=40),
        seed=3,
        rank=rank,
        world_size=world_size,
        **given_options,
    )


@given(world_size=st.sampled_from([1, 2, 3, 4]), per_step=st.integers(3, 40), stop=st.integers(0))
@settings(deadline=None, max_examples=15)
def test_an_epoch_holds_each_training_pair_once(
    built: Path, rows: list[dict], world_size: int, per_step: int, stop: int
) -> None:
    """One rank until some step, then `world_size` ranks; the held-out pairs never come."""
    training = PairDataset(str(built), cached_row_groups=4).num_training_pairs
    first = loader_of(built, 0, 1, pairs_per_step=per_step)
    assert first.steps_per_epoch == -(-training // per_step)
    stop %= first.steps_per_epoch
    started = [next(first) for _ in range(stop)]
    assert first.state() == LoaderState(0, stop)
    ranks = [
        loader_of(built, rank, world_size, pairs_per_step=per_step, state=first.state())
        for rank in range(world_size)
    ]
    rest = [next(loader) for _ in range(stop, first.steps_per_epoch) for loader in ranks]
    seen: list[int] = []
    for step in (*started, *rest):
        for batch in step.micro_batches:
            assert batch.batch.num_tokens <= 40
            found = described(batch)
            assert found == {pair: rows[pair] for pair in found}
            seen += found
    assert sorted(seen) == list(range(training)) and training < len(rows)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parts_are_read_once_by_all_ranks_together(
    built: Path, rows: list[dict], world_size: int
) -> None:
    training = PairDataset(str(built), cached_row_groups=4).num_training_pairs
    everyone = range(len(rows))
    parts = {"train": everyone[:training], "validation": everyone[training:], "all": everyone}
    for part, expected in parts.items():
        ranks = [
            list(
                preference_batches(
                    str(built), part, pairs_per_batch=9, rank=rank, world_size=world_size
                )
            )
            for rank in range(world_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1 and ranks[0]
        ids = [i for batches in ranks for batch in batches for i in batch.pair_ids.tolist()]
        assert ids == list(expected)
        last = ranks[-1][-1].to("cpu")
        assert last.reference_chosen.tolist() == [0.0] * len(last.pair_ids)


def test_more_ranks_than_pairs_in_a_step(built: Path) -> None:
    steps = [next(loader_of(built, rank, 4, pairs_per_step=2)) for rank in range(4)]
    assert [len(step.sample_ids) for step in steps] == [1, 1, 0, 0]
    empty = steps[3].micro_batches[0]
    assert empty.chosen_ids.shape == (0,) and empty.reference_rejected.shape == (0, 1)
    assert empty.batch.offsets.tolist() == [0]


def test_reference_follows_its_pair(built: Path, with_reference: Path, rows: list[dict]) -> None:
    manifest = read_reference(str(with_reference))
    assert (manifest.policy_hash, manifest.num_pairs) == ("the-policy", len(rows))
    loader = loader_of(built, 1, 2, reference_url=str(with_reference))
    for step in (next(loader) for _ in range(loader.steps_per_epoch)):
        for batch in step.micro_batches:
            ids = batch.pair_ids.to(batch.reference_chosen.dtype)
            assert batch.reference_chosen.equal(-ids)
            assert batch.reference_rejected.equal(-ids[:, None] - 0.5)


def test_a_rank_without_pairs_writes_its_part(tmp_path: Path) -> None:
    for rank, ids in enumerate((np.arange(2), np.arange(0), np.arange(2, 5))):
        write_reference(str(tmp_path), rank, ids, ids * 0.0, ids[:, None] * 0.0)
    manifest = commit_reference(str(tmp_path), 3, "p")
    assert manifest.num_pairs == 5 and [part.rows for part in manifest.parts] == [2, 0, 3]


def test_references_that_do_not_fit_are_refused(
    built: Path, with_reference: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no reference was computed there"):
        loader_of(built, 0, 1, reference_url=str(tmp_path / "none"))
    write_reference(str(tmp_path / "few"), 0, np.arange(3), np.zeros(3), np.zeros((3, 1)))
    commit_reference(str(tmp_path / "few"), 1, "p")
    with pytest.raises(ValueError, match=r"holds the reference of 3 pairs, but there are"):
        loader_of(built, 0, 1, reference_url=str(tmp_path / "few"))
    write_reference(str(tmp_path / "gap"), 0, np.arange(3), np.zeros(3), np.zeros((3, 1)))
    write_reference(str(tmp_path / "gap"), 1, np.arange(4, 6), np.zeros(2), np.zeros((2, 1)))
    with pytest.raises(AssertionError, match="have no reference"):
        commit_reference(str(tmp_path / "gap"), 2, "p")


def test_a_damaged_reference_is_named(built: Path, rows: list[dict], tmp_path: Path) -> None:
    ids = np.arange(len(rows))
    write_reference(str(tmp_path), 0, ids, ids * 1.0, ids[:, None] * 2.0)
    commit_reference(str(tmp_path), 1, "p")
    file = tmp_path / "part-00000.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[20] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"part-00000\.parquet is damaged.*tandem align"):
        next(loader_of(built, 0, 1, reference_url=str(tmp_path)))
