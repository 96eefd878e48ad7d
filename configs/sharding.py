"""Where each embedding table lives and how it is updated."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from configs.base import Config

Placement = Literal["auto", "row_wise", "table_wise", "column_wise", "replicated"]


class SparseOptimizerConfig(Config):
    """The fused optimizer of sharded tables; one update a step, inside the tables' backward."""

    kind: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    lr: PositiveFloat = 0.02
    eps: PositiveFloat = 1e-8
    clip_norm: PositiveFloat | None = None
    """Largest norm of the looked-up rows' gradient over all ranks; a row that several ranks looked
    up counts once for each of them."""


class ShardingConfig(Config):
    """Plan of all tables; a table that `placement` does not name uses `default`.

    `replicated` puts a table in the dense half, under AdamW, for some million rows at most. Under
    `column_wise`, rowwise_adagrad keeps one accumulator per column block, so that its update
    depends on the number of ranks; `auto` never chooses it.
    """

    default: Placement = "auto"
    placement: dict[str, Placement] = Field(default_factory=dict)
    optimizer: SparseOptimizerConfig = SparseOptimizerConfig()
    max_replicated_rows: PositiveInt = 5_000_000
    hbm_gb: PositiveFloat | None = None
    """Device memory a rank may use for tables, for the planner; default: what the machine has."""

    def check_for_tables(self, tables: tuple[str, ...], kind: str) -> None:
        """Refuse what is said of tables to a model (of this kind) that has none to apply it to.

        Raises:
            ValueError: names what to remove.
        """
        # What says where tables would go, and how sharded ones learn, may stand beside tables that
        # are all replicated: a base recipe's, while one tries another placement.
        for name in () if tables else self.chosen("optimizer", "max_replicated_rows", "hbm_gb"):
            raise ValueError(
                f"sharding.{name} is of embedding tables; model.kind={kind!r} has none: remove it"
            )
