"""A small sequence model with its loss, a global batch, and the plain-PyTorch way to train them."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.data import DataConfig, ParquetSource
from configs.models import SASRecConfig
from configs.recipe import Recipe
from configs.sharding import Placement, ShardingConfig, SparseOptimizerConfig
from configs.training import OptimizerConfig, TrainingConfig
from models.base import SequenceModel, TableSpec
from models.batch import JaggedBatch
from sharding.loss_module import LossOutput
from sharding.parallelize import ParallelModel, parallelize
from sharding.process_group import current_context
from tests.sharding.reference import ReferenceTable

NUM_ITEMS, NUM_AGES, WIDTH, NEGATIVES = 40, 5, 10, 3


def toy_specs(width: int = WIDTH) -> tuple[TableSpec, ...]:
    """Tables of the toy model."""
    return (
        TableSpec("item", NUM_ITEMS + 1, width, 0.5),
        TableSpec("user_age", NUM_AGES + 1, width, 0.5),
    )


SPECS = toy_specs()


class ToyModel(SequenceModel):
    """A gated linear layer over the item's row and the user's."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.width = width
        self.inner = nn.Linear(width, 7)
        self.norm = nn.LayerNorm(7)
        self.outer = nn.Linear(7, width, bias=False)

    def table_specs(self) -> tuple[TableSpec, ...]:
        return toy_specs(self.width)

    def forward(self, batch: JaggedBatch, embeddings: dict[str, Tensor], step_seed: int) -> Tensor:
        users = torch.repeat_interleave(embeddings["user_age"], batch.lengths, dim=0)
        hidden = self.norm(torch.tanh(self.inner(embeddings["item"] + users)))
        if self.training:
            hidden = hidden * 1.25  # so that a wrong mode shows
        return embeddings["item"] + self.outer(hidden)

    def item_keys(self, item_embeddings: Tensor) -> Tensor:
        return F.normalize(item_embeddings.float(), dim=-1, eps=1e-6)

    def flops_per_token(self, mean_length: float) -> float:
        return 4.0 * self.width * 7


@dataclass(frozen=True)
class ToyInputs:
    batch: JaggedBatch
    negative_ids: Tensor
    """[T, R]"""

    def to(self, device: torch.device | str) -> "ToyInputs":
        return replace(self, batch=self.batch.to(device), negative_ids=self.negative_ids.to(device))


class ToyLoss(nn.Module):
    """Sampled softmax of the next item."""

    def __init__(self, model: ToyModel, poisoned: int | None = None, poison: str = "loss") -> None:
        super().__init__()
        self.model = model
        self.poisoned = poisoned
        """A sample whose `loss`, or only whose dense `gradient`, is not finite."""
        self.poison = poison

    def required_ids(self, inputs: ToyInputs) -> dict[str, dict[str, Tensor]]:
        batch = inputs.batch
        return {
            "item": {
                "history": batch.item_ids,
                "positive": batch.target_ids,
                "negative": inputs.negative_ids,
            },
            "user_age": {"history": batch.user_features["age"]},
        }

    def weight(self, inputs: ToyInputs) -> Tensor:
        return (inputs.batch.target_ids > 0).sum().float()

    def forward(self, inputs: ToyInputs, rows: dict, index: dict) -> LossOutput:
        embeddings = {name: F.embedding(index[name]["history"], rows[name]) for name in rows}
        queries = self.model(inputs.batch, embeddings, 0).float()
        keys = self.model.item_keys(rows["item"])
        candidates = torch.cat([index["item"]["positive"][:, None], index["item"]["negative"]], 1)
        logits = (queries[:, None] * F.embedding(candidates, keys)).sum(-1)
        losses = -logits.log_softmax(1)[:, 0] * (inputs.batch.target_ids > 0)
        if self.poisoned is not None and (inputs.batch.sample_ids == self.poisoned).any():
            if self.poison == "loss":
                losses = losses / 0.0
            else:
                losses = losses + (0.0 * self.model.outer.weight.sum()).sqrt()
        hits = (logits.argmax(1) == 0).float() * (inputs.batch.target_ids > 0)
        return LossOutput(losses.sum(), {"hit": hits.sum()})


def sample(sample_id: int, step: int) -> tuple[Tensor, Tensor, int]:
    """Items, negatives [n, R] and age of a sequence; every fifth has no events."""
    generator = torch.Generator().manual_seed(1000 * step + sample_id)
    length = 0 if sample_id % 5 == 4 else 2 + sample_id % 4
    items = torch.randint(1, NUM_ITEMS + 1, (length + 1,), generator=generator)
    negatives = torch.randint(1, NUM_ITEMS + 1, (length, NEGATIVES), generator=generator)
    return items, negatives, sample_id % (NUM_AGES + 1)  # age 0 is unknown


