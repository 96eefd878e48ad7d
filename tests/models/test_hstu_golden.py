"""HSTU against values of the public model: queries, loss and every gradient (tests/golden)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.models import HSTUConfig
from configs.objectives import SampledSoftmaxConfig
from models.base import TableSpec
from models.batch import JaggedBatch
from models.hstu import HSTU
from tests.trainer.objectives.loss_tools import run_loss
from trainer.objectives.next_item import NextItemInputs, NextItemLoss

GOLDEN = Path(__file__).parents[1] / "golden"
ITEMS = "_embedding_module._item_emb.weight"
TOLERANCE = 1e-5  # of the largest element
POSITIONS = "_input_features_preproc._pos_emb.weight"


@dataclass
class Case:
    """A golden file: its arrays and the model and batch that they describe."""

    arrays: dict[str, np.ndarray]
    model: HSTU
    batch: JaggedBatch
    negatives: Tensor
    """[T, R] of the valid positions."""
    padded: Tensor
    """bool [B, N], positions that hold an event."""

    def public_name(self, name: str) -> str:
        """Name of one of our parameters in the golden file."""
        if name == "sequence_input.positions":
            return POSITIONS
        _, layer, rest = name.split(".", 2)
        theirs = {
            "uvqk": "_uvqk",
            "position_bias": "_rel_attn_bias._pos_w",
            "time_bias": "_rel_attn_bias._ts_w",
            "output.weight": "_o.weight",
            "output.bias": "_o.bias",
        }
        return f"_hstu._attention_layers.{layer}.{theirs[rest]}"


@pytest.fixture(params=["small", "medium"])
def case(request: pytest.FixtureRequest) -> Case:
    with np.load(GOLDEN / f"hstu_{request.param}.npz") as file:
        arrays = {name: file[name] for name in file.files}
    width, max_len = arrays["output"].shape[2], int(arrays["max_len"])
    layers = sum(name.endswith("_uvqk") for name in arrays if name.startswith("param/"))
    config = HSTUConfig(
        width=width,
        num_layers=layers,
        num_heads=int(arrays["heads"]),
        qk_width=int(arrays["dqk"]),
        v_width=int(arrays["dv"]),
        dropout=0.0,
        attention_slack=1,
    )
    rows = arrays[f"param/{ITEMS}"].shape[0]
    model = HSTU(config, (TableSpec("item", rows, width, 0.02),), max_len - 1)
    lengths = torch.from_numpy(arrays["lengths"])
    padded = torch.arange(max_len) < lengths[:, None]
    times = torch.from_numpy(arrays["timestamps"])
    following = torch.cat([times[:, 1:], times[:, -1:]], dim=1)
    batch = JaggedBatch(
        sample_ids=torch.arange(len(lengths)),
        user_ids=torch.arange(len(lengths)) + 1,
        offsets=F.pad(lengths.cumsum(0), (1, 0)),
        item_ids=torch.from_numpy(arrays["ids"])[padded],
        timestamps=times[padded],
        next_timestamps=following[padded],
        target_ids=torch.from_numpy(arrays["next_ids"])[padded],
    )
    case = Case(arrays, model, batch, torch.from_numpy(arrays["negatives"])[padded], padded)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[f"param/{case.public_name(name)}"]))
    return case


def test_queries_equal_the_public_model(case: Case) -> None:
    table = torch.from_numpy(case.arrays[f"param/{ITEMS}"])
    queries = case.model(case.batch, {"item": table[case.batch.item_ids]}, 0)
    expected = torch.from_numpy(case.arrays["output"])
    valid = torch.from_numpy(case.arrays["valid"])
    torch.testing.assert_close(queries[valid[case.padded]], expected[valid], atol=2e-6, rtol=0)


def test_loss_and_all_gradients_equal_the_public_model(case: Case) -> None:
    arrays = case.arrays
    table = torch.from_numpy(arrays[f"param/{ITEMS}"]).requires_grad_()
    objective = SampledSoftmaxConfig(
        temperature=float(arrays["tau"]), num_negatives=case.negatives.shape[1]
    )
    loss_module = NextItemLoss(case.model, objective, table.shape[0] - 1)
    inputs = NextItemInputs(case.batch, case.negatives, None, 0)
    loss = run_loss(loss_module, inputs, {"item": table}).loss_sum / loss_module.weight(inputs)
    loss.backward()
    torch.testing.assert_close(loss, torch.from_numpy(arrays["loss"]), atol=0, rtol=1e-6)
    gradients = {ITEMS: table.grad}
    gradients |= {case.public_name(n): p.grad for n, p in case.model.named_parameters()}
    expected = {n.removeprefix("grad/"): x for n, x in arrays.items() if n.startswith("grad/")}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient is not None
        golden = torch.from_numpy(expected[name])
        error = (gradient - golden).abs().max() / golden.abs().max()
        assert error < TOLERANCE, f"{name}: {error:.1e}"
