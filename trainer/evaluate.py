"""Full-catalogue evaluation: ranking metrics of policies, popularity, and preference accuracy.

Protocol: algorithms reference §8. Shape legend: b users of a batch, D width, V items.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from configs.evaluation import EvaluationConfig
from configs.preferences import PreferenceRule
from configs.recipe import Recipe
from data_loaders.evaluation import EvaluationBatch, evaluation_batches
from data_loaders.items import train_counts
from data_loaders.preferences import preference_batches
from sharding.parallelize import ParallelModel
from sharding.retrieval import Catalogue
from trainer.generate import GenerationMetrics, ItemGenerator
from trainer.left_out import left_out_samples, users_left_out
from trainer.losses import pretraining_loss
from trainer.metrics import Measured, Popularity, RankingMetrics
from trainer.monitor.results import protocol
from trainer.objectives.dpo import pairs_won
from trainer.policy import (
    Say,
    Worker,
    open_checkpoint,
    parallelize_policy,
    start_worker,
)
from trainer.scoring import Likelihood, pair_candidates
from trainer.stop_notice import unless_asked

Part = Literal["validation", "test"]


@dataclass(frozen=True)
class Targets:
    """The held-out events that are to be foretold."""

    part: Part
    rule: PreferenceRule | None = None
    """Tells which of them were liked; null, or `check_rule` has passed."""
    max_users: int | None = None
    """First users by id; None means all."""


Query = Callable[[EvaluationBatch], Tensor]


def evaluate_worker(settings: dict[str, Any], say: Say) -> dict[str, Any]:
    """Measure every policy of the run on validation and test; rank 0's answer is the models block.

    Args:
        settings: `recipe`, `output`, `policies` (name → checkpoint reference) and `pairs` (URL of
            the preference pairs, or null).
        say: prints a line at the driver.
    """
    worker = start_worker(settings, say)
    recipe = worker.recipe
    parts: tuple[Part, ...] = ("validation", "test")
    if recipe.data.split.kind == "leave_last_out" and (
        recipe.data.split.include_validation_in_training
    ):
        parts = ("test",)
    counts = train_counts(worker.layout.data)
    rule = None if settings["pairs"] is None else judging_rule(recipe)
    targets = [Targets(part, rule) for part in parts]
    models: dict[str, Any] = {"popularity": popularity(worker, counts, targets)}
    policy = evaluation_policy(worker)
    for name, reference in settings["policies"].items():
        load_policy(worker, policy, reference)
        models[name] = {
            each.part: rank_policy(worker, policy, counts, each).metrics for each in targets
        }
        if settings["pairs"] is not None:
            models[name]["preference_accuracy"] = preference_accuracy(
                worker, policy, settings["pairs"]
            )
        models[name]["checkpoint"] = reference["hash"]
        worker.tell(f"evaluated {name}")
    codes = worker.semantic_ids
    return {
        "models": models,
        "protocol": protocol(recipe, worker.dataset.manifest.fingerprint),
        "semantic_ids": None if codes is None else codes.fingerprint,
    }


def evaluation_policy(worker: Worker) -> ParallelModel:
    """A policy to load checkpoints into; it is never trained."""
    recipe = worker.recipe
    loss = pretraining_loss(worker)
    return parallelize_policy(
        worker,
        loss.model,
        loss,
        total_steps=1,
        optimizer=recipe.training.optimizer,
        sparse_lr=recipe.sharding.optimizer.lr,
    )


def load_policy(worker: Worker, policy: ParallelModel, reference: dict[str, Any]) -> None:
    """Fill a policy with a checkpoint's weights."""
    store, info = open_checkpoint(worker, reference)
    store.load_weights(policy, info)


def judging_rule(recipe: Recipe) -> PreferenceRule | None:
    """What the alignment calls liked."""
    return None if recipe.alignment is None else recipe.alignment.rule


def rank_policy(
    worker: Worker, policy: ParallelModel, counts: Tensor, targets: Targets
) -> Measured:
    """Ranking metrics of a policy. Collective; equal on all ranks."""
    config = worker.recipe.evaluation
    if worker.recipe.writes_codes:
        return _rank_generated(worker, policy, counts, targets)
    catalogue = Catalogue(policy, worker.num_items, config.catalogue_chunk)

    def query(users: EvaluationBatch) -> Tensor:
        return policy.query(users.batch)[last_tokens(users)]

    return _rank(worker, catalogue, query, counts, targets)


def last_tokens(users: EvaluationBatch) -> Tensor:
    """[b] position of each user's last token, where the target is predicted."""
    return users.batch.offsets[1:] - 1


def popularity(worker: Worker, counts: Tensor, targets: Sequence[Targets]) -> dict[str, Any]:
    """The baseline that recommends what is bought most: a catalogue of one-dimensional keys."""
    catalogue = Catalogue.from_keys(
        worker.ctx, lambda ids: counts[ids - 1].to(torch.float32)[:, None], worker.num_items
    )

    def query(users: EvaluationBatch) -> Tensor:
        return torch.ones(users.target_ids.numel(), 1, device=worker.ctx.device)

    return {each.part: _rank(worker, catalogue, query, counts, each).metrics for each in targets}


