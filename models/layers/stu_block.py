"""The STU layer of HSTU ranking (arXiv 2402.17152, section 3; algorithms reference §2).

A request is [contextual tokens | history | candidates]. Candidates see context, history and
themselves, and nobody sees a candidate, so that they run beside the rest instead of in one square:
a request with G candidates costs G rows of attention, whatever G is.

Shape legend: N requests, S context and history tokens (padded), G candidates, D width, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.models import HSTURankingConfig
from models.layers.norms import LAYER_NORM_EPS
from models.ops.dropout import keyed_dropout


class STUBlock(nn.Module):
    """Linear([u, O, u ⊙ LN(O)]) + x, O = Σ SiLU(q·k/√d_qk) v / N, [u, v, q, k] = LN(x) W + b."""

    def __init__(self, config: HSTURankingConfig, divisor: int, salt: int) -> None:
        super().__init__()
        self.num_heads, self.divisor = config.num_heads, divisor
        self.dropout, self.salt = config.dropout, salt
        self.qk_width = config.qk_width
        v_width, qk_width = (config.num_heads * w for w in (config.v_width, config.qk_width))
        self.widths = [v_width, v_width, qk_width, qk_width]
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.uvqk = nn.Linear(config.width, sum(self.widths))
        self.attended_norm = nn.LayerNorm(v_width, eps=LAYER_NORM_EPS)
        self.output = nn.Linear(3 * v_width, config.width)
        for linear in (self.uvqk, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Tensor,
        candidates: Tensor,
        visible: Tensor,
        present: Tensor,
        keys: tuple[Tensor, Tensor] | None,
        *,
        candidates_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One layer over both parts.

        Args:
            x: [N, S, D] context and history.
            candidates: [N, G, D].
            visible: [N, 1, S, S] in x's dtype, 1 where a query (third) sees a key (last).
            present: [N, 1, 1, S] likewise, 1 where a token is there.
            keys: dropout keys [N, S] and [N, G], which switch dropout on.
            candidates_only: leave `x` as it is (after the last layer nobody reads it).
        """
        u, v, q, k = self._project(x)
        own_u, own_v, own_q, own_k = self._project(candidates)
        attended = self._weights(own_q @ k.transpose(2, 3)) * present @ v
        itself = self._weights((own_q * own_k).sum(-1, keepdim=True)) * own_v
        candidate_keys = None if keys is None else keys[1]
        candidates = self._finish(candidates, own_u, attended + itself, candidate_keys)
        if candidates_only:
            return x, candidates
        attended = self._weights(q @ k.transpose(2, 3)) * visible @ v
        return self._finish(x, u, attended, None if keys is None else keys[0]), candidates

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u [N, S, H·Dv], and v, q, k [N, H, S, ...]."""
        u, v, q, k = self.uvqk(self.norm(x)).split(self.widths, dim=-1)
        v, q, k = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (v, q, k))
        return F.silu(u), v, q, k

    def _weights(self, products: Tensor) -> Tensor:
        return F.silu(products / math.sqrt(self.qk_width)) / self.divisor

    def _finish(self, x: Tensor, u: Tensor, attended: Tensor, keys: Tensor | None) -> Tensor:
        attended = attended.transpose(1, 2).flatten(2)
        joined = torch.cat([u, attended, u * self.attended_norm(attended)], dim=-1)
        if keys is not None:
            flat = keyed_dropout(joined.flatten(0, 1), keys.flatten(), self.dropout, self.salt)
            joined = flat.view(joined.shape)
        return self.output(joined) + x


def stu_block_flops(config: HSTURankingConfig, mean_length: float) -> float:
    """Forward FLOPs per token; a token attends to (mean_length + 1) / 2 tokens on average."""
    qk_width, v_width = config.num_heads * config.qk_width, config.num_heads * config.v_width
    projections = 2 * config.width * (2 * qk_width + 2 * v_width) + 6 * v_width * config.width
    return projections + 2 * (qk_width + v_width) * (mean_length + 1) / 2
