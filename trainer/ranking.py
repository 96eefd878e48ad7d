"""Ranking models on this rank: requests as loss inputs, scores of candidates, held-out metrics.

Shape legend: B sequences, N requests, G candidates of a request, D width, K outputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from configs.models import HSTURankingConfig
from configs.objectives import MultiTaskConfig
from data_loaders.histories import held_out_batches
from models.base import RankingModel
from models.batch import JaggedBatch
from models.build import build_ranking_model
from models.ops.requests import Requests, cut_requests, request_slice
from sharding.parallelize import ParallelModel
from trainer.label_metrics import LabelMetrics
from trainer.left_out import left_out_samples, users_left_out
from trainer.objectives.multi_task import MultiTaskLoss, RankingInputs, TaskTargets
from trainer.objectives.negatives import seed_of_step
from trainer.policy import Worker, catalogue_sizes
from trainer.stop_notice import unless_asked

RATE_PRIOR = 10.0
"""Events at the overall rate that the item-rate baseline adds to each item's own."""


def ranking_objective(worker: Worker) -> MultiTaskConfig:
    """The objective of a recipe whose model ranks candidates."""
    objective = worker.recipe.objective
    assert isinstance(objective, MultiTaskConfig), "a recipe's checks tell ranking models apart"
    return objective


def ranking_loss(worker: Worker) -> MultiTaskLoss:
    """The recipe's loss over a new model.

    Raises:
        ValueError: the data set lacks a label, dwell times or a feature.
    """
    recipe, objective = worker.recipe, ranking_objective(worker)
    assert isinstance(recipe.model, HSTURankingConfig), "a recipe's checks tell models apart"
    manifest = worker.dataset.manifest
    if not manifest.has_dwell_times and any(task.kind == "dwell" for task in objective.tasks):
        raise ValueError(
            "objective.tasks has kind: dwell, but the prepared events carry no dwell times; map "
            "data.source.columns.dwell and prepare again"
        )
    model = build_ranking_model(
        recipe.model,
        catalogue_sizes(worker),
        recipe.tables,
        recipe.data.loader.max_length,
        num_tasks=len(objective.tasks),
        p_score=objective.p_score is not None,
    )
    return MultiTaskLoss(model, objective, manifest.labels)


class RankingInputsMaker:
    """Turns a step's sequences into requests with the outcomes of their candidates."""

    def __init__(self, worker: Worker, targets: TaskTargets) -> None:
        self._objective, self._targets = ranking_objective(worker), targets
        self._seed, self._ctx = worker.recipe.seed, worker.ctx
        self._max_history = worker.recipe.data.loader.max_length

    def __call__(self, batches: Sequence[JaggedBatch], step: int) -> list[RankingInputs]:
        """Inputs of each micro batch of this rank. Collective: outputs are counted globally."""
        cut = [
            self.inputs(
                batch,
                cut_requests(
                    batch,
                    self._objective.candidates,
                    self._max_history,
                    per_sequence=self._objective.requests_per_user,
                    phase=(self._seed, step),
                ),
                seed_of_step(self._seed, step),
            )
            for batch in batches
        ]
        counts = torch.stack([self._counted(inputs) for inputs in cut]).sum(0)
        counts = self._ctx.all_reduce_sum(counts.to(self._ctx.device)).float()
        return [replace(inputs.to(self._ctx.device), counts=counts) for inputs in cut]

    def inputs(self, batch: JaggedBatch, requests: Requests, step_seed: int = 0) -> RankingInputs:
        """Requests with the outcomes that `batch`, which they were cut from, tells."""
        there, place = requests.tokens >= 0, requests.tokens.clamp(min=0)

        def taken(values: Tensor) -> Tensor:
            if not batch.num_tokens:
                return values.new_zeros(place.shape)
            return torch.where(there, values[place], torch.zeros_like(values[:1]))

        assert batch.labels is not None, "the data set's events carry labels"
        dwell = batch.dwell_times
        unknown = torch.full((batch.num_tokens,), torch.nan) if dwell is None else dwell
        return RankingInputs(
            batch=requests.batch,
            candidate_ids=taken(batch.item_ids),
            labels=taken(batch.labels),
            dwell_times=taken(unknown),
            counts=torch.zeros(0),
            longest=longest_history(requests.batch),
            step_seed=step_seed,
        )

    def _counted(self, inputs: RankingInputs) -> Tensor:
        known = self._targets.known(inputs.candidate_ids, inputs.dwell_times).sum((0, 1))
        return torch.cat([known, (inputs.candidate_ids > 0).sum()[None].float()]).double()


