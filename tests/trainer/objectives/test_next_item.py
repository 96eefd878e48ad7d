"""The next-item loss module: what it asks for, what it returns, and what cannot change it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.models import HSTUConfig, InitConfig, Model, SASRecConfig
from configs.objectives import FullSoftmaxConfig, Objective, SampledSoftmaxConfig
from models.base import CatalogueSizes
from models.batch import JaggedBatch
from models.build import build_model
from tests.models.sequences import make_batch, take
from tests.trainer.objectives.loss_tools import run_loss
from trainer.objectives.negatives import draw_negatives
from trainer.objectives.next_item import NextItemInputs, NextItemLoss

NUM_ITEMS, WIDTH = 25, 8
SIZES = CatalogueSizes(NUM_ITEMS, 9, {"age": 4}, {})
HSTU = HSTUConfig(width=WIDTH, qk_width=4, v_width=4, user_features=("age",))
SASREC = SASRecConfig(width=WIDTH, feedforward_width=8)
OBJECTIVES: list[Objective] = [
    SampledSoftmaxConfig(num_negatives=6, shared="position"),
    SampledSoftmaxConfig(num_negatives=6, shared="sequence", logq_correction=True),
    SampledSoftmaxConfig(num_negatives=6, shared="batch"),
    SampledSoftmaxConfig(num_negatives=6, shared="batch", negatives="mixed"),
    FullSoftmaxConfig(chunk_tokens=4),
    SampledSoftmaxConfig(num_negatives=6, shared="sequence", negatives="mixed"),
    SampledSoftmaxConfig(num_negatives=6, shared="position", negatives="mixed"),
]


def build(objective: Objective, config: Model = HSTU) -> NextItemLoss:
    torch.manual_seed(0)
    return NextItemLoss(build_model(config, SIZES, InitConfig(), 20), objective, NUM_ITEMS)


def tables() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "item": torch.randn(NUM_ITEMS + 1, WIDTH, requires_grad=True),
        "user_age": torch.randn(5, WIDTH, requires_grad=True),
    }


def inputs_of(objective: Objective, batch: JaggedBatch) -> NextItemInputs:
    pool = torch.tensor([1, 2, 3, 3])
    return draw_negatives(objective, batch, NUM_ITEMS, seed=0, step=3, global_positives=pool)


def losses_and_gradients(
    module: NextItemLoss, parts: list[JaggedBatch]
) -> tuple[float, float, dict[str, Tensor]]:
    """Sum over micro batches of the loss, of the weight, and of every gradient."""
    leaves = tables()
    total = torch.zeros(())
    for part in parts:
        total = total + run_loss(module, inputs_of(module.objective, part), leaves).loss_sum
    weight = sum(float(module.weight(inputs_of(module.objective, part))) for part in parts)
    named = dict(module.named_parameters()) | leaves
    values = torch.autograd.grad(total, list(named.values()), materialize_grads=True)
    return total.item(), weight, dict(zip(named, values, strict=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(cut=st.integers(0, 5), predicting=st.sampled_from([0.5, 1.0]))
@settings(deadline=None, max_examples=5)
def test_micro_batching_changes_nothing(objective: Objective, cut: int, predicting: float) -> None:
    """One batch, or two of its parts on two ranks: equal sums, weights and gradients."""
    module = build(objective).train()  # with dropout
    batch = make_batch([5, 0, 9, 1, 3], NUM_ITEMS, predicting=predicting, user_features={"age": 4})
    parts = [take(batch, list(range(cut))), take(batch, list(range(cut, 5)))]
    whole, split = losses_and_gradients(module, [batch]), losses_and_gradients(module, parts)
    assert whole[0] == pytest.approx(split[0], rel=1e-5)
    assert whole[1] == split[1] == (batch.target_ids > 0).sum()
    for name, gradient in whole[2].items():
        torch.testing.assert_close(split[2][name], gradient, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("config", [HSTU, SASREC])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_rank_without_data_takes_part(
    objective: Objective, config: Model, lengths: list[int]
) -> None:
    module = build(objective, config).train()
    inputs = inputs_of(objective, make_batch(lengths, NUM_ITEMS, user_features={"age": 4}))
    leaves = tables()
    output = run_loss(module, inputs, leaves)
    assert output.loss_sum.item() == 0 == module.weight(inputs).item()
    output.loss_sum.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    gradient = leaves["item"].grad
    assert gradient is not None and not gradient.any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_of_other_micro_batches_change_nothing(objective: Objective) -> None:
    module, leaves = build(objective), tables()
    inputs = inputs_of(objective, make_batch([6, 8], NUM_ITEMS, user_features={"age": 4}))
    alone = run_loss(module, inputs, leaves).loss_sum
    among = run_loss(module, inputs, leaves, others=[0, 1, 3, 4]).loss_sum
    torch.testing.assert_close(among, alone, atol=0, rtol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_parameter_and_table_learns(objective: Objective) -> None:
    module = build(objective)
    leaves = tables()
    batch = make_batch([6, 8], NUM_ITEMS, user_features={"age": 4})
    run_loss(module, inputs_of(objective, batch), leaves).loss_sum.backward()
    for name, parameter in (dict(module.named_parameters()) | leaves).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("config", [HSTU, SASREC])
@pytest.mark.parametrize("fused", [True, False])
def test_under_autocast_the_loss_is_float32_and_near(
    objective: Objective, config: Model, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr("trainer.objectives.sampled_softmax.runs_fused", lambda *_: False)
        monkeypatch.setattr("models.ops.native.runs_native", lambda *_: False)
    module, leaves = build(objective, config).train(), tables()
    inputs = inputs_of(objective, make_batch([6, 14], NUM_ITEMS, user_features={"age": 4}))
    exact = run_loss(module, inputs, leaves).loss_sum
    with torch.autocast("cpu", torch.bfloat16):
        rough = run_loss(module, inputs, leaves).loss_sum
    rough.backward()
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0, rtol=0.02)
    assert leaves["item"].grad is not None and leaves["item"].grad.dtype == torch.float32


def test_required_ids_are_one_lookup_of_history_positives_and_negatives() -> None:
    batch = make_batch([3, 2], NUM_ITEMS, user_features={"age": 4})
    inputs = inputs_of(OBJECTIVES[0], batch)
    ids = build(OBJECTIVES[0]).required_ids(inputs)
    assert {t: set(f) for t, f in ids.items()} == {
        "item": {"history", "positive", "negative"},
        "user_age": {"history"},
    }
    assert ids["item"]["negative"].shape == (5, 6)
    assert torch.equal(ids["user_age"]["history"], batch.user_features["age"])
    ids = build(FullSoftmaxConfig()).required_ids(inputs_of(FullSoftmaxConfig(), batch))
    assert set(ids["item"]) == {"history", "catalogue"}
    assert ids["item"]["catalogue"].tolist() == list(range(1, NUM_ITEMS + 1))


def test_positions_without_target_do_not_count() -> None:
    for objective in OBJECTIVES:
        module = build(objective).eval()
        batch = make_batch([12], NUM_ITEMS, user_features={"age": 4})
        for t in range(12):
            batch.target_ids[t] = 0
        output = run_loss(module, inputs_of(objective, batch), tables())
        assert output.loss_sum.item() == 0
        assert output.metrics["target_probability"].item() == 0


def test_target_probability_is_exp_of_minus_the_loss() -> None:
    module = build(FullSoftmaxConfig(temperature=1.0)).eval()
    batch = make_batch([1], NUM_ITEMS, user_features={"age": 4})
    output = run_loss(module, inputs_of(module.objective, batch), tables())
    torch.testing.assert_close(output.metrics["target_probability"], (-output.loss_sum).exp())
    assert not output.metrics["target_probability"].requires_grad


def test_a_large_catalogue_is_refused_for_the_full_softmax() -> None:
    objective = FullSoftmaxConfig(max_catalogue=NUM_ITEMS - 1)
    with pytest.raises(ValueError, match=r"max_catalogue=24.*sampled_softmax"):
        build(objective)


def test_inputs_move_between_devices_and_stay_themselves() -> None:
    inputs = inputs_of(OBJECTIVES[1], make_batch([3], NUM_ITEMS, user_features={"age": 4}))
    moved = inputs.to("cpu")
    assert moved.step_seed == inputs.step_seed and moved.negative_ids is inputs.negative_ids
    on_meta = inputs.to("meta")
    assert on_meta.negative_ids is not None and on_meta.negative_ids.is_meta
    assert on_meta.negative_logq is not None and on_meta.negative_logq.is_meta
    assert on_meta.batch.item_ids.is_meta and on_meta.batch.user_features["age"].is_meta


def test_flops_include_scoring() -> None:
    model = build(OBJECTIVES[0]).model.flops_per_token(10)
    scored = {0: 1 + 6, 3: 1 + 6 + 512, 4: NUM_ITEMS}
    for at, candidates in scored.items():
        flops = build(OBJECTIVES[at]).flops_per_token(10)
        assert flops - model == 2 * WIDTH * candidates