def _rank(
    worker: Worker,
    catalogue: Catalogue,
    query: Query,
    counts: Tensor,
    targets: Targets,
) -> Measured:
    config, ctx = worker.recipe.evaluation, worker.ctx
    metrics = RankingMetrics(config.ks, Popularity.of(counts, config.head_share).to(ctx.device))
    for users in _batches(worker, targets):
        users = users.to(ctx.device)
        queries = query(users)
        seen = _seen(users, config)
        ranks = catalogue.ranks(queries, users.target_ids, *seen)
        top_ids, _ = catalogue.top_k(queries, max(config.ks), *seen)
        metrics.update(users.batch.sample_ids, ranks, users.target_ids, top_ids, users.liked)
    covered = ctx.all_reduce_max(metrics.covered())
    sums = ctx.all_reduce_sum(metrics.sums())
    found = metrics.result(sums, covered) | users_left_out(worker, targets.max_users)
    return Measured(found, metrics.shares(sums))


def _rank_generated(
    worker: Worker,
    policy: ParallelModel,
    counts: Tensor,
    targets: Targets,
) -> Measured:
    """Metrics of a policy that writes ids: a target is found within the beams, or missed."""
    config = worker.recipe.evaluation
    generator = ItemGenerator(worker, policy)
    popularity = Popularity.of(counts, config.head_share).to(worker.ctx.device)
    metrics = GenerationMetrics.of(config.ks, popularity)
    for users in _batches(worker, targets):
        users = users.to(worker.ctx.device)
        offer = generator.offer(users, max(config.ks), filter_seen=config.filter_seen)
        metrics.update(generator, offer, users)
    found = metrics.result(worker)
    found.metrics.update(users_left_out(worker, targets.max_users))
    return found


def _batches(worker: Worker, targets: Targets) -> Iterator[EvaluationBatch]:
    batches = evaluation_batches(
        worker.dataset,
        targets.part,
        users_per_batch=worker.recipe.evaluation.users_per_batch,
        max_length=worker.recipe.data.loader.max_length,
        rank=worker.ctx.rank,
        world_size=worker.ctx.world_size,
        max_users=targets.max_users,
        rule=targets.rule,
        left_out=left_out_samples(worker),
    )
    return unless_asked(batches, worker.ctx.any)


def _seen(users: EvaluationBatch, config: EvaluationConfig) -> tuple[Tensor, Tensor]:
    """Items left out of a user's candidates; the target itself always stays one."""
    if config.filter_seen:
        return users.seen_ids, users.seen_offsets
    return users.seen_ids[:0], torch.zeros_like(users.seen_offsets)


def preference_accuracy(worker: Worker, policy: ParallelModel, pairs_url: str) -> float:
    """Share of held-out losers that their winner is likelier than; a tie is half. Collective."""
    counts = torch.zeros(2, dtype=torch.float64, device=worker.ctx.device)
    likelihood = Likelihood.of(worker, policy, normalised=False)
    held_out = preference_batches(
        pairs_url,
        "validation",
        pairs_per_batch=worker.recipe.evaluation.users_per_batch,
        rank=worker.ctx.rank,
        world_size=worker.ctx.world_size,
        left_out=left_out_samples(worker, "pair"),
    )
    for pairs in unless_asked(held_out, worker.ctx.any):
        log_probs = likelihood(pair_candidates(worker, policy.model, pairs))
        there = (pairs.rejected_ids > 0).to(worker.ctx.device)
        counts += ranked_right(log_probs, there)
    right, total = worker.ctx.all_reduce_sum(counts).tolist()
    if total == 0:
        raise ValueError(
            f"{pairs_url} holds no validation pair; raise alignment.validation_share or loosen "
            "alignment.rule"
        )
    return right / total


def ranked_right(log_probs: Tensor, there: Tensor) -> Tensor:
    """Losers below their winner, and all losers: [2] float64.

    Items that share a semantic id tie with each other, as in the training step's `accuracy`.

    Args:
        log_probs: [b, 1 + K] float32, log π of the winner and its losers; anything where none is.
        there: [b, K] bool, which losers there are.
    """
    won = pairs_won(log_probs[:, :1] - log_probs[:, 1:])
    return torch.stack([won.where(there, 0.0).double().sum(), there.sum().double()])


def validation_ranker(
    worker: Worker,
    policy: ParallelModel,
    max_users: int | None,
    rule: PreferenceRule | None = None,
) -> Callable[[], Measured]:
    """Function that measures a policy on validation as it is now; `rule` as in `Targets`."""
    counts = train_counts(worker.layout.data)
    targets = Targets("validation", rule, max_users)
    return lambda: rank_policy(worker, policy, counts, targets)


def uses_validation(recipe: Recipe) -> bool:
    """Whether training of this recipe has validation targets to select on."""
    split = recipe.data.split
    return not (split.kind == "leave_last_out" and split.include_validation_in_training)