def longest_history(batch: JaggedBatch) -> int:
    """Length to pad histories to, at least 1. Read it before moving the batch to a device."""
    return max(int(batch.lengths.max()), 1) if batch.num_sequences else 1


def candidate_logits(policy: ParallelModel, batch: JaggedBatch, candidates: Tensor) -> Tensor:
    """Logits [N, G, K] float32 of candidate ids [N, G] after the histories of `batch`. Collective.

    Any device and G; ids of 0 are no candidates, and what is said of them means nothing.
    """
    longest, device = longest_history(batch), policy.ctx.device
    batch, candidates = batch.to(device), candidates.to(device)
    rows = policy.lookup({"item": candidates.flatten()})["item"].view(*candidates.shape, -1)

    def use(model: Any, embeddings: dict[str, Tensor]) -> Tensor:
        assert isinstance(model, RankingModel), "the policy holds a ranking model"
        return model(batch, embeddings, rows, longest, 0).float()

    logits: Tensor = policy.infer(batch, use)
    return logits


@dataclass(frozen=True)
class RankingMeasurement:
    """What a part of the held-out events says of a model."""

    metrics: dict[str, float]
    calibration: dict[str, Any]
    """Label → (mean probability, share with the label, events) of bins by score."""


def measure(
    worker: Worker,
    policy: ParallelModel,
    targets: TaskTargets,
    part: str,
    max_users: int | None = None,
) -> RankingMeasurement:
    """Metrics of a model on the events of `validation` or `test`. Collective."""
    sums = _PartSums(worker, targets)
    for inputs in _held_out(worker, targets, part, max_users):
        logits = candidate_logits(policy, inputs.batch, inputs.candidate_ids)
        sums.update(logits, inputs.to(worker.ctx.device))
    return sums.result(worker, max_users)


def measure_item_rates(worker: Worker, targets: TaskTargets, part: str) -> RankingMeasurement:
    """The baseline that knows each item's rate of each label in training, and no user.

    Collective."""
    outputs = targets.label_outputs
    device = worker.ctx.device
    counts = torch.zeros(worker.num_items + 1, 1 + len(outputs), dtype=torch.float64, device=device)
    for batch, _ in _part_batches(worker, "train", None):
        assert batch.labels is not None, "the data set's events carry labels"
        bits = torch.tensor([bit for _, bit in outputs.values()], dtype=torch.int64)
        seen = torch.cat([torch.ones(batch.num_tokens, 1), (batch.labels[:, None] >> bits) & 1], 1)
        counts.index_add_(0, batch.item_ids.to(device), seen.double().to(device))
    counts = worker.ctx.all_reduce_sum(counts)
    overall = counts[:, 1:].sum(0) / counts[:, 0].sum().clamp(min=1.0)
    rates = (counts[:, 1:] + RATE_PRIOR * overall) / (counts[:, :1] + RATE_PRIOR)
    table = torch.logit(rates.clamp(1e-6, 1 - 1e-6)).float()
    sums = _PartSums(worker, targets)
    for inputs in _held_out(worker, targets, part, None):
        inputs = inputs.to(device)
        logits = torch.zeros(*inputs.candidate_ids.shape, len(targets.names), device=device)
        for column, (at, _) in enumerate(outputs.values()):
            logits[..., at] = table[inputs.candidate_ids, column]
        sums.update(logits, inputs, only_labels=True)
    return sums.result(worker, None)


