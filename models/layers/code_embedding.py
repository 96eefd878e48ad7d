"""What code decoders read: embeddings of codes, and of everything else that an event carries.

Shape legend: B sequences, T total events, L code levels, K_l codes of level l, D width.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.decoders import FeatureInputs
from models.base import CatalogueSizes, TableSpec
from models.batch import JaggedBatch
from models.ops.jagged import segment_ids

TIME_BUCKETS = 41
"""0 for no time at all, then one per power of two seconds; the last starts at 2^39 s."""
DWELL_BUCKETS = 21
"""0 for unknown, 1 below 2^-4 s, then one per power of two seconds; the last starts at 2^14 s."""
_SHORTEST_DWELL = -4
INIT_STD = 0.02


class CodeEmbedding(nn.Module):
    """One vector per code, the levels one after another: a dense parameter [Σ K_l, D].

    Codes are the model's own vocabulary and few (thousands), so they are no sharded table.
    """

    def __init__(self, codebook_sizes: tuple[int, ...], width: int, init_std: float) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(sum(codebook_sizes), width))
        nn.init.normal_(self.rows, std=init_std)
        starts = torch.tensor([0, *accumulate(codebook_sizes[:-1])])
        self.register_buffer("starts", starts, persistent=False)
        self.starts: Tensor

    def forward(self, codes: Tensor, first: int = 0, *, summed: bool = False) -> Tensor:
        """Codes of l levels from level `first` on, [..., l] int64 → [..., l, D].

        `summed` takes [n, l] → [n, D], the sum of each row's. (Here and not in a method of its own:
        ZeRO 3 gathers for the backward what a module's own forward reads.)
        """
        places = codes + self.starts[first : first + codes.shape[-1]]
        if summed:
            return F.embedding_bag(places, self.rows, mode="sum")
        return F.embedding(places, self.rows)

    def level(self, level: int, codes: Tensor) -> Tensor:
        """Codes of one level, [...] int64 → [..., D]."""
        rows: Tensor = self(codes[..., None], level)
        return rows.squeeze(-2)

    def items(self, batch: JaggedBatch) -> Tensor:
        """Codes of each event's item: [T, L, D]; item 0 has none, its rows are 0.

        Raises ValueError where the batch carries no codes.
        """
        rows: Tensor = self(_codes_of(batch))
        return rows * (batch.item_ids > 0)[:, None, None]

    def item_sums(self, batch: JaggedBatch) -> Tensor:
        """Sum of the rows of each event's codes: [T, D]; 0 for item 0.

        What `items(batch).sum(1)` gives, without its [T, L, D]: histories of windows repeat their
        events, so T is the largest number of a step.
        """
        sums: Tensor = self(_codes_of(batch), summed=True)
        return sums * (batch.item_ids > 0)[:, None]


class EventFeatures(nn.Module):
    """Sum of what events carry besides codes, as `configs.decoders.FeatureInputs` selects it."""

    def __init__(
        self,
        config: FeatureInputs,
        specs: tuple[TableSpec, ...],
        sizes: CatalogueSizes,
        width: int,
    ) -> None:
        """Raises ValueError where the model wants actions or dwell times the data set lacks."""
        super().__init__()
        self.user_tables = tuple(s.name for s in specs if s.name.startswith("user_"))
        self.event_tables = tuple(s.name for s in specs if not s.name.startswith("user_"))
        if config.actions and not sizes.num_actions:
            raise ValueError(
                "model.actions is on, but the prepared data set has no actions; map a column to "
                "`action` in data.source and prepare again, or set model.actions to false"
            )
        if config.dwell_times and not sizes.has_dwell_times:
            raise ValueError(
                "model.dwell_times is on, but the prepared data set has no dwell times; map a "
                "column to `dwell` in data.source and prepare again, or set model.dwell_times to "
                "false"
            )
        self.actions = _rows(sizes.num_actions + 1, width) if config.actions else None
        self.times = _rows(TIME_BUCKETS, width) if config.times else None
        self.dwell_times = _rows(DWELL_BUCKETS, width) if config.dwell_times else None

    def users(self, batch: JaggedBatch, embeddings: dict[str, Tensor]) -> Tensor | None:
        """Sum of the rows of the user's features: [B, D]; None where the model has none."""
        return _total([embeddings[name] for name in self.user_tables])

    def events(
        self, batch: JaggedBatch, embeddings: dict[str, Tensor], request_times: Tensor
    ) -> Tensor | None:
        """Sum over item row, side features, action, dwell, age: [T, D]; None where there is none.

        `request_times` [T] int64 seconds: when the item was asked for that each event helps to
        predict.
        """
        parts = [embeddings[name] for name in self.event_tables]
        if self.actions is not None:
            if batch.action_ids is None:
                raise ValueError("model.actions is on, but the batch carries no actions")
            parts.append(self.actions(batch.action_ids))
        if self.times is not None:
            buckets = time_buckets(request_times - batch.timestamps)
            parts.append(self.times(buckets))
        if self.dwell_times is not None:
            if batch.dwell_times is None:
                raise ValueError("model.dwell_times is on, but the batch carries no dwell times")
            parts.append(self.dwell_times(dwell_buckets(batch.dwell_times)))
        return _total(parts)

    def forward(
        self, batch: JaggedBatch, embeddings: dict[str, Tensor], request_times: Tensor
    ) -> Tensor | None:
        """Features of each event and of its user: [T, D]; None where the model has none."""
        parts = [self.events(batch, embeddings, request_times)]
        users = self.users(batch, embeddings)
        if users is not None:
            parts.append(F.embedding(segment_ids(batch.offsets, batch.num_tokens), users))
        return _total([part for part in parts if part is not None])


def last_request_times(batch: JaggedBatch) -> Tensor:
    """Time of the request after each sequence's last event, for each of its events: [T] int64."""
    ends = torch.repeat_interleave(batch.offsets[1:], batch.lengths, output_size=batch.num_tokens)
    return batch.next_timestamps[ends - 1]


def time_buckets(elapsed: Tensor) -> Tensor:
    """⌊log2⌋ + 1 of int64 seconds, exactly; 0 below a second, at most 40."""
    powers = 2 ** torch.arange(TIME_BUCKETS - 1, device=elapsed.device)
    return torch.bucketize(elapsed, powers, right=True)


def dwell_buckets(seconds: Tensor) -> Tensor:
    """1 + ⌊log2⌋ from 2^-4 float32 seconds on, exactly: 1 … 20; 0 where NaN."""
    exponents = torch.arange(DWELL_BUCKETS - 2, device=seconds.device) + _SHORTEST_DWELL
    buckets = 1 + torch.bucketize(seconds, torch.exp2(exponents.float()), right=True)
    return buckets.masked_fill(seconds.isnan(), 0)


def _codes_of(batch: JaggedBatch) -> Tensor:
    if batch.item_codes is None:
        raise ValueError(
            "the model reads semantic ids, which the batch does not carry; "
            "run `tandem tokenize` and train with its table"
        )
    return batch.item_codes


def _rows(count: int, width: int) -> nn.Embedding:
    """Rows as a module: ZeRO 3 gathers for the backward what a module's own forward reads."""
    rows = nn.Embedding(count, width)
    nn.init.normal_(rows.weight, std=INIT_STD)
    return rows


def _total(parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
