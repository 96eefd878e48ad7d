"""Our GRPO against that of the `trl` package (the extra `trl`), called as its trainer calls it."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.objectives import policy_gradient as pg

trl = pytest.importorskip("trl", reason="install the extra `trl`")

N, G, L = 3, 4, 3
LOW, HIGH, BETA = 0.2, 0.28, 0.04


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return -2.0 * torch.rand(N, G, L, generator=generator)

    old = draw()
    new = old + 0.5 * torch.randn(N, G, L, generator=generator)
    lengths = torch.randint(1, L + 1, (N, G, 1), generator=generator)
    gain = torch.randn(N, G, generator=generator)
    return new, old, draw(), gain, torch.arange(L) < lengths


def their_loss(reduction: str, level: str, new: Tensor, *rest: Tensor) -> tuple[Tensor, Any]:
    """`GRPOTrainer._compute_loss`, its trainer being what it reads of it."""
    from trl import GRPOTrainer

    old, reference, gain, mask = (value.flatten(0, 1) for value in rest)
    completions = torch.zeros(N * G, L, dtype=torch.int64)
    loop = SimpleNamespace(
        loss_type=reduction,
        importance_sampling_level=level,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        beta=BETA,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        tools=None,
        aux_loss_enabled=False,
        max_completion_length=L,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        model=torch.nn.Identity().train(),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1, reduce=lambda value, **_: value, gather=lambda value: value
        ),
    )
    scores = (new.flatten(0, 1), torch.zeros(N * G, L), None)
    loop._get_per_token_logps_and_entropies = lambda *_, **__: scores
    batch = {
        "prompt_ids": completions[:, :1],
        "prompt_mask": torch.ones(N * G, 1),
        "completion_ids": completions,
        "completion_mask": mask.float(),
        "advantages": gain,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = GRPOTrainer._compute_loss(loop, torch.nn.Identity(), batch)
    return loss, loop._metrics["train"]


@pytest.mark.parametrize("reduction", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_gradient_and_measures_are_theirs(reduction: Any, level: Any, seed: int) -> None:
    new, old, reference, gain, mask = inputs(seed)
    theirs_new = new.clone().requires_grad_()
    theirs, measures = their_loss(reduction, level, theirs_new, old, reference, gain, mask)
    theirs.backward()
    new.requires_grad_()
    terms = pg.grpo_terms(
        pg.at_level(new, mask, level), pg.at_level(old, mask, level), gain, LOW, HIGH
    )
    divergence = pg.divergences(new, reference, "k3")
    weight = pg.term_weights(mask, reduction).sum()
    ours = pg.reduced(BETA * divergence - terms.objective, mask, reduction) / weight
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(new.grad, theirs_new.grad, rtol=1e-6, atol=1e-6)
    if reduction == "dapo":
        found = float(pg.reduced(divergence.detach(), mask, reduction) / weight)
        assert found == pytest.approx(measures["kl"][0], abs=1e-6)
        if level == "token":
            low = float(pg.reduced(terms.clipped_low.float(), mask, reduction) / weight)
            assert low == pytest.approx(measures["clip_ratio/low_mean"][0], abs=1e-6)


def test_advantages_are_theirs() -> None:
    """Their (r - mean) / (std + 1e-4), std of samples, as `_generate_and_score_completions`."""
    rewards = torch.rand(N, G, generator=torch.Generator().manual_seed(5))
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    found = pg.group_advantages(rewards, torch.ones(N, G, dtype=torch.bool), "group", 1e-4)
    torch.testing.assert_close(found, expected)
