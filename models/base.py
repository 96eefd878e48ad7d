"""What every sequence model is: a dense module over looked-up embeddings, and described tables.

Shape legend: B sequences, T total tokens, D width, V catalogue rows.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from models.batch import JaggedBatch


@dataclass(frozen=True)
class TableSpec:
    """An embedding table that a model describes and never owns. Row 0 is padding and stays zero."""

    name: str
    """`item`, `user_<feature>` or `side_<feature>`."""
    num_rows: int
    """Highest id + 1."""
    width: int
    init_std: float


@dataclass(frozen=True)
class CatalogueSizes:
    """Counts of a prepared data set that size a model's tables (from its manifest)."""

    num_items: int
    num_users: int
    user_features: dict[str, int]
    """name → number of categories, without the unknown 0."""
    side_features: dict[str, int]


class SequenceModel(nn.Module, ABC):
    """Dense half of a next-item model. Imports no distributed code and runs anywhere."""

    @abstractmethod
    def table_specs(self) -> tuple[TableSpec, ...]:
        """Tables this model looks up; the first is always `item`."""

    @abstractmethod
    def forward(self, batch: JaggedBatch, embeddings: dict[str, Tensor], step_seed: int) -> Tensor:
        """Query of each position.

        Args:
            batch: jagged sequences, T tokens.
            embeddings: table name → looked-up rows: `item` [T, D] (rows of batch.item_ids),
                `user_<f>` [B, D], `side_<f>` [T, D].
            step_seed: seeds dropout together with batch.sample_ids, so that masks depend neither
                on world size nor on micro batching. Unused in eval mode.

        Returns:
            [T, D] queries; a position's score of item e is `query · item_keys(e)`.
        """

    @abstractmethod
    def item_keys(self, item_embeddings: Tensor) -> Tensor:
        """What queries are multiplied with: [..., D] table rows → [..., D] (L2-normalised or not)."""

    @abstractmethod
    def flops_per_token(self, mean_length: float) -> float:
        """Forward FLOPs of the dense half per token, multiply-adds counted as two; backward is 2×."""
