"""Recommendations for a few users, with titles."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_loaders.evaluation import EvaluationBatch, recommendation_batch
from data_loaders.items import find_users, raw_items, titles
from data_loaders.loader import NOBODY, without
from models.batch import JaggedBatch
from sharding.retrieval import Catalogue
from trainer.allow_lists import AllowLists, allow_lists
from trainer.evaluate import evaluation_policy, last_tokens, load_policy
from trainer.generate import ItemGenerator
from trainer.left_out import left_out_samples
from trainer.policy import Say, Worker, start_worker


def recommend_worker(settings: dict[str, Any], say: Say) -> dict[str, Any]:
    """Top-k of the newest policy for the recipe's users; rank 0's answer holds them all.

    Args:
        settings: `recipe`, `output` and `policy` (checkpoint reference).
        say: prints a line at the driver.
    """
    worker = start_worker(settings, say)
    config, recipe = worker.recipe.recommend, worker.recipe
    policy = evaluation_policy(worker)
    load_policy(worker, policy, settings["policy"])
    # A handful of users: rank 0 asks, the others lend their shards.
    own = without(_users(worker), left_out_samples(worker)) if worker.ctx.rank == 0 else NOBODY
    users = recommendation_batch(worker.dataset, own, max_length=recipe.data.loader.max_length).to(
        worker.ctx.device
    )
    lists = allow_lists(
        config, worker.layout.data, worker.dataset.raw_users(users.batch.sample_ids.cpu().numpy())
    )
    if recipe.writes_codes:
        offer = ItemGenerator(worker, policy).offer(
            users, config.top_k, filter_seen=True, lists=lists
        )
        ids, scores = offer.items, offer.scores
    else:
        catalogue = Catalogue(policy, worker.num_items, recipe.evaluation.catalogue_chunk)
        ids, scores = _best(
            catalogue, policy.query(users.batch)[last_tokens(users)], users, lists, config.top_k
        )
    return {"users": _describe(worker, users.batch, ids.cpu().numpy(), scores.cpu().numpy())}


def _best(
    catalogue: Catalogue, queries: Tensor, users: EvaluationBatch, lists: AllowLists | None, k: int
) -> tuple[Tensor, Tensor]:
    """Ids and scores [b, k] of the best items for each query [b, D]. Collective: a scan a list."""
    if lists is None:
        return catalogue.top_k(queries, k, users.seen_ids, users.seen_offsets)
    ids = users.seen_ids.new_zeros(len(queries), k)
    scores = queries.new_full((len(queries), k), -torch.inf, dtype=torch.float32)
    of = lists.of.to(queries.device)
    for number, allowed in enumerate(lists.items):
        found = catalogue.top_k(queries, k, users.seen_ids, users.seen_offsets, allowed)
        mine = of == number
        ids[mine], scores[mine] = found[0][mine], found[1][mine]
    return ids, scores


def _users(worker: Worker) -> np.ndarray:
    config = worker.recipe.recommend
    if config.users:
        return find_users(worker.layout.data, config.users) - 1
    return np.arange(min(config.num_users, worker.dataset.num_samples))


def _describe(
    worker: Worker, batch: JaggedBatch, ids: np.ndarray, scores: np.ndarray
) -> list[dict[str, Any]]:
    url = worker.layout.data
    users = worker.dataset.raw_users(batch.sample_ids.cpu().numpy())
    described = []
    for row, user in enumerate(users):  # a few users, each a screen of text
        begin, end = int(batch.offsets[row]), int(batch.offsets[row + 1])
        history = batch.item_ids[max(begin, end - 5) : end].cpu().numpy()
        kept = ids[row] > 0
        described.append(
            {
                "user": user,
                "history": titles(url, history),
                "items": raw_items(url, ids[row][kept]),
                "titles": titles(url, ids[row][kept]),
                "scores": [round(float(s), 4) for s in scores[row][kept]],
            }
        )
    return described
