"""Experts against a loop over tokens, balancing, and what every parameter owes ZeRO."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from configs.decoders import ExpertsConfig
from models.layers.experts import Experts, expert_load, feed_forward, update_balance
from models.layers.feedforward import GatedFeedForward, grouped_matmul

WIDTH = 6


def config(**changes: object) -> ExpertsConfig:
    fields = {"num_experts": 5, "top_k": 2, "num_shared": 2, "expert_width": 4} | changes
    return ExpertsConfig.model_validate(fields)


def build(chosen: ExpertsConfig) -> Experts:
    torch.manual_seed(0)
    layer = Experts(WIDTH, chosen).double()
    layer.balance.copy_(torch.linspace(-0.3, 0.3, chosen.num_experts))
    return layer


def silu(value: float) -> float:
    return value / (1 + math.exp(-value))


def swiglu(gate_up: Tensor, down: Tensor, row: Tensor) -> Tensor:
    """Weights as x @ W, entry by entry."""
    inner = down.shape[0]
    hidden = row @ gate_up
    mixed = [silu(float(hidden[i])) * hidden[inner + i] for i in range(inner)]
    return sum((h * down[i] for i, h in enumerate(mixed)), torch.zeros(WIDTH).double())


def by_loops(layer: Experts, row: Tensor) -> Tensor:
    chosen = layer.config
    logits = [float(weight @ row.float()) for weight in layer.router.float()]
    if chosen.gate == "softmax":
        total = sum(math.exp(logit) for logit in logits)
        scores = [math.exp(logit) / total for logit in logits]
    else:
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    biased = [score + float(b) for score, b in zip(scores, layer.balance, strict=True)]
    best = sorted(range(len(scores)), key=lambda e: -biased[e])[: chosen.top_k]
    scale = 1.0 if chosen.gate == "softmax" else sum(scores[e] for e in best)
    out = torch.zeros(WIDTH).double()
    for e in best:
        out = out + scores[e] / scale * swiglu(layer.gate_up[e], layer.down[e], row)
    if layer.shared is not None:
        for s in range(chosen.num_shared):  # each shared expert by itself
            own = slice(s * chosen.expert_width, (s + 1) * chosen.expert_width)
            gate, up = layer.shared.gate_up.weight.chunk(2)
            weights = torch.cat([gate[own], up[own]]).T
            out = out + swiglu(weights, layer.shared.down.weight[:, own].T, row)
    return out


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_shared", [0, 2])
def test_layer_equals_loops(gate: str, num_shared: int) -> None:
    layer = build(config(gate=gate, num_shared=num_shared))
    x = torch.randn(3, 4, WIDTH).double()
    with torch.no_grad():
        expected = torch.stack([by_loops(layer, row) for row in x.flatten(0, 1)]).view_as(x)
        torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_gradients_are_those_of_dense_products(gate: str) -> None:
    """Every expert on every token, weighed by a mask: no sorting, no gathering."""
    layer = build(config(gate=gate))
    x = torch.randn(9, WIDTH).double().requires_grad_()
    direction = torch.randn(9, WIDTH).double()
    parameters = [x, *layer.parameters()]
    actual = torch.autograd.grad((layer(x) * direction).sum(), parameters)
    logits = x.float() @ layer.router.float().T
    scores = logits.softmax(-1) if gate == "softmax" else logits.sigmoid()
    mask = torch.zeros(9, 5).scatter(1, (scores + layer.balance).topk(2).indices, 1.0)
    gates = scores * mask
    if gate == "sigmoid":
        gates = gates / gates.sum(1, keepdim=True)
    assert layer.shared is not None
    out = layer.shared(x)
    for e in range(5):
        hidden, up = (x @ layer.gate_up[e]).chunk(2, -1)
        out = out + gates[:, e : e + 1] * (nn.functional.silu(hidden) * up @ layer.down[e])
    expected = torch.autograd.grad((out * direction).sum(), parameters)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=6))
@settings(deadline=None, max_examples=30)
def test_grouped_product_is_a_product_per_row(counts: list[int]) -> None:
    torch.manual_seed(0)
    groups = [e for e, count in enumerate(counts) for _ in range(count)]
    x, weights = torch.randn(len(groups), 3), torch.randn(len(counts), 3, 2)
    ends = torch.tensor(counts).cumsum(0).int()
    actual = grouped_matmul(x, weights, ends)
    assert actual.shape == (len(groups), 2)
    for row, e in enumerate(groups):
        torch.testing.assert_close(actual[row], x[row] @ weights[e])


@pytest.mark.parametrize("tokens", [0, 1])
def test_every_parameter_takes_part_however_few_tokens(tokens: int) -> None:
    layer = build(config())
    layer(torch.randn(tokens, 4, WIDTH).double()[:, :1]).sum().backward()
    used = layer.load > 0
    assert int(layer.load.sum()) == 2 * tokens
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        if tokens == 0:
            assert not parameter.grad.any(), name
    assert layer.down.grad is not None
    assert torch.equal(layer.down.grad.abs().sum((1, 2)) > 0, used)


def test_balancing_evens_out_skewed_inputs() -> None:
    torch.manual_seed(3)
    layer = Experts(WIDTH, config(num_experts=8, bias_rate=3e-3, num_shared=0))
    skew = 1.5 * torch.randn(WIDTH)  # all tokens look alike, so that few experts would get them

    def shares() -> Tensor:
        layer(torch.randn(512, WIDTH) + skew)
        return layer.load / layer.load.sum()

    before = shares()
    for _ in range(500):
        layer.update_balance(layer.load)
        after = shares()
    assert before.max() > 3 / 8
    assert after.max() < 1.4 / 8
    assert after.min() > 0.6 / 8


def test_balance_moves_by_the_rate_and_counts_anew() -> None:
    layer = Experts(WIDTH, config(bias_rate=0.25))
    layer(torch.randn(7, WIDTH))
    layer.update_balance(torch.tensor([10, 0, 4, 1, 5]))  # mean 4
    assert layer.balance.tolist() == [-0.25, 0.25, 0.0, 0.25, -0.25]
    assert not layer.load.any()
    layer.update_balance(layer.load)
    assert layer.balance.tolist() == [-0.25, 0.25, 0.0, 0.25, -0.25]


def test_micro_batches_add_to_the_load_and_evaluation_does_not() -> None:
    layer, x = Experts(WIDTH, config()), torch.randn(11, WIDTH)
    layer(x)
    whole = layer.load.clone()
    layer.load.zero_()
    layer(x[:4])
    layer(x[4:])
    layer.eval()(x)
    assert torch.equal(layer.load, whole)


def test_all_layers_of_a_model_are_read_and_balanced() -> None:
    model = nn.ModuleList(feed_forward(WIDTH, 8, e) for e in (None, config(), config()))
    assert isinstance(model[0], GatedFeedForward)
    model[1](torch.randn(5, WIDTH))
    load = expert_load(model)
    assert load is not None
    assert load.sum(1).tolist() == [10, 0]
    update_balance(model, load)
    assert model[1].balance.any()
    assert not model[2].balance.any()
    assert expert_load(model[0]) is None
    assert {name for name in model.state_dict() if "balance" in name or "load" in name} == {
        "1.balance",
        "2.balance",
    }


def test_flops_count_the_products() -> None:
    layer = Experts(WIDTH, config()).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(13, WIDTH))
    assert layer.flops_per_token() * 13 == counter.get_total_flops()


def test_bfloat16_autocast_keeps_routing_exact() -> None:
    layer, x = Experts(WIDTH, config()), torch.randn(64, WIDTH)
    plain, routes = layer(x), layer.route(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
        assert torch.equal(layer.route(x)[0], routes)
    torch.testing.assert_close(mixed.float(), plain, atol=0.1, rtol=0.1)
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
