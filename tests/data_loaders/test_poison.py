"""The list of samples that a stage leaves out tells by itself whether it was changed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.storage_faults import StorageError
from data_loaders.poison import (
    PoisonedSampleError,
    find_poisoned,
    quarantine,
    read_quarantined,
)


def test_no_other_sample_is_left_out_for_a_digit_that_changed(tmp_path: Path) -> None:
    file = tmp_path / "samples.json"
    for sample in (7, 12):
        quarantine(str(file), PoisonedSampleError([sample], "collating it", "KeyError"))
    assert read_quarantined(str(file)).tolist() == [7, 12]
    text = file.read_text()
    for place, character in enumerate(text):
        if not character.isdigit():
            continue
        other = str((int(character) + 1) % 10)
        file.write_text(text[:place] + other + text[place + 1 :])
        with pytest.raises(ValueError, match="damaged|has no seal"):
            read_quarantined(str(file))
        with pytest.raises(ValueError, match="damaged|has no seal"):
            quarantine(str(file), PoisonedSampleError([3], "collating it", "KeyError"))


def test_users_and_pairs_of_one_stage_are_told_apart(tmp_path: Path) -> None:
    url = str(tmp_path / "samples.json")
    assert quarantine(url, PoisonedSampleError([4], "there", "odd")) == 1
    pair = PoisonedSampleError([7], "there", "odd", "pair")
    assert quarantine(url, copy.copy(pair)) == 1  # made anew, as by pickle
    assert (read_quarantined(url).tolist(), read_quarantined(url, "pair").tolist()) == ([4], [7])
    assert str(pair) == "pair 7 cannot be used: there met odd"


def test_a_list_of_before_there_were_seals_is_read_and_then_sealed(tmp_path: Path) -> None:
    file = tmp_path / "samples.json"
    file.write_text(json.dumps([{"samples": [3, 5], "where": "there", "reason": "odd"}]))
    assert read_quarantined(str(file)).tolist() == [3, 5]
    assert quarantine(str(file), PoisonedSampleError([4], "collating it", "odd")) == 3
    assert "sha256" in json.loads(file.read_text())


def bad_alloc(said: str) -> Exception:
    """As the C++ library raises it through torch."""
    return RuntimeError(f"std::bad_alloc: {said}")


@pytest.mark.parametrize("fault", [StorageError, MemoryError, ValueError, TimeoutError, bad_alloc])
def test_a_fault_while_samples_are_tried_blames_none_of_them(
    fault: Callable[[str], Exception],
) -> None:
    broken = KeyError("a column that nobody wrote")

    def collate(samples: np.ndarray) -> None:
        raise broken if 8 in samples else fault("s3://b/shard: its storage did not answer")

    with pytest.raises(Exception, match="did not answer"):
        find_poisoned(collate, np.arange(8, 16), broken)
    found = find_poisoned(collate, np.array([8]), broken)
    assert found is not None and found.sample_ids == [8]
