"""Heads of a ranking model: a logit per task, and the P-score that towers of all tasks feed.

Shape legend: ... any leading dimensions, D width, F hidden width, K tasks, W width of a tower.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.swish_mlp import SwishLayerNorm

TOWERS_PER_HEAD = 8
"""A tower is the hidden width divided by this."""


class TaskHead(nn.Module):
    """Linear → SwishLN → one logit per task (algorithms reference §2)."""

    def __init__(self, width: int, hidden: int, num_tasks: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(width, hidden), SwishLayerNorm(hidden))
        self.tasks = nn.Linear(hidden, num_tasks)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., K]."""
        logits: Tensor = self.tasks(self.hidden(x))
        return logits


class PScoreHead(nn.Module):
    """A tower and a logit per task; what all towers found and the shared layer give one score.

    P-score of OneRec (arXiv 2506.13695, section 2.4).
    """

    def __init__(self, width: int, hidden: int, num_tasks: int) -> None:
        super().__init__()
        tower = max(1, hidden // TOWERS_PER_HEAD)
        self.num_tasks = num_tasks
        self.hidden = nn.Sequential(nn.Linear(width, hidden), SwishLayerNorm(hidden))
        self.towers = nn.Linear(hidden, num_tasks * tower)
        self.task_weight = nn.Parameter(torch.empty(num_tasks, tower))
        self.task_bias = nn.Parameter(torch.zeros(num_tasks))
        self.joined = nn.Sequential(
            nn.Linear(num_tasks * tower + hidden, hidden), SwishLayerNorm(hidden)
        )
        self.score = nn.Linear(hidden, 1)
        nn.init.xavier_uniform_(self.task_weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., K + 1], the P-score's logit last."""
        shared = self.hidden(x)
        towers = F.silu(self.towers(shared))
        found = towers.unflatten(-1, (self.num_tasks, -1))
        logits = (found * self.task_weight).sum(-1) + self.task_bias
        score = self.score(self.joined(torch.cat([towers, shared], dim=-1)))
        return torch.cat([logits, score], dim=-1)
