"""One pretrained policy and its preference pairs, shared by the tests of the workers."""

from pathlib import Path

import pytest

from configs.preferences import RatingRule
from data_loaders import pairs
from data_loaders.manifest import read_manifest, write_manifest
from data_loaders.synthetic import write_synthetic
from tests.harness import run_ranks
from tests.trainer.runs import ITEMS, LENGTH, USERS, Pretrained, quiet, settings_of
from trainer.pretrain import train_worker


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """Two epochs of one rank on synthetic users, and pairs of which three tenths are held out."""
    root: Path = tmp_path_factory.mktemp("run")
    write_synthetic(str(root / "data"), USERS, ITEMS, 9, 3, rows_per_group=16)
    write_pairs(str(root / "data"), str(root / "pairs"))
    [outputs] = run_ranks(1, train_worker, settings_of(root, "pretrained", {}), quiet)
    return Pretrained(root, str(root / "pairs"), outputs)


def write_pairs(data: str, url: str, losers: int = 1) -> None:
    """What `build_pairs` does, its tasks run here: starting Ray would take longer than the rest."""
    settings = {
        "rule": RatingRule(window=6, pairs_per_user=4, min_context=1, rejected_per_chosen=losers),
        "max_length": LENGTH,
        "seed": 3,
        "validation_share": 0.3,
    }
    manifest = read_manifest(data)
    reports = [
        pairs._write_shard(index, dataset_url=data, output_url=url, **settings)
        for index in range(len(manifest.shards))
    ]
    write_manifest(url, pairs._summary(manifest, reports, settings, pairs.PARTS))
