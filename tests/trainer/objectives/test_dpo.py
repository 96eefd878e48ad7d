"""DPO: the loss by hand, the module against a plain computation, the supervised term."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configs.alignment import DPOConfig, IPOConfig, OfflineAlignment, SoftmaxDPOConfig
from configs.models import HSTUConfig, InitConfig
from configs.objectives import FullSoftmaxConfig, Objective, SampledSoftmaxConfig
from models.base import CatalogueSizes
from models.build import build_model
from sharding.process_group import DistributedContext
from tests.models.sequences import make_batch, take, tokens_of
from tests.trainer.objectives.loss_tools import run_loss
from trainer.objectives.dpo import (
    PreferenceInputs,
    PreferenceLoss,
    dpo_loss,
    ipo_loss,
    pairs_won,
    softmax_dpo_loss,
)
from trainer.objectives.negatives import draw_negatives
from trainer.objectives.scoring import Candidates, ItemScorer

ALONE = DistributedContext(0, 1, torch.device("cpu"))
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


def test_ipo_by_hand() -> None:
    """β = .1 wants a margin of 5 exactly."""
    losses = ipo_loss(torch.tensor([5.0, 0.0, 7.5]), beta=0.1)
    torch.testing.assert_close(losses, torch.tensor([0.0, 25.0, 6.25]))


def test_softmax_dpo_by_hand() -> None:
    """Three even losers: log 4; one loser is DPO; absent ones do not count."""
    differences = torch.tensor([[0.0, 0.0, 0.0], [2.0, 9.0, -9.0], [1.0, -3.0, 0.5]])
    there = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    losses = softmax_dpo_loss(differences, there, beta=0.5)
    alone = -math.log(1 / (1 + math.exp(-1.0)))
    two = math.log(1 + math.exp(-0.5) + math.exp(1.5))
    torch.testing.assert_close(losses, torch.tensor([math.log(4), alone, two]))
    torch.testing.assert_close(losses[1:2], dpo_loss(differences[1:2, 0], 0.5, 0.0))
    nobody = softmax_dpo_loss(differences[:1], torch.zeros(1, 3).bool(), beta=0.5)
    assert nobody.tolist() == [0.0]
    far = torch.tensor([[-1e6, 1e6]], requires_grad=True)
    softmax_dpo_loss(far, torch.ones(1, 2).bool(), beta=0.5).sum().backward()
    assert far.grad is not None and far.grad.isfinite().all()


def test_pairs_that_rounding_decides_count_half() -> None:
    won = pairs_won(torch.tensor([0.3, -0.3, 0.0, 5e-5, -5e-5, 2e-4, -2e-4]))
    assert won.tolist() == [1.0, 0.0, 0.5, 0.5, 0.5, 1.0, 0.0]


def build(config: OfflineAlignment, objective: Objective) -> PreferenceLoss:
    torch.manual_seed(0)
    sizes = CatalogueSizes(NUM_ITEMS, 9, {}, {})
    model = build_model(HSTUConfig(width=WIDTH, qk_width=4, v_width=4), sizes, InitConfig(), 20)
    normalised = isinstance(objective, FullSoftmaxConfig)
    scorer = ItemScorer(model, objective, NUM_ITEMS, ALONE, normalised=normalised)
    return PreferenceLoss(scorer, config).train()


def table() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"item": torch.randn(NUM_ITEMS + 1, WIDTH, requires_grad=True)}


def make_pairs(lengths: list[int], losers: int = 1) -> PreferenceInputs:
    """Pairs without the supervised term; every second one lacks its last loser if it has many."""
    batch, count = make_batch(lengths, NUM_ITEMS), len(lengths)
    generator = torch.Generator().manual_seed(4)
    chosen = batch.target_ids[batch.offsets[1:] - 1] if count else batch.target_ids
    items = (chosen[:, None] - 1 + 3 * torch.arange(1 + losers)) % NUM_ITEMS + 1
    if losers > 1:
        items[1::2, -1] = 0
    reference = -torch.rand(count, 1 + losers, generator=generator)
    return PreferenceInputs(Candidates(batch, items), reference, None)


def take_pairs(pairs: PreferenceInputs, chosen: list[int]) -> PreferenceInputs:
    batch = take(pairs.candidates.batch, chosen)
    candidates = Candidates(batch, pairs.candidates.items[chosen])
    return PreferenceInputs(candidates, pairs.reference[chosen], None)


def inputs_of(
    objective: Objective, pairs: PreferenceInputs, supervised: bool = True
) -> PreferenceInputs:
    negatives = draw_negatives(objective, pairs.candidates.batch, NUM_ITEMS, seed=0, step=3)
    return replace(pairs, supervised=negatives if supervised else None)


KINDS: list[OfflineAlignment] = [
    DPOConfig(beta=0.3, label_smoothing=0.1, supervised_weight=0.0),
    DPOConfig(beta=0.3, label_smoothing=0.1, supervised_weight=0.7),
    IPOConfig(beta=0.3, supervised_weight=0.7),
    SoftmaxDPOConfig(beta=0.3, supervised_weight=0.7),
]


@pytest.mark.parametrize("losers", [1, 3])
@pytest.mark.parametrize("config", KINDS)
def test_module_equals_a_plain_computation(config: OfflineAlignment, losers: int) -> None:
    """With catalogue log-probabilities written out, so that the normaliser is seen to cancel."""
    module, tables, pairs = build(config, FULL), table(), make_pairs([4, 1, 9], losers)
    output = run_loss(module, inputs_of(FULL, pairs), tables)
    item, batch = tables["item"], pairs.candidates.batch
    queries = module.model(batch, {"item": item[batch.item_ids]}, 0)
    log_probs = torch.log_softmax(queries @ module.model.item_keys(item[1:]).T / 0.5, dim=-1)
    names = ("loss", "rewards/chosen", "rewards/rejected", "accuracy", "margin")
    expected = dict.fromkeys(names, 0.0)
    for b in range(3):
        own = tokens_of(batch, log_probs, b)
        targets = tokens_of(batch, batch.target_ids, b)
        items = [i for i in pairs.candidates.items[b].tolist() if i]
        reference = pairs.reference[b, : len(items)].tolist()
        ratios = [own[-1, i - 1].item() - r for i, r in zip(items, reference, strict=True)]
        margins = [0.3 * (ratios[0] - loser) for loser in ratios[1:]]
        context = -own[torch.arange(len(targets)), targets - 1].mean().item()
        expected["loss"] += plainly(config, margins) + config.supervised_weight * context
        expected["rewards/chosen"] += 0.3 * ratios[0]
        expected["rewards/rejected"] += 0.3 * sum(ratios[1:]) / len(margins)
        expected["accuracy"] += sum(m > 0 for m in margins) / len(margins)
        expected["margin"] += sum(margins) / len(margins)
    found = {name: value.item() for name, value in output.metrics.items()}
    found["loss"] = output.loss_sum.item()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert module.weight(inputs_of(FULL, pairs)) == 3


def test_rewards_where_the_scorer_leaves_log_z_out() -> None:
    """They are those of the complete log π, which the step was given."""
    tables, pairs = table(), make_pairs([4, 1, 9], 3)
    whole = run_loss(build(DPOConfig(), FULL), inputs_of(FULL, pairs), tables).metrics
    module = build(DPOConfig(), SAMPLED)
    bare = run_loss(module, inputs_of(SAMPLED, pairs), tables).metrics
    assert not [name for name in bare if name.startswith("rewards")]
    item, batch = tables["item"], pairs.candidates.batch
    queries = module.model(batch, {"item": item[batch.item_ids]}, 0)[batch.offsets[1:] - 1]
    log_probs = torch.log_softmax(queries @ module.model.item_keys(item[1:]).T / 0.5, dim=-1)
    log_probs = log_probs.gather(1, (pairs.candidates.items - 1).clamp(min=0)).detach()
    told = run_loss(module, replace(inputs_of(SAMPLED, pairs), log_probs=log_probs), tables).metrics
    for name in ("rewards/chosen", "rewards/rejected"):
        torch.testing.assert_close(told[name], whole[name])


@pytest.mark.parametrize("config", [DPOConfig(beta=0.3), SoftmaxDPOConfig(beta=0.3)])
def test_what_has_no_loser_is_no_pair(config: OfflineAlignment) -> None:
    """Two of four contexts have none: the preference loss and what is said of pairs are means over
    the other two, while the supervised loss stays that of all four."""
    pairs = make_pairs([4, 1, 9, 2])
    tied = replace(pairs.candidates, items=pairs.candidates.items.clone())
    tied.items[1], tied.items[3, 1] = 0, 0
    inputs = inputs_of(FULL, replace(pairs, candidates=tied, per_pair=torch.tensor(2.0)))
    module, tables = build(config, FULL), table()
    found = run_loss(module, inputs, tables)
    alone = run_loss(module, inputs_of(FULL, take_pairs(pairs, [0, 2])), tables).metrics
    for name in ("accuracy", "margin", "preference_loss", "rewards/chosen", "rewards/rejected"):
        assert found.terms[name] == 2
        torch.testing.assert_close(found.metrics[name], alone[name])
    supervised = run_loss(module, inputs_of(FULL, pairs), tables).metrics["supervised_loss"]
    torch.testing.assert_close(found.metrics["supervised_loss"], supervised)
    expected = 2.0 * found.metrics["preference_loss"] + supervised
    torch.testing.assert_close(found.loss_sum.detach(), expected)
    tied.items[:, 1:] = 0
    nobody = run_loss(module, replace(inputs, per_pair=torch.tensor(0.0)), tables)
    assert nobody.terms.keys() == found.terms.keys() and not any(nobody.terms.values())
    torch.testing.assert_close(nobody.loss_sum.detach(), supervised)


def plainly(config: OfflineAlignment, margins: list[float]) -> float:
    """Loss of one pair with βΔ of each loser, from the formulas."""

    def log_sigmoid(x: float) -> float:
        return -math.log(1 + math.exp(-x))

    match config:
        case DPOConfig():
            each = [-0.9 * log_sigmoid(m) - 0.1 * log_sigmoid(-m) for m in margins]
        case IPOConfig():
            each = [(m / 0.3 - 1 / 0.6) ** 2 for m in margins]
        case SoftmaxDPOConfig():
            return math.log(1 + sum(math.exp(-m) for m in margins))
    return sum(each) / len(each)


@pytest.mark.parametrize("objective", [SAMPLED, FULL])
@pytest.mark.parametrize("config", KINDS[1:])
def test_the_normaliser_changes_no_gradient(config: OfflineAlignment, objective: Objective) -> None:
    gradients = []
    for normalised in (False, True):
        tables, pairs = table(), make_pairs([4, 1, 9], 3)
        model = build(config, objective).model
        scorer = ItemScorer(model, objective, NUM_ITEMS, ALONE, normalised=normalised)  # type: ignore[arg-type]
        loss = run_loss(PreferenceLoss(scorer, config), inputs_of(objective, pairs), tables)
        wanted = [*model.parameters(), tables["item"]]
        gradients.append(torch.autograd.grad(loss.loss_sum, wanted))
    for bare, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(bare, whole, atol=2e-5, rtol=1e-3)


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
    assert inputs.candidates.items.is_meta and inputs.candidates.batch.item_ids.is_meta
    assert inputs.supervised is not None and inputs.supervised.batch.item_ids.is_meta
