"""First layer of every sequence model: looked-up rows plus position, with dropout.

Shape legend: B sequences, T total tokens, N positions, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import TableSpec
from models.batch import JaggedBatch
from models.ops.dropout import keyed_dropout
from models.ops.jagged import positions_in_sequence, segment_ids


class SequenceInput(nn.Module):
    """dropout((item + user features + side features)·√D + P[t]), t = 0 at the first kept token.

    Without features this is the input of arXiv 2402.17152's retrieval model.
    """

    def __init__(
        self, specs: tuple[TableSpec, ...], max_length: int, dropout: float, salt: int
    ) -> None:
        super().__init__()
        self.width = specs[0].width
        self.user_tables = tuple(s.name for s in specs if s.name.startswith("user_"))
        self.token_tables = tuple(s.name for s in specs if not s.name.startswith("user_"))
        self.dropout = dropout
        self.salt = salt
        self.positions = nn.Parameter(torch.empty(max_length, self.width))
        std = math.sqrt(1.0 / self.width)
        nn.init.trunc_normal_(self.positions, std=std, a=-2 * std, b=2 * std)

    def forward(
        self, batch: JaggedBatch, embeddings: dict[str, Tensor], dropout_keys: Tensor | None
    ) -> Tensor:
        """[T, D] in the dtype of the positions; `dropout_keys` [T] switch dropout on."""
        total = batch.num_tokens
        x = embeddings[self.token_tables[0]]
        for name in self.token_tables[1:]:
            x = x + embeddings[name]
        if self.user_tables:
            user = embeddings[self.user_tables[0]]
            for name in self.user_tables[1:]:
                user = user + embeddings[name]
            x = x + F.embedding(segment_ids(batch.offsets, total), user)
        places = positions_in_sequence(batch.offsets, total)
        x = x * math.sqrt(self.width) + F.embedding(places, self.positions)
        x = x.to(self.positions.dtype)
        return (
            x if dropout_keys is None else keyed_dropout(x, dropout_keys, self.dropout, self.salt)
        )


def check_lengths(batch: JaggedBatch, max_length: int) -> None:
    """Raise ValueError for a sequence that the positions do not reach.

    Only where lengths can be read without stalling an accelerator; there the lookup itself fails.
    """
    if batch.offsets.device.type != "cpu" or batch.num_sequences == 0:
        return
    longest = int(batch.lengths.max())
    if longest > max_length:
        raise ValueError(
            f"a sequence of {longest} events exceeds the model's {max_length} positions; "
            "lower data.loader.max_length or train a model with more"
        )
