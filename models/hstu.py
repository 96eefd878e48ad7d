"""HSTU retrieval (arXiv 2402.17152): who comes next, from a user's items and their times.

Shape legend: T total tokens, D width, N attention divisor.
"""

from torch import Tensor, nn

from configs.models import HSTUConfig
from models.base import SequenceModel, TableSpec
from models.batch import JaggedBatch
from models.layers.hstu_block import HSTUBlock, hstu_block_flops
from models.layers.norms import l2_normalize
from models.layers.sequence_input import SequenceInput, check_lengths
from models.ops.dropout import token_keys


class HSTU(SequenceModel):
    """Stack of HSTU layers whose queries and keys are compared by cosine."""

    def __init__(self, config: HSTUConfig, specs: tuple[TableSpec, ...], max_length: int) -> None:
        """`max_length` events are kept of a user; N = max_length + attention_slack."""
        super().__init__()
        self.config = config
        self.specs = specs
        self.max_positions = max_length + config.attention_slack
        self.sequence_input = SequenceInput(specs, self.max_positions, config.dropout, salt=0)
        self.blocks = nn.ModuleList(
            HSTUBlock(config, self.max_positions, salt=1 + layer)
            for layer in range(config.num_layers)
        )

    def table_specs(self) -> tuple[TableSpec, ...]:
        return self.specs

    def forward(self, batch: JaggedBatch, embeddings: dict[str, Tensor], step_seed: int) -> Tensor:
        check_lengths(batch, self.max_positions)
        dropout_keys = None
        if self.training:
            dropout_keys = token_keys(step_seed, 0, batch.sample_ids, batch.offsets)
        x = self.sequence_input(batch, embeddings, dropout_keys)
        for block in self.blocks:
            x = block(x, batch, dropout_keys)
        return l2_normalize(x)

    def item_keys(self, item_embeddings: Tensor) -> Tensor:
        return l2_normalize(item_embeddings)

    def flops_per_token(self, mean_length: float) -> float:
        return len(self.blocks) * hstu_block_flops(self.config, mean_length)