class _PartSums:
    """Sums of one pass over a part."""

    def __init__(self, worker: Worker, targets: TaskTargets) -> None:
        self._targets, device = targets, worker.ctx.device
        self._labels = LabelMetrics(tuple(targets.label_outputs), device)
        self._score = LabelMetrics(tuple(f"p_score:{n}" for n in targets.score_labels), device)
        self._dwell = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, inputs: RankingInputs, only_labels: bool = False) -> None:
        there = inputs.candidate_ids > 0
        found, labels = logits[there], inputs.labels[there]
        users = inputs.batch.user_ids[:, None].expand_as(there)[there]
        outputs = list(self._targets.label_outputs.values())
        if outputs:
            truth = torch.stack([(labels >> bit) & 1 for _, bit in outputs], dim=1)
            self._labels.update(found[:, [at for at, _ in outputs]], truth, users)
        if only_labels:
            return
        wanted = list(self._targets.score_labels.values())
        if wanted:
            truth = torch.stack([((labels >> bit) & 1) ^ int(no) for bit, no in wanted], dim=1)
            self._score.update(found[:, -1:].expand(-1, len(wanted)), truth, users)
        at = self._targets.dwell_output
        if at is not None:
            stayed = torch.log1p(inputs.dwell_times[there])
            known = stayed.isfinite()
            stayed, error = stayed[known].double(), (found[:, at] - stayed)[known].double()
            ones = torch.ones_like(stayed)
            self._dwell += torch.stack([x.sum() for x in (ones, stayed, stayed**2, error**2)])

    def result(self, worker: Worker, max_users: int | None) -> RankingMeasurement:
        counts, sums = (worker.ctx.all_reduce_sum(x) for x in self._labels.sums())
        metrics, curves = self._labels.result(counts.cpu(), sums.cpu())
        counts, sums = (worker.ctx.all_reduce_sum(x) for x in self._score.sums())
        score, _ = self._score.result(counts.cpu(), sums.cpu())
        metrics |= {
            name: value for name, value in score.items() if name.startswith("auc") and "/" in name
        }
        count, total, square, error = worker.ctx.all_reduce_sum(self._dwell.clone()).tolist()
        if count:
            variance = max(square / count - (total / count) ** 2, 1e-12)
            metrics["r2/dwell"] = 1 - error / count / variance
            metrics["rmse/dwell"] = (error / count) ** 0.5
        return RankingMeasurement(metrics | users_left_out(worker, max_users), curves)


def _held_out(
    worker: Worker, targets: TaskTargets, part: str, max_users: int | None
) -> Iterator[RankingInputs]:
    """Requests of a part in blocks of bounded size, as many on every rank."""
    maker, config = RankingInputsMaker(worker, targets), worker.recipe.evaluation
    objective, longest = ranking_objective(worker), worker.recipe.data.loader.max_length
    batches = _part_batches(worker, part, max_users)
    for batch, first in unless_asked(batches, worker.ctx.any):
        requests = cut_requests(batch, objective.candidates, longest, first=first)
        blocks = -(-len(requests.tokens) // config.users_per_batch)
        most = worker.ctx.all_reduce_max(torch.tensor(blocks, device=worker.ctx.device))
        for block in range(int(most)):
            begin = block * config.users_per_batch
            yield maker.inputs(batch, request_slice(requests, begin, config.users_per_batch))


def _part_batches(
    worker: Worker, part: Any, max_users: int | None
) -> Iterator[tuple[JaggedBatch, Tensor]]:
    return held_out_batches(
        worker.dataset,
        part,
        users_per_batch=worker.recipe.evaluation.users_per_batch,
        max_length=worker.recipe.data.loader.max_length,
        rank=worker.ctx.rank,
        world_size=worker.ctx.world_size,
        max_users=max_users,
        left_out=left_out_samples(worker),
    )
