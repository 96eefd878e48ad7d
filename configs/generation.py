"""How semantic ids are generated. An option that a strategy does not have is an unknown key."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from configs.base import Config


class BeamConfig(Config):
    """The most probable ids, by beam search. Deterministic: no keys, no temperature."""

    kind: Literal["beam"] = "beam"
    beams: PositiveInt = 50
    """Ids kept at every level, and returned."""


class SearchConfig(BeamConfig):
    """How a recipe's evaluation and recommendation search."""

    next_item_alone: bool = False
    """Of a model that writes sessions (model.session_items > 1), rank the next item by itself
    instead of offering the items of the most probable sessions."""


class GumbelTopKConfig(Config):
    """Ids sampled without replacement, by stochastic beam search (arXiv 1903.06059)."""

    kind: Literal["gumbel_top_k"] = "gumbel_top_k"
    samples: PositiveInt = 16
    temperature: PositiveFloat = 1.0
    """Divides the logits of every level; below 1 sharpens."""


class AncestralConfig(Config):
    """Independent samples, code by code; an id may be drawn more than once."""

    kind: Literal["ancestral"] = "ancestral"
    samples: PositiveInt = 16
    temperature: PositiveFloat = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw among the fewest legal codes that hold this much probability (after temperature)."""


GenerationConfig = Annotated[
    BeamConfig | GumbelTopKConfig | AncestralConfig, Field(discriminator="kind")
]
