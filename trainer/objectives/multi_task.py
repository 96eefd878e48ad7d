"""Multi-task loss of a ranking model: what users did with what they were shown (algorithms §2).

Shape legend: N requests, M candidates of a request, T history tokens of all, K outputs.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.objectives import MultiTaskConfig
from models.base import RankingModel
from models.batch import JaggedBatch
from sharding.loss_module import LossOutput
from trainer.objectives.next_item import model_ids, model_rows


@dataclass(frozen=True)
class RankingInputs:
    """A micro batch of N requests."""

    batch: JaggedBatch
    """Histories, some maybe empty."""
    candidate_ids: Tensor
    """[N, M] int64, events that followed; 0 = none here."""
    labels: Tensor
    """[N, M] int64, their bit masks."""
    dwell_times: Tensor
    """[N, M] float32 seconds, NaN where the log does not say."""
    counts: Tensor
    """[K + 1] float32: candidates of the global batch that each output learns from, then all."""
    longest: int
    """Events of the longest history, at least 1."""
    step_seed: int
    """Seeds dropout."""

    def to(self, device: torch.device | str) -> "RankingInputs":
        """Copy on `device`."""
        names = ("candidate_ids", "labels", "dwell_times", "counts")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, batch=self.batch.to(device), **moved)


class MultiTaskLoss(nn.Module):
    """Σ over tasks of weight · Σ(loss · w) / max(Σ w, 1), over the global batch."""

    def __init__(
        self, model: RankingModel, objective: MultiTaskConfig, labels: tuple[str, ...]
    ) -> None:
        """`labels` names the bits of the events' labels. ValueError where one is missing."""
        super().__init__()
        self.model = model
        self.targets = TaskTargets(objective, labels)

    def required_ids(self, inputs: RankingInputs) -> dict[str, dict[str, Tensor]]:
        """Ids of the histories, and the candidates."""
        ids = model_ids(self.model, inputs.batch)
        ids["item"]["candidates"] = inputs.candidate_ids
        return ids

    def weight(self, inputs: RankingInputs) -> Tensor:
        """Candidates."""
        return (inputs.candidate_ids > 0).sum().float()

    def forward(
        self,
        inputs: RankingInputs,
        rows: dict[str, Tensor],
        index: dict[str, dict[str, Tensor]],
    ) -> LossOutput:
        """Loss of a micro batch; metric `loss_<output>` is the mean of each, over what it learns
        from."""
        embeddings = model_rows(self.model, rows, index)
        candidates = F.embedding(index["item"]["candidates"], rows["item"])
        args = (embeddings, candidates, inputs.longest, inputs.step_seed)
        logits = self.model(inputs.batch, *args)
        losses, known = self.targets.losses(logits, inputs)
        # The trainer divides by all candidates of the global batch, not by those of each output.
        share = inputs.counts[-1] / inputs.counts[:-1].clamp(min=1.0)
        sums = (losses * known).sum((0, 1))
        weights = torch.tensor(self.targets.weights, device=sums.device)
        names = [f"loss_{name}" for name in self.targets.names]
        metrics = dict(zip(names, sums.detach(), strict=True))
        terms = dict(zip(names, known.sum((0, 1)), strict=True))
        return LossOutput((sums * share * weights).sum(), metrics, terms)

    def flops_per_token(self, mean_length: float) -> float:
        """Forward FLOPs per token."""
        return self.model.flops_per_token(mean_length)


class TaskTargets:
    """What the outputs of a ranking model are to say, and in what unit they say it."""

    def __init__(self, objective: MultiTaskConfig, labels: tuple[str, ...]) -> None:
        """Raises ValueError where the data set lacks a label."""
        self.names, self._labels = objective.outputs, labels
        self.weights = [task.weight for task in objective.tasks]
        self._bits = [
            None if task.kind == "dwell" else _bit(task.label, labels) for task in objective.tasks
        ]
        self._score: list[tuple[int, float]] = []
        if objective.p_score is not None:
            self.weights.append(objective.p_score.loss_weight)
            weights = objective.p_score.weights
            self._score = [(_bit(name, labels), weight) for name, weight in weights.items()]

    @property
    def label_outputs(self) -> dict[str, tuple[int, int]]:
        """Task of a label → its output, and the label's bit."""
        return {self.names[at]: (at, bit) for at, bit in enumerate(self._bits) if bit is not None}

    @property
    def score_labels(self) -> dict[str, tuple[int, bool]]:
        """What the P-score should be high for → the label's bit, and whether it is its absence."""
        bits = {self._labels[bit]: (bit, weight < 0) for bit, weight in self._score}
        return {f"no_{n}" if against else n: (bit, against) for n, (bit, against) in bits.items()}

    @property
    def dwell_output(self) -> int | None:
        """The output of the dwell time."""
        return self._bits.index(None) if None in self._bits else None

    def known(self, candidate_ids: Tensor, dwell_times: Tensor) -> Tensor:
        """[N, M, K] float32: 1 where an output has something to learn."""
        there = (candidate_ids > 0).float()
        stays = there * dwell_times.isfinite()
        columns = [stays if bit is None else there for bit in self._bits]
        return torch.stack([*columns, *([there] if self._score else [])], dim=-1)

    def losses(self, logits: Tensor, inputs: RankingInputs) -> tuple[Tensor, Tensor]:
        """Loss of every output and where it counts, both [N, M, K] float32."""
        logits, columns = logits.float(), []
        for at, bit in enumerate(self._bits):
            if bit is None:
                seconds = inputs.dwell_times.nan_to_num(0.0)
                columns.append((logits[..., at] - torch.log1p(seconds)).square())
            else:
                columns.append(_cross_entropy(logits[..., at], inputs.labels, bit))
        if self._score:
            total = sum(abs(weight) for _, weight in self._score)
            terms = [
                _cross_entropy(logits[..., -1], inputs.labels, bit, weight < 0)
                * (abs(weight) / total)
                for bit, weight in self._score
            ]
            columns.append(torch.stack(terms).sum(0))
        return torch.stack(columns, dim=-1), self.known(inputs.candidate_ids, inputs.dwell_times)

    def readable(self, logits: Tensor) -> dict[str, Tensor]:
        """Logits [..., K] as probabilities of labels, seconds of dwell time, and the P-score."""
        read = {}
        for at, name in enumerate(self.names):
            values = logits[..., at].float()
            seconds = at == self.dwell_output
            read[name] = torch.expm1(values).clamp(min=0.0) if seconds else torch.sigmoid(values)
        return read


def _cross_entropy(logits: Tensor, labels: Tensor, bit: int, against: bool = False) -> Tensor:
    """Of a label, or of its absence."""
    truth = (labels >> bit) & 1
    truth = (1 - truth if against else truth).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def _bit(name: str, labels: tuple[str, ...]) -> int:
    if name not in labels:
        raise ValueError(
            f"objective names the label {name!r}, but the prepared events carry {list(labels)}; "
            "map it in data.source.columns.labels and prepare again"
        )
    return labels.index(name)
