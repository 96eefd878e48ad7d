"""What a run leaves for itself (samples left out, states, reports of hangs, locks), with odd values
in the place of good ones: taken, refused in a sentence, or passed over; nothing falls over."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_loaders.poison import PoisonedSampleError, quarantine, read_quarantined
from launch import output_lock
from launch.output_lock import OutputLock
from trainer.trainer import TrainerState
from trainer.watchdog import diagnose_hang

ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=2) | st.dictionaries(st.text(max_size=3), inside),
    max_leaves=4,
) | st.sampled_from([10**30, -1, 1e300, float("inf"), float("nan")])


@dataclass(frozen=True)
class Kind:
    """A file, what is good in it, and who reads it."""

    name: str
    good: Any
    read: Callable[[Path], object]


KINDS = {
    "samples left out": Kind(
        "quarantine.json",
        [{"samples": [3, 5], "where": "collating it", "reason": "a value"}],
        lambda place: read_quarantined(str(place / "quarantine.json")),
    ),
    "a hang": Kind(
        "hang-train-1-rank-0.json",
        {
            "stage": "train", "rank": 0, "step": 3, "phase": "updating", "seconds": 9.0,
            "time": 100.0, "waits_for_others": False, "host": "h", "process": 1,
            "stack": "  at x\n    x()\n", "other_threads": {"a": "b"},
        },
        lambda place: diagnose_hang(str(place), 0.0, 2),
    ),
    "a state": Kind(
        "state.json",
        TrainerState(loader={"epoch": 1}, validations=[{"step": 3, "ndcg@10": 0.5}]).to_dict(),
        lambda place: TrainerState.from_dict(json.loads((place / "state.json").read_text())),
    ),
    "a lock": Kind(
        output_lock.FILE,
        {
            "token": "t", "host": "h", "machine": "m", "pid": 1, "born": 1,
            "since": 1.0, "alive": 2.0,
        },
        lambda place: OutputLock(str(place))._read(),
    ),
}  # fmt: skip


def replaced(good: Any, data: st.DataObject) -> Any:
    """A copy with odd values at some places, maybe at the top."""
    whole = [copy.deepcopy(good)]
    for _ in range(data.draw(st.integers(0, 2))):
        block: Any = whole
        key: Any = 0
        while isinstance(block[key], dict | list) and block[key] and data.draw(st.booleans()):
            block = block[key]
            keys = sorted(block) if isinstance(block, dict) else range(len(block))
            key = data.draw(st.sampled_from(list(keys)))
        block[key] = data.draw(ODD)
    return whole[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_odd_values(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.getbasetemp() / f"records-{kind.replace(' ', '-')}"
    place.mkdir(exist_ok=True)
    (place / KINDS[kind].name).write_text(json.dumps(replaced(KINDS[kind].good, data)))
    try:
        KINDS[kind].read(place)
    except ValueError as error:
        assert str(error).strip() and "\n" not in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_good_is_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / KINDS[kind].name).write_text(json.dumps(KINDS[kind].good))
    assert KINDS[kind].read(tmp_path) is not None


@given(odd=ODD)
@example(odd={"left_out": []})
@example(odd=[{"samples": 5}])
@example(odd=[{"samples": [10**30]}])
@example(odd=[{"samples": [3], "unit": ["user"]}])
@settings(max_examples=60, deadline=None)
def test_a_list_of_samples_is_extended_or_refused(
    odd: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    url = tmp_path_factory.getbasetemp() / "quarantine.json"
    url.write_text(json.dumps(odd))
    try:
        count = quarantine(str(url), PoisonedSampleError([7], "collating it", "odd"))
    except ValueError as error:
        assert "delete it or restore it" in str(error)
        assert url.read_text() == json.dumps(odd), "what is refused is left as it is"
        return
    assert count == len(read_quarantined(str(url))) and 7 in read_quarantined(str(url))
