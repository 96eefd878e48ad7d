"""Mixture of experts with loss-free balancing (arXiv 2408.15664; OneRec 2506.13695, section 2.3).

Shape legend: n tokens, D width, E routed experts, F width of an expert, k experts per token.
"""

from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.decoders import ExpertsConfig
from models.layers.feedforward import GatedFeedForward, gated, grouped_matmul
from models.ops.jagged import take_distinct


class Experts(nn.Module):
    """Σ over the k best routed experts of gate · FFN_e(x), plus the shared experts.

    No token is dropped. What is best is decided by score + `balance`; the gate is made of scores
    alone, so that balancing moves tokens and never values.
    """

    balance: Tensor
    """[E] float32, part of the checkpoint: higher where an expert got too few tokens."""
    load: Tensor
    """[E] int64, tokens of each expert in training forwards since the last `update_balance`."""

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.width, self.config = width, config
        experts, inner = config.num_experts, config.expert_width
        self.router = nn.Parameter(torch.empty(experts, width))
        self.gate_up = nn.Parameter(torch.empty(experts, width, 2 * inner))
        self.down = nn.Parameter(torch.empty(experts, inner, width))
        for parameter, fan_in in ((self.router, width), (self.gate_up, width), (self.down, inner)):
            nn.init.normal_(parameter, std=fan_in**-0.5)
        # Experts that every token passes add up to one wide one.
        self.shared = (
            GatedFeedForward(width, config.num_shared * inner) if config.num_shared else None
        )
        self.register_buffer("balance", torch.zeros(experts))
        counts = torch.zeros(experts, dtype=torch.int64)
        self.register_buffer("load", counts, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        tokens = x.flatten(0, -2)
        chosen, gates = self.route(tokens)
        order, ends = sort_by_expert(chosen, self.config.num_experts)
        if self.training:
            self.load += ends.diff(prepend=ends.new_zeros(1))
        # Copies for each choice, permuted there and back: gathers alone, so that sums have a fixed
        # order in the backward too.
        copies = tokens.unsqueeze(1).expand(-1, self.config.top_k, -1).flatten(0, 1)
        hidden = gated(grouped_matmul(take_distinct(copies, order), self.gate_up, ends))
        outputs = grouped_matmul(hidden, self.down, ends)
        outputs = take_distinct(outputs, order.argsort()).unflatten(0, chosen.shape)
        mixed = (outputs * gates.unsqueeze(-1).to(outputs)).sum(1).view(x.shape)
        return mixed if self.shared is None else mixed + self.shared(x)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [n, k] int64 of each token [n, D] and their gates [n, k] float32."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.router.float())
        match self.config.gate:
            case "softmax":
                scores = logits.softmax(-1)
            case "sigmoid":
                scores = logits.sigmoid()
            case _:
                assert_never(self.config.gate)
        chosen = (scores.detach() + self.balance).topk(self.config.top_k, dim=-1).indices
        gates = scores.gather(-1, chosen)
        if self.config.gate == "sigmoid":
            gates = gates / gates.sum(-1, keepdim=True).clamp(min=1e-20)
        return chosen, gates

    def update_balance(self, global_load: Tensor) -> None:
        """Move the bias towards experts that got too few tokens, and count anew.

        `global_load` [E], `load` summed over all ranks; all zeros change nothing.
        """
        load = global_load.double()
        self.balance += self.config.bias_rate * (load.mean() - load).sign().to(self.balance)
        self.load.zero_()

    def flops_per_token(self) -> float:
        """Forward FLOPs, multiply-adds counted as two."""
        config = self.config
        expert = 3 * self.width * config.expert_width
        shared = 0.0 if self.shared is None else self.shared.flops_per_token()
        return 2.0 * (self.width * config.num_experts + config.top_k * expert) + shared


def feed_forward(width: int, inner: int, experts: ExpertsConfig | None) -> nn.Module:
    """A dense layer of this inner width, or experts where they are configured."""
    return GatedFeedForward(width, inner) if experts is None else Experts(width, experts)


def sort_by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order in which (token, choice) pairs lie side by side per expert.

    Args:
        chosen: [n, k] int64 experts.
        num_experts: E.

    Returns:
        [n·k] int64 positions in the flattened `chosen`, and [E] int32 ends of each expert's pairs.
    """
    sorted_experts, order = chosen.flatten().sort(stable=True)
    experts = torch.arange(num_experts, device=chosen.device)
    return order, torch.searchsorted(sorted_experts, experts, right=True, out_int32=True)


def expert_load(module: nn.Module) -> Tensor | None:
    """Loads of all expert layers of equal E inside `module`: [layers, E]; None without any."""
    layers = _expert_layers(module)
    return torch.stack([layer.load for layer in layers]) if layers else None


def update_balance(module: nn.Module, global_load: Tensor) -> None:
    """`Experts.update_balance` of each layer that `expert_load` read; [layers, E]."""
    for layer, load in zip(_expert_layers(module), global_load, strict=True):
        layer.update_balance(load)


def _expert_layers(module: nn.Module) -> list[Experts]:
    return [layer for layer in module.modules() if isinstance(layer, Experts)]
