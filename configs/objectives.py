"""Training objectives of pretraining."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from configs.base import Config
from configs.data import LabelName


class SampledSoftmaxConfig(Config):
    """Cross entropy of the next item against sampled negatives."""

    kind: Literal["sampled_softmax"] = "sampled_softmax"
    temperature: PositiveFloat = 0.05
    negatives: Literal["uniform", "in_batch", "mixed"] = "uniform"
    num_negatives: PositiveInt = 128
    """Uniform negatives per group that shares them (uniform and mixed)."""
    shared: Literal["batch", "sequence", "position"] = "position"
    """Who shares one uniform draw: every position of the global batch, of a sequence, or nobody.
    In-batch negatives are shared by all positions of the global batch."""
    in_batch_negatives: PositiveInt = 512
    """Positives of the global batch taken as negatives (in_batch and mixed)."""
    logq_correction: bool = False
    """Subtract log of the expected count of each negative under its sampler."""

    @model_validator(mode="after")
    def _in_batch_is_shared(self) -> "SampledSoftmaxConfig":
        if self.negatives == "in_batch" and self.shared != "batch":
            raise ValueError(
                f"negatives='in_batch' are the positives of the whole batch, which all positions "
                f"share: shared={self.shared!r} cannot be; add objective.shared=batch, or take "
                "negatives='mixed', whose uniform part may be drawn per sequence or position"
            )
        return self

    @model_validator(mode="after")
    def _negatives_have_options(self) -> "SampledSoftmaxConfig":
        others = {"uniform": "in_batch_negatives", "in_batch": "num_negatives"}
        if self.negatives in others and (idle := self.chosen(others[self.negatives])):
            raise ValueError(
                f"negatives={self.negatives!r} draws none of {idle[0]}={getattr(self, idle[0])}: "
                "leave it out, or take negatives='mixed'"
            )
        return self


class FullSoftmaxConfig(Config):
    """Cross entropy over the whole catalogue; for catalogues that fit one rank's memory."""

    kind: Literal["full_softmax"] = "full_softmax"
    temperature: PositiveFloat = 0.05
    chunk_tokens: PositiveInt = 1024
    """Positions scored at once; bounds memory at chunk × catalogue."""
    max_catalogue: PositiveInt = 200_000


ItemObjective = SampledSoftmaxConfig | FullSoftmaxConfig
"""Objectives of models that score items."""


class NextCodeConfig(Config):
    """Cross entropy of the next item's codes, each given those before it; mean over levels."""

    kind: Literal["next_code"] = "next_code"
    normalization: Literal["codebook", "catalogue"] = "catalogue"
    """What a code competes with: the codes that continue an item of the catalogue, as in generation
    (training, search and evaluation share one definition), or every code of its level."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread evenly over the codes that compete."""
    windows_per_user: PositiveInt | None = None
    """Windows that a model supervised at its last position cuts from a user's sequence in a step
    (sliding-window augmentation), drawn anew in each epoch; null takes every one."""


class LabelTask(Config):
    """Whether an event has a label: binary cross entropy."""

    kind: Literal["label"] = "label"
    label: LabelName
    weight: PositiveFloat = 1.0

    @property
    def name(self) -> str:
        """What its numbers are called."""
        return self.label


class DwellTask(Config):
    """How long a user stays: squared error of log(1 + seconds) where the log says it."""

    kind: Literal["dwell"] = "dwell"
    weight: PositiveFloat = 1.0

    @property
    def name(self) -> str:
        """What its numbers are called."""
        return "dwell"


class PScoreConfig(Config):
    """One score from the towers of all tasks, trained on all labels (OneRec, arXiv 2506.13695)."""

    weights: dict[LabelName, float] = Field(min_length=1)
    """Label → its weight in the score; below 0 where the label is negative feedback."""
    loss_weight: PositiveFloat = 1.0
    """Of the score's cross entropy beside those of the tasks."""

    @model_validator(mode="after")
    def _weights_count(self) -> "PScoreConfig":
        idle = [name for name, weight in self.weights.items() if weight == 0]
        if idle:
            raise ValueError(f"weights of {idle} are 0: leave these labels out")
        return self


class MultiTaskConfig(Config):
    """What users do with what they are shown (algorithms §2): a loss per task, means added up."""

    kind: Literal["multi_task"] = "multi_task"
    tasks: tuple[Annotated[LabelTask | DwellTask, Field(discriminator="kind")], ...] = Field(
        min_length=1
    )
    p_score: PScoreConfig | None = None
    candidates: PositiveInt = 4
    """Consecutive events that share a request, and so its history; 1 gives each event all that came
    before it, more cost less."""
    requests_per_user: PositiveInt | None = None
    """Requests cut from a user's sequence in a step, drawn anew in each; null takes every one."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's outputs in order."""
        return (*(task.name for task in self.tasks), *(("p_score",) if self.p_score else ()))

    @model_validator(mode="after")
    def _names_differ(self) -> "MultiTaskConfig":
        names = [task.name for task in self.tasks]
        taken = {*names} & {"p_score"} | {
            task.label for task in self.tasks if task.kind == "label"
        } & {"dwell"}
        if len(set(names)) < len(names) or taken:
            raise ValueError(
                f"tasks {names} need names of their own, other than p_score (and dwell for labels)"
            )
        return self


Objective = Annotated[
    SampledSoftmaxConfig | FullSoftmaxConfig | NextCodeConfig | MultiTaskConfig,
    Field(discriminator="kind"),
]
