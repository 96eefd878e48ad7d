"""What a stage says about the checkpoint that an earlier one named."""

from pathlib import Path

import pytest
import torch

from configs.layout import RunLayout
from data_loaders.synthetic import write_synthetic
from sharding.checkpoint import CheckpointStore
from tests.harness import run_ranks
from tests.trainer.runs import ITEMS, USERS, quiet, settings_of
from trainer.policy import checkpoint_reference, named_checkpoint, start_worker


def refusals(root: str) -> None:
    """Of a checkpoint with a flipped bit, in each kind of store."""
    worker = start_worker(settings_of(Path(root), "f", {}), quiet)
    layout, tensors = RunLayout(root), {"weight": torch.arange(64.0)}
    for url in (layout.checkpoints("train", "f"), layout.best("train", "f")):
        store = CheckpointStore(url, 2, worker.ctx)
        store.write(1, tensors, {}, {})
        reference = checkpoint_reference(store.write(2, tensors, {}, {}))
        assert named_checkpoint(worker, reference)[1].step == 2
        file = Path(reference["url"]) / "__0_0.distcp"
        file.write_bytes(b"\x01" + file.read_bytes()[1:])
        with pytest.raises(ValueError, match="is damaged: its sha256 differs") as error:
            named_checkpoint(worker, reference)
        assert reference["url"] in str(error.value)
        assert "remove that directory and run `tandem train RECIPE` of" in str(error.value)
        assert "--force" not in str(error.value)  # what is whole would be lost by it


def test_a_damaged_outcome_names_the_mend_that_keeps_what_is_whole(tmp_path: Path) -> None:
    write_synthetic(str(tmp_path / "data"), USERS, ITEMS, 9, 3, rows_per_group=16)
    run_ranks(1, refusals, str(tmp_path))
