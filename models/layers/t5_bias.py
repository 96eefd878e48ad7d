"""T5's relative position bias (arXiv 1910.10683, section 2.1).

Shape legend: H heads, R buckets, S tokens.
"""

import math

import torch
from torch import Tensor, nn


class RelativeBias(nn.Module):
    """A learned number per head and bucket of the distance between key and query.

    Small distances have a bucket each; larger ones share buckets whose width grows
    logarithmically up to `max_distance`, beyond which all share the last.
    """

    def __init__(
        self, num_heads: int, num_buckets: int, max_distance: int, *, bidirectional: bool
    ) -> None:
        """`bidirectional` gives half of the buckets to keys after the query."""
        super().__init__()
        assert num_buckets >= 4 and num_buckets % 2 == 0 and max_distance > num_buckets // 2
        self.bidirectional = bidirectional
        self.buckets_to_heads = nn.Embedding(num_buckets, num_heads)
        nn.init.normal_(self.buckets_to_heads.weight, std=0.02)
        count = num_buckets // 2 if bidirectional else num_buckets
        # Integer thresholds make buckets exact; a float logarithm differs between devices.
        shared = torch.tensor(_thresholds(count - count // 2, count // 2, max_distance))
        self.register_buffer("thresholds", shared, persistent=False)
        self.thresholds: Tensor

    def forward(self, size: int) -> Tensor:
        """[H, S, S]: entry (h, i, j) is added to the logit of query i and key j."""
        places = torch.arange(size, device=self.buckets_to_heads.weight.device)
        buckets = self.buckets(places[None, :] - places[:, None])
        bias: Tensor = self.buckets_to_heads(buckets)
        return bias.permute(2, 0, 1)

    def distances(self, size: int) -> Tensor:
        """[H, 2S - 1]: entry j - i + S - 1 is added to the logit of query i and key j."""
        places = torch.arange(1 - size, size, device=self.buckets_to_heads.weight.device)
        bias: Tensor = self.buckets_to_heads(self.buckets(places))
        return bias.t()

    def buckets(self, relative: Tensor) -> Tensor:
        """Bucket of each key place − query place, [...] int64; of a later key 0 if causal."""
        count, offset = self.buckets_to_heads.num_embeddings, torch.zeros_like(relative)
        if self.bidirectional:
            count //= 2
            offset = (relative > 0) * count
            distance = relative.abs()
        else:
            distance = (-relative).clamp(min=0)
        exact = count // 2
        shared = exact + torch.bucketize(distance, self.thresholds, right=True)
        return offset + torch.where(distance < exact, distance, shared)


def _thresholds(count: int, exact: int, max_distance: int) -> list[int]:
    """Smallest distance of each shared bucket but the first: exact·(max/exact)^(k/count)."""
    growth = math.log(max_distance / exact) / count
    return [math.ceil(exact * math.exp(growth * k) - 1e-9) for k in range(1, count)]
