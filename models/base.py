"""What every model is: a dense module over looked-up embeddings, and described tables.

A `SequenceModel` scores items by query and key; a `CodeDecoder` writes an item's semantic id; a
`RankingModel` says of given candidates what the user would do with them.

Shape legend: B sequences, T total tokens, D width, V catalogue rows; N decode requests, W beams,
L code levels, K_l codes of level l.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
    codebook_sizes: tuple[int, ...] = ()
    """Codes of each level of the items' semantic ids; empty where there are none."""
    num_actions: int = 0
    """Kinds of action, without the unknown 0."""
    action_names: tuple[str, ...] = ()
    """What they are called, by id; id 1 comes first."""
    has_dwell_times: bool = False
    """Whether events say how long the user stayed."""
    labels: tuple[str, ...] = ()
    """Names of the bits of the events' labels, lowest first."""


class TableModel(nn.Module, ABC):
    """Dense half of a model. Imports no distributed code and runs anywhere."""

    @abstractmethod
    def table_specs(self) -> tuple[TableSpec, ...]:
        """Tables this model looks up; `item` comes first where it is one of them."""

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
    def flops_per_token(self, mean_length: float) -> float:
        """Forward FLOPs of the dense half per token, multiply-adds counted as two; backward is 2×.

        `mean_length` is the sequence length that a mean token sees, Σ n² / Σ n over sequences of n
        tokens (equal to n where all lengths are alike); with it attention is counted exactly.
        """

    def expert_load(self) -> Tensor | None:
        """Tokens of each expert, [layers, E] int64, in training forwards since `update_balance`.

        None where the model has no experts to balance.
        """
        return None

    def update_balance(self, global_load: Tensor) -> None:
        """Balance the experts after a step, given `expert_load` summed over all ranks.

        Every rank passes the same sum, so that its buffers stay alike.
        """
        raise NotImplementedError(f"{type(self).__name__} has no experts")


class SequenceModel(TableModel):
    """Scores any item of the catalogue at any position; its first table is `item`."""

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


class RankingModel(TableModel):
    """Looks at candidates and history together; its first table is `item`."""

    @abstractmethod
    def forward(
        self,
        batch: JaggedBatch,
        embeddings: dict[str, Tensor],
        candidates: Tensor,
        longest: int,
        step_seed: int,
    ) -> Tensor:
        """Logits of each candidate.

        Args:
            batch: histories with `labels`, some maybe empty; the request is made at
                `next_timestamps` of a history's last event.
            embeddings: as in `SequenceModel.forward`.
            candidates: [B, G, D] item rows; where there is no candidate, anything.
            longest: length that histories are padded to, at least 1.
            step_seed: as in `SequenceModel.forward`.

        Returns:
            [B, G, K] float32, in the order of the objective's tasks.
        """


class CodeDecoder(TableModel):
    """A generative recommender: reads histories, writes the next item's codes one by one.

    A *request* is one item to be written. A context is what the model made of the requests'
    histories, prefilled once and shared by all beams; only the model itself looks inside.
    """

    codebook_sizes: tuple[int, ...]
    """K_1…K_L of what is written."""
    supervision: ClassVar[Literal["every_position", "last_position"]]
    """Whether one pass over a sequence yields a request at every token, or only at its last one,
    so that training cuts sequences into windows."""
    longest_history: int
    """Latest events that a request reads; windows carry no more."""

    @abstractmethod
    def encode(
        self,
        batch: JaggedBatch,
        embeddings: dict[str, Tensor],
        step_seed: int,
        positions: Literal["every", "last"],
    ) -> Any:
        """Context of N requests: one after each token (N = T), or after each last token (N = B).

        Args:
            batch: histories with `item_codes`; none is empty where positions is "last".
            embeddings: as in `SequenceModel.forward`.
            step_seed: seeds dropout together with batch.sample_ids; unused in eval mode.
            positions: "every" only where `supervision` allows it.
        """

    def requests_of(self, context: Any, requests: Tensor) -> Any:
        """Context of `requests` [n] alone, places in one of `positions="every"`."""
        raise NotImplementedError(f"{type(self).__name__} has no requests at every position")

    @abstractmethod
    def teacher_forced(self, context: Any, codes: Tensor) -> list[Tensor]:
        """Logits of every level given the codes before it: L tensors [N, K_l] float32.

        `codes` [N, L] int64; those of the last level are not read.
        """

    @abstractmethod
    def new_cache(self, context: Any) -> Any:
        """Empty `BeamCache` (models.generation.kv_cache) for the context's N requests."""

    @abstractmethod
    def step(self, context: Any, cache: Any, level: int, tokens: Tensor | None) -> Tensor:
        """Logits [N, W, K_level] float32 of the next code of each beam.

        Args:
            context: from `encode`.
            cache: holds what the levels before left; this call appends.
            level: 0 … L-1.
            tokens: [N, W] int64 codes that the beams chose at level - 1; None at level 0 (W = 1).
        """