def toy_inputs(sample_ids: list[int], step: int) -> ToyInputs:
    """A micro batch of the given sequences, perhaps of none."""
    samples = [sample(sample_id, step) for sample_id in sample_ids]
    lengths = [len(negatives) for _, negatives, _ in samples]
    inputs = [items[:-1] for items, _, _ in samples]
    targets = [items[1:].clone() for items, _, _ in samples]
    for target in targets:
        target[:1] = 0  # a position that predicts nothing
    empty = [torch.zeros(0, dtype=torch.int64)]
    tokens = torch.cat(inputs or empty)
    batch = JaggedBatch(
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        user_ids=torch.tensor(sample_ids, dtype=torch.int64) + 1,
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        item_ids=tokens,
        timestamps=torch.zeros_like(tokens),
        next_timestamps=torch.zeros_like(tokens),
        target_ids=torch.cat(targets or empty),
        user_features={"age": torch.tensor([age for _, _, age in samples], dtype=torch.int64)},
    )
    negatives = [negatives for _, negatives, _ in samples]
    none = [torch.zeros(0, NEGATIVES, dtype=torch.int64)]
    return ToyInputs(batch, torch.cat(negatives or none))


def toy_recipe(
    placement: Placement | dict[str, Placement] = "row_wise",
    zero_stage: int = 1,
    precision: str = "fp32",
    optimizer: SparseOptimizerConfig | None = None,
) -> Recipe:
    """A recipe whose sharding and training blocks matter here."""
    sparse = optimizer or SparseOptimizerConfig(lr=0.3, eps=1e-4)
    if isinstance(placement, str):
        sharding = ShardingConfig(default=placement, optimizer=sparse)
    else:
        # The recipe checks names against a model that has no user table: place by default.
        sharding = ShardingConfig.model_construct(
            **ShardingConfig(optimizer=sparse).model_dump(exclude={"placement", "optimizer"}),
            placement=placement,
            optimizer=sparse,
        )
    recipe = Recipe(
        name="toy",
        output="memory://toy",
        seed=3,
        data=DataConfig(source=ParquetSource(url="memory://toy")),
        model=SASRecConfig(width=WIDTH),
        training=TrainingConfig(zero_stage=zero_stage, precision=precision),  # type: ignore[arg-type]
    )
    return recipe.model_copy(update={"sharding": sharding})


def toy_policy(
    recipe: Recipe,
    adam: OptimizerConfig,
    poisoned: int | None = None,
    poison: str = "loss",
    total_steps: int = 3,
    width: int = WIDTH,
) -> ParallelModel:
    """The toy model in the current process group."""
    return parallelize(
        ToyLoss(ToyModel(width), poisoned, poison),
        toy_specs(width),
        recipe,
        current_context("cpu"),
        total_steps=total_steps,
        optimizer=adam,
        sparse_lr=recipe.sharding.optimizer.lr,
    )


class ToyReference:
    """The same training on one process, without TorchRec and DeepSpeed."""

    def __init__(
        self,
        adam: OptimizerConfig,
        sparse: SparseOptimizerConfig,
        replicated: tuple[str, ...] = (),
        column_blocks: int = 1,
        width: int = WIDTH,
    ) -> None:
        self.loss = ToyLoss(ToyModel(width))
        self.tables = {
            spec.name: ReferenceTable(spec, sparse, seed=3, column_blocks=column_blocks)
            for spec in toy_specs(width)
        }
        self.dense_tables = {
            name: nn.Parameter(self.tables[name].weight.clone()) for name in replicated
        }
        self.config = adam
        self.parameters = [*self.loss.parameters(), *self.dense_tables.values()]
        self.adam = torch.optim.AdamW(
            self.parameters,
            lr=adam.lr,
            betas=adam.betas,
            eps=adam.eps,
            weight_decay=adam.weight_decay,
        )

    def table(self, name: str) -> Tensor:
        """Current weights of a table."""
        held = self.dense_tables.get(name)
        return self.tables[name].weight if held is None else held.detach()

    def step(self, sample_ids: list[int], step: int, sparse_lr: float) -> float:
        """One update from the whole global batch; the loss."""
        inputs = toy_inputs(sample_ids, step)
        leaves = {
            name: self.dense_tables.get(name, table.weight.clone().requires_grad_())
            for name, table in self.tables.items()
        }
        self.adam.zero_grad()
        output = self.loss(inputs, leaves, self.loss.required_ids(inputs))
        loss = output.loss_sum / self.loss.weight(inputs)
        loss.backward()
        for leaf in leaves.values():
            assert leaf.grad is not None
            leaf.grad[0] = 0.0
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for name, table in self.tables.items():
            if name not in self.dense_tables:
                wanted = self.loss.required_ids(inputs)[name].values()
                ids = torch.cat([values.reshape(-1) for values in wanted]).unique()
                table.update(ids, leaves[name].grad[ids], sparse_lr)  # type: ignore[index]
        self.adam.step()
        return float(loss.detach())
