"""SASRec (arXiv 1808.09781), the honest baseline: same inputs, losses and tuning as the others.

Changes to the paper that tuned reproductions share: standard pre-norm (queries, keys and values all
from the normalised input), no dropout on attention weights, and, by default, cosine scores.

Shape legend: T total tokens, D width.
"""

from torch import Tensor, nn

from configs.models import SASRecConfig
from models.base import SequenceModel, TableSpec
from models.batch import JaggedBatch
from models.layers.norms import l2_normalize
from models.layers.sequence_input import SequenceInput, check_lengths
from models.layers.transformer_block import TransformerBlock, transformer_block_flops
from models.ops.dropout import token_keys

_DROPOUT_SITES = 3  # of a TransformerBlock


class SASRec(SequenceModel):
    """Causal transformer over item and position."""

    def __init__(self, config: SASRecConfig, specs: tuple[TableSpec, ...], max_length: int) -> None:
        """`max_length` events are kept of a user."""
        super().__init__()
        self.config = config
        self.specs = specs
        self.max_positions = max_length
        self.sequence_input = SequenceInput(specs, max_length, config.dropout, salt=0)
        self.blocks = nn.ModuleList(
            TransformerBlock(config, salt=1 + layer * _DROPOUT_SITES)
            for layer in range(config.num_layers)
        )
        self.final_norm = nn.LayerNorm(config.width)

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
        query = self.final_norm(x)
        return l2_normalize(query) if self.config.normalize else query.float()

    def item_keys(self, item_embeddings: Tensor) -> Tensor:
        return l2_normalize(item_embeddings) if self.config.normalize else item_embeddings.float()

    def flops_per_token(self, mean_length: float) -> float:
        return len(self.blocks) * transformer_block_flops(self.config, mean_length)
