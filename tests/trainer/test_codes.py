"""Requests of decoders that learn at the last position."""

from types import SimpleNamespace
from typing import Any

from tests.trainer.test_prompts import sequences
from trainer.codes import last_requests


def test_cut_requests_keep_what_is_to_be_predicted() -> None:
    model: Any = SimpleNamespace(supervision="last_position", longest_history=3)
    batch = sequences([5, 2]).batch
    found = last_requests(model, batch)
    assert found.item_ids.tolist() == [3, 4, 5, 101, 102]
    assert found.target_ids.tolist() == [0, 0, 6, 0, 103]
    assert found.sample_ids.tolist() == [0, 1]
    model.supervision = "every_position"
    assert last_requests(model, batch) is batch
