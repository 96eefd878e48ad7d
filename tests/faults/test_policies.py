"""Hangs, losses that are not finite, and samples that raise: named, and dealt with as asked."""

import json
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import storage
from configs.failures import FailuresConfig
from configs.layout import RunLayout
from data_loaders.loader import TrainingLoader
from data_loaders.manifest import DatasetManifest, read_manifest, seal, write_manifest
from data_loaders.poison import PoisonedSampleError
from launch.failures import Failure, Place, Restarts
from sharding.loss_module import NonFiniteLossError
from tests.faults.conftest import EPOCHS
from tests.faults.trainings import (
    FINGERPRINT,
    Course,
    Fault,
    attempt,
    course,
    settings,
    train,
    write_data,
)
from tests.harness import Ranks
from tests.trainer.runs import logged
from trainer.watchdog import EXIT_STATUS, diagnose_hang


def test_a_rank_that_hangs_is_named_with_its_stack(calm: Course, tmp_path: Path) -> None:
    write_data(tmp_path)
    failures = {"hang": {"step_timeout_s": 12.0}}
    since = time.time()
    told = settings(tmp_path, EPOCHS, failures=failures)
    assert attempt(told, Fault("hang", 1, 5)) == [EXIT_STATUS] * 2
    url = RunLayout(str(tmp_path)).failures
    sentence = diagnose_hang(url, since, 2)
    assert sentence is not None
    assert sentence.startswith("rank 1 (host ") and "rank 0" not in sentence, sentence
    assert "after step 4, while updating, at `time.sleep(600)`" in sentence
    [report] = Path(url).glob("hang-train-*-rank-1.json")
    assert "train_step" in json.loads(report.read_text())["stack"]
    silent = diagnose_hang(url, since, 3)  # had there been a third one
    assert silent is not None and "rank 2 gave no sign of life" in silent
    assert diagnose_hang(url, time.time(), 2) is None  # of an earlier group
    assert course(tmp_path, attempt(told)) == calm


def test_a_step_that_is_not_finite_stops_or_is_left_out(calm: Course, tmp_path: Path) -> None:
    write_data(tmp_path)
    fault = Fault("not finite", 1, 5)
    outcomes = attempt(settings(tmp_path, EPOCHS), fault)
    assert {type(outcome) for outcome in outcomes} == {NonFiniteLossError}, outcomes
    assert "step 5, rank 1 (samples" in str(outcomes[1]) and "action=skip" in str(outcomes[1])
    skipping = settings(
        tmp_path, EPOCHS, failures={"non_finite": {"action": "skip", "max_skipped": 1}}
    )
    found = course(tmp_path, attempt(skipping, fault))
    assert found.losses.keys() == calm.losses.keys() - {5}
    assert found.losses[4] == calm.losses[4] and found.losses[6] != calm.losses[6]
    record = storage.read_sealed(str(tmp_path / "failures" / "skipped-train-step-00000005.json"))
    assert record["samples_by_rank"].keys() == {"1"}
    assert set(record["samples_by_rank"]["1"]) <= set(calm.samples[5])


def collate_none_of(sample: int, settings: dict[str, Any]) -> dict[str, str]:
    """Train where a sample cannot be collated."""
    batch = TrainingLoader._batch

    def raising(self: TrainingLoader, sample_ids: np.ndarray) -> Any:
        if sample in sample_ids:
            raise KeyError("a column that nobody wrote")
        return batch(self, sample_ids)

    TrainingLoader._batch = raising  # type: ignore[method-assign]
    return train(settings)


def test_a_poisoned_sample_is_named_and_the_run_goes_on_without_it(
    calm: Course, tmp_path: Path
) -> None:
    write_data(tmp_path)
    told = settings(tmp_path, EPOCHS)
    with Ranks(2, partial(collate_none_of, 11, told)) as ranks:
        outcomes = ranks.outcomes(240)
    [error] = [outcome for outcome in outcomes if isinstance(outcome, PoisonedSampleError)]
    assert error.sample_ids == [11] and "a column that nobody wrote" in str(error)
    policy = Restarts(
        FailuresConfig.model_validate({"poisoned_sample": {"action": "skip"}}),
        Place.of(RunLayout(str(tmp_path)), "train", FINGERPRINT),
        lambda line: None,
    )
    policy.decide(Failure("poisoned_sample", str(error), error))
    with Ranks(2, partial(collate_none_of, 11, told)) as ranks:
        found = course(tmp_path, ranks.outcomes(240))
    trained = Counter(sample for ids in found.samples.values() for sample in ids)
    assert trained == Counter({s: EPOCHS for s in range(80) if s != 11})
    assert found.losses.keys() == calm.losses.keys()


def invalid_item_of(sample: int, root: Path) -> None:
    """Let a user of the prepared data have an item that is none, by hand and sealed anew."""
    url = str(root / "data")
    manifest = read_manifest(url)
    shard, *rest = manifest.shards
    path = root / "data" / shard.path
    table = pq.read_table(path)
    items = table["item_ids"].to_pylist()
    items[sample][0] = 9999
    place = table.schema.get_field_index("item_ids")
    field = table.schema.field(place)
    table = table.set_column(place, field, pa.array(items, field.type))
    pq.write_table(table, path, row_group_size=16, write_page_checksum=True)
    data = path.read_bytes()
    told = {"bytes": len(data), "sha256": storage.sha256_bytes(data)}
    content = manifest.model_dump(exclude={"fingerprint"})
    content["shards"] = (shard.model_copy(update=told), *rest)
    write_manifest(url, seal(DatasetManifest, **content))


def test_a_sample_that_nobody_can_read_is_in_no_validation_either(tmp_path: Path) -> None:
    write_data(tmp_path)
    invalid_item_of(4, tmp_path)
    told = settings(tmp_path, 1)
    policy = Restarts(
        FailuresConfig.model_validate({"poisoned_sample": {"action": "skip"}}),
        Place.of(RunLayout(str(tmp_path)), "train", FINGERPRINT),
        lambda line: None,
    )
    [error] = [e for e in attempt(told) if isinstance(e, PoisonedSampleError)]
    assert error.sample_ids == [4] and "item_ids, 9999, which is not in" in str(error)
    policy.decide(Failure("poisoned_sample", str(error), error))
    found = course(tmp_path, attempt(told))
    assert 4 not in {sample for ids in found.samples.values() for sample in ids}
    rows = logged(tmp_path, "train", FINGERPRINT)
    assert rows[max(rows)]["validation/users_left_out"] == 1


def test_an_update_that_raises_names_its_samples(tmp_path: Path) -> None:
    write_data(tmp_path)
    outcomes = attempt(settings(tmp_path, 1), Fault("the update raises", 0, 2))
    assert isinstance(outcomes[0], PoisonedSampleError)
    assert len(outcomes[0].sample_ids) == 8 and "IndexError: far out" in str(outcomes[0])
    assert not isinstance(outcomes[1], PoisonedSampleError)  # it only lost its peer
