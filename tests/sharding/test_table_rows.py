"""Rows of a checkpoint's table without the model, however the table was sharded when saved."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharding.checkpoint import CheckpointStore
from sharding.process_group import current_context
from sharding.table_rows import CheckpointTable
from tests.harness import run_ranks
from tests.sharding.policies import Settings, make_policy, train, whole_state

PLACEMENTS = {
    "row_wise": Settings(),
    "column_wise": replace(Settings(), width=8, placement="column_wise"),
    "replicated": replace(Settings(), placement="replicated", zero_stage=3),
}


def save(root: str) -> dict[str, tuple[str, Tensor]]:
    """Where each placement's checkpoint lies, and its item table as it was."""
    saved = {}
    for name, settings in PLACEMENTS.items():
        policy = make_policy(current_context("cpu"), settings)
        train(policy, 2)
        state = whole_state(policy)
        store = CheckpointStore(f"{root}/{name}", 2, policy.ctx)
        info = store.save(policy, policy.step, {}, {}, {"data": "abc"})
        key = next(key for key in state if key.endswith(("item.weight", "item.weight/weight")))
        saved[name] = (info.url, state[key])
    return saved


def test_rows_equal_those_of_the_model(tmp_path: Path) -> None:
    saved = run_ranks(2, save, str(tmp_path))[0]
    for url, weight in saved.values():
        table = CheckpointTable(url, "item")
        table.verify()
        assert table.shape == tuple(weight.shape) and weight.any()
        for first, count in ((0, len(weight)), (1, 2), (len(weight) - 3, 3), (4, 1)):
            assert torch.equal(table.rows(first, count), weight[first : first + count].float())
        assert table.manifest.fingerprints == {"data": "abc"}
    with pytest.raises(ValueError, match="has no embedding table 'author'"):
        CheckpointTable(url, "author")
    file = next(Path(url).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="is damaged"):
        table = CheckpointTable(url, "item")
        table.verify()
