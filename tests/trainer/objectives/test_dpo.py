"""DPO: the loss by hand, the module against a plain computation, the supervised term."""

import math

import pytest
import torch
from torch import Tensor

from configs.alignment import DPOConfig
from configs.models import HSTUConfig, InitConfig
from configs.objectives import FullSoftmaxConfig, Objective, SampledSoftmaxConfig
from models.base import CatalogueSizes
from models.batch import PreferenceBatch
from models.build import build_model
from tests.models.sequences import make_batch, take, tokens_of
from tests.trainer.objectives.loss_tools import run_loss
from trainer.objectives.dpo import PreferenceInputs, PreferenceLoss, dpo_loss, pairs_won
from trainer.objectives.negatives import draw_negatives

NUM_ITEMS, WIDTH = 25, 8
SAMPLED = SampledSoftmaxConfig(num_negatives=6, shared="sequence", temperature=0.5)
FULL = FullSoftmaxConfig(temperature=0.5)


def test_values_by_hand() -> None:
    """Δ = 0: log 2. βΔ = log 3: −log(3/4), smoothed by a quarter of −log(1/4)."""
    difference = torch.tensor([0.0, math.log(3) / 0.1, -math.log(3) / 0.1])
    losses = dpo_loss(difference, beta=0.1, label_smoothing=0.0)
    by_hand = [math.log(2), math.log(4 / 3), math.log(4)]
    torch.testing.assert_close(losses, torch.tensor(by_hand), atol=1e-5, rtol=0)
    losses = dpo_loss(difference, beta=0.1, label_smoothing=0.25)
    smooth = [math.log(2), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)]
    smooth += [0.75 * math.log(4) + 0.25 * math.log(4 / 3)]
    torch.testing.assert_close(losses, torch.tensor(smooth), atol=1e-5, rtol=0)


def test_gradient_by_hand_and_no_overflow() -> None:
    """dL/dΔ = −β (σ(−βΔ) − ε); far differences stay finite."""
    difference = torch.tensor([0.0, 2.0, 1e6, -1e6], requires_grad=True)
    losses = dpo_loss(difference, beta=0.5, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(losses.sum(), difference)
    right = [1 / (1 + math.exp(0.5 * d)) for d in (0.0, 2.0)] + [0.0, 1.0]
    torch.testing.assert_close(gradient, torch.tensor([-0.5 * (s - 0.1) for s in right]))
    assert losses.isfinite().all()


def test_pairs_that_rounding_decides_count_half() -> None:
    won = pairs_won(torch.tensor([0.3, -0.3, 0.0, 5e-5, -5e-5, 2e-4, -2e-4]))
    assert won.tolist() == [1.0, 0.0, 0.5, 0.5, 0.5, 1.0, 0.0]


def build(config: DPOConfig, objective: Objective) -> PreferenceLoss:
    torch.manual_seed(0)
    sizes = CatalogueSizes(NUM_ITEMS, 9, {}, {})
    model = build_model(HSTUConfig(width=WIDTH, qk_width=4, v_width=4), sizes, InitConfig(), 20)
    return PreferenceLoss(model, config, objective, NUM_ITEMS).train()


def table() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"item": torch.randn(NUM_ITEMS + 1, WIDTH, requires_grad=True)}


def make_pairs(lengths: list[int]) -> PreferenceBatch:
    batch, count = make_batch(lengths, NUM_ITEMS), len(lengths)
    generator = torch.Generator().manual_seed(4)
    chosen = batch.target_ids[batch.offsets[1:] - 1] if count else batch.target_ids
    return PreferenceBatch(
        batch=batch,
        pair_ids=torch.arange(count),
        chosen_ids=chosen,
        rejected_ids=chosen % NUM_ITEMS + 1,
        reference_chosen=-torch.rand(count, generator=generator),
        reference_rejected=-torch.rand(count, generator=generator),
    )


def take_pairs(pairs: PreferenceBatch, chosen: list[int]) -> PreferenceBatch:
    return PreferenceBatch(
        batch=take(pairs.batch, chosen),
        pair_ids=pairs.pair_ids[chosen],
        chosen_ids=pairs.chosen_ids[chosen],
        rejected_ids=pairs.rejected_ids[chosen],
        reference_chosen=pairs.reference_chosen[chosen],
        reference_rejected=pairs.reference_rejected[chosen],
    )


def inputs_of(
    objective: Objective, pairs: PreferenceBatch, supervised: bool = True
) -> PreferenceInputs:
    negatives = draw_negatives(objective, pairs.batch, NUM_ITEMS, seed=0, step=3)
    return PreferenceInputs(pairs, negatives if supervised else None)


