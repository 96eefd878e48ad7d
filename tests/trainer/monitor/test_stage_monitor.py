"""What the line of a training stage shows."""

from pathlib import Path

import pytest
import torch

from trainer.monitor.stage_monitor import StageMonitor


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"lr": 0.1, "dense_grad_norm": 1.0}, "loss 0.5000  0 tokens/s"),
        (
            {"lr": 0.1, "kl": 0.00032, "reward": 0.3277, "reward/hit": 0.1},
            "loss 0.5000  reward 0.3277  kl 0.00032  ",
        ),
        ({"accuracy": 0.5, "kl": 0.0}, "loss 0.5000  accuracy 0.5  kl 0  "),
    ],
)
def test_an_alignment_shows_what_its_loss_does_not_say(
    tmp_path: Path, values: dict[str, float], shown: str
) -> None:
    lines: list[str] = []
    monitor = StageMonitor(
        "align",
        total_steps=2,
        start_step=0,
        directory_url=str(tmp_path),
        forward_flops_per_token=1.0,
        world_size=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
        say=lines.append,
    )
    with monitor:
        monitor.log_step(2, 0, 0.5, values)
    assert shown in lines[-1]
