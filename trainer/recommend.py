"""Recommendations for a few users, with titles."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_loaders.evaluation import recommendation_batch
from data_loaders.items import find_users, item_feature, raw_items, titles
from data_loaders.loader import NOBODY, without
from models.batch import JaggedBatch
from sharding.retrieval import Catalogue
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
    allowed = _allowed(worker)
    if recipe.writes_codes:
        generator = ItemGenerator(worker, policy)
        offer = generator.offer(users, config.top_k, filter_seen=True, allowed=allowed)
        ids, scores = offer.items, offer.scores
    else:
        catalogue = Catalogue(policy, worker.num_items, recipe.evaluation.catalogue_chunk)
        queries = policy.query(users.batch)[last_tokens(users)]
        ids, scores = catalogue.top_k(
            queries, config.top_k, users.seen_ids, users.seen_offsets, allowed
        )
    return {"users": _describe(worker, users.batch, ids.cpu().numpy(), scores.cpu().numpy())}


def _allowed(worker: Worker) -> Tensor | None:
    """[V + 1] bool, by item id: what the recipe allows; None for everything."""
    config = worker.recipe.recommend.allow
    if config is None:
        return None
    feature = item_feature(worker.layout.data, config.feature)
    asked = f"recommend.allow asks for {config.feature}"
    return torch.isin(feature.ids, torch.tensor(feature.numbers(config.values, asked)))


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
