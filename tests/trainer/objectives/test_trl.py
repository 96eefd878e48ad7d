"""GRPO, DPO and IPO against the `trl` package (the extra `trl`), called as its trainers call it."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.alignment import DPOConfig, IPOConfig, OfflineAlignment
from tests.models.sequences import make_batch
from trainer.objectives import policy_gradient as pg
from trainer.objectives.dpo import PreferenceInputs, PreferenceLoss
from trainer.objectives.scoring import Candidates, Scored

trl = pytest.importorskip("trl", reason="install the extra `trl`")

N, G, L = 3, 4, 3
LOW, HIGH, BETA = 0.2, 0.28, 0.04
PULL = 0.3


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


class Given:
    """A scorer whose policy is the numbers it was given."""

    normalised = True

    def __init__(self, log_probs: Tensor) -> None:
        self.model: Any = torch.nn.Identity()
        self.log_probs = log_probs

    def required_ids(self, *_: Any) -> dict[str, Any]:
        return {}

    def __call__(self, *_: Any) -> Scored:
        return Scored(self.log_probs, None)


def their_preference_loss(
    kind: str, label_smoothing: float, new: Tensor, reference: Tensor
) -> tuple[Tensor, Any]:
    """`DPOTrainer._compute_loss` of winners and losers [N, 2, L], its trainer being what it reads
    of it."""
    from trl import DPOTrainer

    # Winners come before losers, and a completion of L tokens after one token of a prompt.
    per_token, ref = (values.transpose(0, 1).flatten(0, 1) for values in (new, reference))
    rows, levels = per_token.shape
    mask = torch.ones(rows, 1 + levels)
    mask[:, 0] = 0.0
    outputs = SimpleNamespace(
        log_probs=per_token,
        entropy=torch.zeros_like(per_token),
        mean_logits=torch.zeros_like(per_token),
        is_top1=torch.zeros_like(per_token, dtype=torch.bool),
    )
    loop = SimpleNamespace(
        loss_types=[kind],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        beta=PULL,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
        model=torch.nn.Identity().train(),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            gather=lambda value: value,
            gather_for_metrics=lambda value: value,
        ),
    )
    ref_chosen, ref_rejected = ref.detach().sum(1).chunk(2)
    batch = {
        "input_ids": torch.zeros(rows, 1 + levels, dtype=torch.int64),
        "attention_mask": torch.ones(rows, 1 + levels),
        "completion_mask": mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss: Tensor = DPOTrainer._compute_loss(loop, lambda **_: outputs, batch, False)
    return loss, loop._metrics["train"]


def preferences(levels: int, seed: int) -> tuple[Tensor, Tensor]:
    """log π and log π_ref of N pairs, [N, 2, L] each."""
    generator = torch.Generator().manual_seed(seed)
    new, reference = -3.0 * torch.rand(2, N, 2, levels, generator=generator)
    return new, reference


def our_preference_loss(
    config: OfflineAlignment, new: Tensor, reference: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Loss and measures of the module, means over pairs."""
    items = torch.arange(1, 1 + 2 * N).view(N, 2)
    candidates = Candidates(make_batch([1] * N, 2 * N), items)
    module = PreferenceLoss(Given(new), config)
    output = module(PreferenceInputs(candidates, reference.sum(-1), None), {}, {})
    return output.loss_sum / N, {key: float(value / N) for key, value in output.metrics.items()}


PREFERENCES: list[tuple[str, OfflineAlignment, int]] = [
    ("sigmoid", DPOConfig(beta=PULL), 1),
    ("sigmoid", DPOConfig(beta=PULL), L),
    ("aot", DPOConfig(beta=PULL, label_smoothing=0.2), L),
    # Theirs means over a completion's tokens; an item is one.
    ("ipo", IPOConfig(beta=PULL), 1),
]


@pytest.mark.parametrize(("kind", "config", "levels"), PREFERENCES)
@pytest.mark.parametrize("seed", [0, 1])
def test_preference_loss_and_gradient_are_theirs(
    kind: str, config: OfflineAlignment, levels: int, seed: int
) -> None:
    new, reference = preferences(levels, seed)
    theirs_new = new.clone().requires_grad_()
    new.requires_grad_()
    ours, measures = our_preference_loss(config, new, reference)
    ours.backward()
    if kind == "aot":
        # Theirs smooths labels where it compares sorted ratios: of a pair alone that is DPO.
        each = [
            their_preference_loss(kind, 0.2, theirs_new[n : n + 1], reference[n : n + 1])[0]
            for n in range(N)
        ]
        theirs = torch.stack(each).mean()
    else:
        theirs, told = their_preference_loss(kind, 0.0, theirs_new, reference)
        assert measures["margin"] == pytest.approx(told["rewards/margins"][0], abs=1e-6)
        assert measures["accuracy"] == pytest.approx(told["rewards/accuracies"][0])
        for side in ("chosen", "rejected"):
            expected = told[f"rewards/{side}"][0]
            assert measures[f"rewards/{side}"] == pytest.approx(expected, abs=1e-6)
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(new.grad, theirs_new.grad, rtol=1e-6, atol=1e-6)
