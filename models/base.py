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

    def input_ids(self, batch: JaggedBatch) -> dict[str, Tensor]:
        """Table name → ids whose rows `forward` wants for `batch`: [T], or [B] of `user_<f>`.

        Raises ValueError where the data set lacks a feature that the model looks up.
        """
        ids = {"item": batch.item_ids}
        ids |= {f"user_{name}": values for name, values in batch.user_features.items()}
        ids |= {f"side_{name}": values for name, values in batch.side_features.items()}
        names = [spec.name for spec in self.table_specs()]
        missing = [name for name in names if name not in ids]
        if missing:
            raise ValueError(
                f"the model looks up {missing}, which the data set's batches do not carry; "
                "prepare the data with these features or remove them from the model"
            )
        return {name: ids[name] for name in names}

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
            [T, D] float32 queries; a position's score of item e is `query · item_keys(e)`.
        """

    @abstractmethod
    def item_keys(self, item_embeddings: Tensor) -> Tensor:
        """What queries are multiplied with: [..., D] table rows → [..., D] float32."""

    @abstractmethod
    def flops_per_token(self, mean_length: float) -> float:
        """Forward FLOPs of the dense half per token, multiply-adds counted as two; backward is 2×.

        `mean_length` is the sequence length that a mean token sees, Σ n² / Σ n over sequences of n
        tokens (equal to n where all lengths are alike); with it attention is counted exactly.
        """
