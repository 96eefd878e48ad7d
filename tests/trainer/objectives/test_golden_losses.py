"""Ten steps of small models in plain PyTorch give the committed losses (golden/losses_*.json).

A change of these numbers is a change of what is trained. Where it is meant, write them anew with
`python -m tests.trainer.objectives.test_golden_losses` and say why in the commit.
"""

import json
from pathlib import Path

import pytest
import torch

from configs.models import HSTUConfig, InitConfig, Model, SASRecConfig
from configs.objectives import FullSoftmaxConfig, Objective, SampledSoftmaxConfig
from models.base import CatalogueSizes
from models.build import build_model
from tests.models.sequences import make_batch
from tests.trainer.objectives.loss_tools import run_loss
from trainer.objectives.negatives import draw_negatives
from trainer.objectives.next_item import NextItemLoss

GOLDEN = Path(__file__).parents[2] / "golden"
STEPS, NUM_ITEMS, SEED = 10, 60, 7
LENGTHS = [12, 3, 0, 20, 7, 1]
CASES: dict[str, tuple[Model, Objective]] = {
    "hstu_sampled": (
        HSTUConfig(width=16, qk_width=8, v_width=8, num_heads=2),
        SampledSoftmaxConfig(num_negatives=16, shared="position"),
    ),
    "hstu_sampled_by_sequence_corrected": (
        HSTUConfig(width=16, qk_width=8, v_width=8, num_heads=2),
        SampledSoftmaxConfig(num_negatives=16, shared="sequence", logq_correction=True),
    ),
    "sasrec_full": (
        SASRecConfig(width=16, feedforward_width=32, num_heads=2),
        FullSoftmaxConfig(),
    ),
}


def train(name: str) -> list[float]:
    """Mean loss of each step, AdamW on model and table alike, two sequences of data in turn."""
    config, objective = CASES[name]
    torch.manual_seed(SEED)
    sizes = CatalogueSizes(NUM_ITEMS, len(LENGTHS), {}, {})
    model = build_model(config, sizes, InitConfig(), max_length=20)
    module = NextItemLoss(model, objective, NUM_ITEMS).train()
    item = (torch.randn(NUM_ITEMS + 1, 16) * 0.02).requires_grad_()
    optimizer = torch.optim.AdamW([*module.parameters(), item], lr=1e-2, betas=(0.9, 0.98))
    losses = []
    for step in range(STEPS):
        batch = make_batch(LENGTHS, NUM_ITEMS, seed=step % 2)
        inputs = draw_negatives(objective, batch, NUM_ITEMS, SEED, step)
        loss = run_loss(module, inputs, {"item": item}).loss_sum / module.weight(inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", CASES)
def test_losses_are_the_committed_ones(name: str) -> None:
    golden = json.loads((GOLDEN / f"losses_{name}.json").read_text())
    assert train(name) == pytest.approx(golden, rel=3e-6)
    assert golden[-1] < golden[0] - 0.2, "the golden run learned nothing"


if __name__ == "__main__":
    for case in CASES:
        (GOLDEN / f"losses_{case}.json").write_text(json.dumps(train(case), indent=1) + "\n")
