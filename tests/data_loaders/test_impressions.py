"""Impressions are counted as alignment's prompts see them, and a rule that fits none is refused."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data import LoaderConfig
from configs.preferences import RatingRule, WatchTimeRule
from data_loaders.dataset import SequenceDataset
from data_loaders.impressions import _count_shard, count_impressions
from data_loaders.manifest import ShardEntry, build_manifest, write_manifest
from data_loaders.prompts import PromptLoader
from data_loaders.shards import write_table
from data_loaders.synthetic import write_synthetic
from tests.data_loaders.conftest import LENGTH, USERS

SEED = 5


@pytest.mark.parametrize("rule", [RatingRule(), WatchTimeRule(negative=("hate",))])
def test_what_the_prompts_may_be_cut_before_is_counted(
    directory: Path, dataset: SequenceDataset, local_ray: None, rule: RatingRule | WatchTimeRule
) -> None:
    """Of all users, but those who are held out."""
    config = LoaderConfig(global_batch=99, max_length=LENGTH, prefetch=0, cached_row_groups=8)
    shared = {"prompts_per_step": USERS, "seed": SEED, "rank": 0, "world_size": 1}
    with PromptLoader(dataset, config, rule, held_out=0.3, **shared) as loader:
        [found] = next(loader).micro_batches
    assert found.outcomes is not None
    latest = found.batch.offsets[1:][found.batch.lengths > 0] - 1
    for length, told in ((LENGTH, found.outcomes), (1, found.outcomes[latest])):
        counts = count_impressions(str(directory), rule, latest=length, seed=SEED, held_out=0.3)
        expected = {"liked": 1, "disliked": -1, "neither": 0}
        assert counts == {name: int((told == value).sum()) for name, value in expected.items()}
        assert counts["liked"] and counts["disliked"]


def test_a_rule_that_fits_no_impression_is_refused(directory: Path, local_ray: None) -> None:
    rule = RatingRule(liked_from=100, disliked_to=-100)
    with pytest.raises(
        ValueError, match=r"alignment\.logged\.rule finds nothing .* of [1-9]\d+ impressions none"
    ):
        count_impressions(str(directory), rule, latest=LENGTH, seed=SEED, held_out=0.0)


def test_a_sample_that_cannot_be_read_stops_no_count(tmp_path: Path) -> None:
    """Training stops at it or leaves it out, as the recipe says."""
    url, rule = str(tmp_path), RatingRule()
    manifest = write_synthetic(url, 8, 12, 9, 3, num_shards=1)
    settings = {"dataset_url": url, "rule": rule, "latest": LENGTH, "seed": SEED, "held_out": 0.0}
    whole = _count_shard(0, **settings)["rows"]
    [shard] = manifest.shards
    table = pq.read_table(tmp_path / shard.path)
    rows = table.to_pylist()
    bad = next(row for row in rows if row["train_end"] > 3)
    bad["ratings"][1] = float("inf")
    written = write_table(
        url, shard.path, pa.Table.from_pylist(rows, table.schema), rows_per_group=32
    )
    content = manifest.model_dump(exclude={"fingerprint", "shards"})
    shards = [ShardEntry(**(shard.model_dump() | written.model_dump()))]
    write_manifest(url, build_manifest(**content, shards=shards))
    assert _count_shard(0, **settings)["rows"] == whole - min(bad["train_end"] - 1, LENGTH)