@pytest.mark.parametrize("supervised_weight", [0.0, 0.7])
def test_module_equals_a_plain_computation(supervised_weight: float) -> None:
    """With catalogue log-probabilities written out, so that the normaliser is seen to cancel."""
    config = DPOConfig(beta=0.3, label_smoothing=0.1, supervised_weight=supervised_weight)
    module, tables, pairs = build(config, FULL), table(), make_pairs([4, 1, 9])
    output = run_loss(module, inputs_of(FULL, pairs), tables)
    item = tables["item"]
    queries = module.model(pairs.batch, {"item": item[pairs.batch.item_ids]}, 0)
    keys = module.model.item_keys(item[1:])
    log_probs = torch.log_softmax(queries @ keys.T / 0.5, dim=-1)
    expected = dict.fromkeys(("loss", "chosen", "rejected", "accuracy", "margin"), 0.0)
    for b in range(3):
        own = tokens_of(pairs.batch, log_probs, b)
        targets = tokens_of(pairs.batch, pairs.batch.target_ids, b)
        winner = own[-1, pairs.chosen_ids[b] - 1] - pairs.reference_chosen[b]
        loser = own[-1, pairs.rejected_ids[b] - 1] - pairs.reference_rejected[b]
        margin = 0.3 * (winner - loser)
        dpo = -0.9 * torch.sigmoid(margin).log() - 0.1 * torch.sigmoid(-margin).log()
        context = -own[torch.arange(len(targets)), targets - 1].mean()
        expected["loss"] += (dpo + supervised_weight * context).item()
        expected["chosen"] += winner.item()
        expected["rejected"] += loser.item()
        expected["accuracy"] += float(margin > 0)
        expected["margin"] += margin.item()
    assert output.loss_sum.item() == pytest.approx(expected["loss"], rel=1e-5)
    metrics = {name: value.item() for name, value in output.metrics.items()}
    assert metrics["chosen_log_ratio"] == pytest.approx(expected["chosen"], rel=1e-4)
    assert metrics["rejected_log_ratio"] == pytest.approx(expected["rejected"], rel=1e-4)
    assert metrics["accuracy"] == expected["accuracy"]
    assert metrics["margin"] == pytest.approx(expected["margin"], rel=1e-4)
    assert module.weight(inputs_of(FULL, pairs)) == 3


@pytest.mark.parametrize("objective", [SAMPLED, FULL])
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_micro_batching_changes_nothing(objective: Objective, cut: int) -> None:
    module, pairs = build(DPOConfig(), objective), make_pairs([4, 1, 9, 2])
    parts = [take_pairs(pairs, list(range(cut))), take_pairs(pairs, list(range(cut, 4)))]
    totals = []
    for batches in ([pairs], parts):
        tables = table()
        outputs = [run_loss(module, inputs_of(objective, p), tables) for p in batches]
        loss = torch.stack([o.loss_sum for o in outputs]).sum()
        named = dict(module.named_parameters()) | tables
        totals.append((loss, *torch.autograd.grad(loss, list(named.values()))))
        assert all(o.metrics.keys() == outputs[0].metrics.keys() for o in outputs)
    for whole, split in zip(*totals, strict=True):
        torch.testing.assert_close(split, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", [SAMPLED, FULL])
@pytest.mark.parametrize("supervised", [True, False])
def test_a_rank_without_pairs_takes_part(objective: Objective, supervised: bool) -> None:
    module, tables = build(DPOConfig(), objective), table()
    inputs = inputs_of(objective, make_pairs([]), supervised)
    output = run_loss(module, inputs, tables)
    assert output.loss_sum.item() == 0 == module.weight(inputs).item()
    output.loss_sum.backward()
    for name, parameter in (dict(module.named_parameters()) | tables).items():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_step_moves_the_winner_over_the_loser() -> None:
    module, pairs = build(DPOConfig(beta=1.0), SAMPLED), make_pairs([4, 6, 9, 3])
    tables = table()
    optimizer = torch.optim.SGD([*module.parameters(), tables["item"]], lr=0.05)
    margins = []
    for _ in range(5):
        output = run_loss(module, inputs_of(SAMPLED, pairs, supervised=False), tables)
        margins.append(output.metrics["margin"].item())
        optimizer.zero_grad()
        output.loss_sum.backward()
        optimizer.step()
    assert margins == sorted(margins) and margins[-1] > margins[0] + 0.5


def test_dropout_stays_off_in_training() -> None:
    module, pairs = build(DPOConfig(), SAMPLED), make_pairs([9])
    assert module.training and not module.model.training
    first, second = (
        run_loss(module, inputs_of(SAMPLED, pairs), table()).loss_sum for _ in range(2)
    )
    module.eval()
    assert first == second == run_loss(module, inputs_of(SAMPLED, pairs), table()).loss_sum


def test_parameters_are_registered_once() -> None:
    names = [n for n, _ in build(DPOConfig(), SAMPLED).named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) and all(name.startswith("model.") for name in names)


def test_inputs_move_between_devices() -> None:
    inputs = inputs_of(SAMPLED, make_pairs([3])).to("meta")
    assert inputs.pairs.chosen_ids.is_meta and inputs.pairs.batch.item_ids.is_meta
    assert inputs.supervised is not None and inputs.supervised.batch.item_ids.is_meta
