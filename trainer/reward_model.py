"""Reward models: training and evaluation of the stage, and scores for whoever aligns by them."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from configs import storage
from configs.layout import RunLayout, read_checkpoint_reference
from configs.recipe import Recipe
from data_loaders.histories import HistoryLoader
from data_loaders.loader import LoaderState
from models.batch import JaggedBatch
from models.ops.windows import latest_events
from sharding.parallelize import ParallelModel
from trainer.evaluate import load_policy, uses_validation
from trainer.metrics import Measured
from trainer.monitor.results import protocol
from trainer.monitor.reward_report import BASELINE, REWARD_MODEL
from trainer.objectives.multi_task import MultiTaskLoss, TaskTargets
from trainer.policy import Say, Worker, open_checkpoint, parallelize_policy, start_worker
from trainer.pretrain import fit_from_start
from trainer.ranking import (
    RankingInputsMaker,
    candidate_logits,
    measure,
    measure_item_rates,
    ranking_loss,
    ranking_objective,
)
from trainer.trainer import TrainerState


def train_worker(settings: dict[str, Any], say: Say) -> dict[str, Any]:
    """Train a reward model on this rank; rank 0's answer names the selected checkpoint.

    Args:
        settings: as of `trainer.pretrain.train_worker`.
        say: prints a line at the driver.
    """
    worker = start_worker(settings, say)
    loss = ranking_loss(worker)
    return fit_from_start(
        worker,
        settings,
        loss,
        RankingInputsMaker(worker, loss.targets),
        loader_at=lambda state: _loader(worker, state),
        validator=lambda policy, users: (
            lambda: Measured(measure(worker, policy, loss.targets, "validation", users).metrics)
        ),
    )


def evaluate_worker(settings: dict[str, Any], say: Say) -> dict[str, Any]:
    """Measure the reward model and the item-rate baseline; rank 0's answer is the models block.

    Args:
        settings: as of `trainer.evaluate.evaluate_worker`.
        say: prints a line at the driver.
    """
    worker = start_worker(settings, say)
    loss = ranking_loss(worker)
    parts = ("validation", "test") if uses_validation(worker.recipe) else ("test",)
    baseline = {part: measure_item_rates(worker, loss.targets, part) for part in parts}
    policy = _parallel(worker, loss)
    [reference] = settings["policies"].values()
    load_policy(worker, policy, reference)
    found = {part: measure(worker, policy, loss.targets, part) for part in parts}
    worker.tell("evaluated the reward model")
    return {
        "models": {
            BASELINE: _measured(baseline),
            REWARD_MODEL: {**_measured(found), "checkpoint": reference["hash"]},
        },
        "protocol": protocol(worker.recipe, worker.dataset.manifest.fingerprint),
        "semantic_ids": None,
    }


def _measured(parts: dict[str, Any]) -> dict[str, Any]:
    metrics = {part: measured.metrics for part, measured in parts.items()}
    return {**metrics, "calibration": parts["test"].calibration}


class RewardScorer:
    """What a trained reward model expects users to do with candidates."""

    def __init__(self, policy: ParallelModel, targets: TaskTargets, max_length: int) -> None:
        """`max_length` events of a history are read, the latest ones."""
        self._policy, self._targets, self._max_length = policy, targets, max_length

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the scores: the tasks, and `p_score` where the model has one."""
        return self._targets.names

    def score(self, contexts: JaggedBatch, candidates: Tensor) -> dict[str, Tensor]:
        """Scores of candidates after contexts. Collective; without gradient.

        Args:
            contexts: N histories with the labels of their events, some maybe empty; the request is
                made at the `next_timestamps` of a last event.
            candidates: [N, G] int64 item ids, 0 = none (its scores mean nothing).

        Returns:
            name → [N, G] float32: probabilities of labels and the P-score, seconds of dwell time.
        """
        if contexts.labels is None:
            raise ValueError(
                "a reward model reads what users did, but these contexts carry no labels; map "
                "data.source.columns.labels and prepare again"
            )
        contexts, _, _ = latest_events(contexts, {}, self._max_length)
        return self._targets.readable(candidate_logits(self._policy, contexts, candidates))


def open_reward_model(worker: Worker, url: str) -> RewardScorer:
    """The reward model that a run trained, sharded over this worker group. Collective.

    Args:
        worker: of the stage that asks; its data set must be the one the model was trained on.
        url: output directory of the run (`output` of its recipe), any URL all ranks see.

    Raises:
        ValueError: no reward model was trained there, or on other data.
    """
    layout = RunLayout(storage.absolute(url))
    record = layout.stage_record("train")
    if not storage.exists(record):
        raise ValueError(f"{url} holds no trained model: run `tandem train` on its recipe first")
    store, info = open_checkpoint(worker, read_checkpoint_reference(record))
    written = store.recipe(info)
    written["cluster"].pop("max_failures", None)  # of checkpoints from before the block `failures`
    recipe = Recipe.model_validate(written)
    if not recipe.ranks_candidates:
        raise ValueError(
            f"{url} holds model.kind={recipe.model.kind!r}, which is no reward model: train "
            "model.kind=hstu_ranking there"
        )
    # Tables and dense half are the reward recipe's; data, ranks and device this worker's.
    own = replace(worker, recipe=recipe, semantic_ids=None)
    loss = ranking_loss(own)
    policy = _parallel(own, loss)
    store.load_weights(policy, info)
    return RewardScorer(policy, loss.targets, recipe.data.loader.max_length)


def _parallel(worker: Worker, loss: MultiTaskLoss) -> ParallelModel:
    """A policy to load checkpoints into; it is never trained."""
    recipe = worker.recipe
    return parallelize_policy(
        worker,
        loss.model,
        loss,
        total_steps=1,
        optimizer=recipe.training.optimizer,
        sparse_lr=recipe.sharding.optimizer.lr,
    )


def _loader(worker: Worker, state: TrainerState) -> HistoryLoader:
    objective = ranking_objective(worker)
    return HistoryLoader(
        worker.dataset,
        worker.recipe.data.loader,
        candidates=objective.candidates,
        requests_per_user=objective.requests_per_user,
        seed=worker.recipe.seed,
        rank=worker.ctx.rank,
        world_size=worker.ctx.world_size,
        include_validation=not uses_validation(worker.recipe),
        state=LoaderState(**state.loader) if state.loader else None,
    )
