"""What a rule says of the logged impressions that alignment may learn from, counted.

Shape legend: B users, T events.
"""

import functools
from typing import Any

import numpy as np

from configs.preferences import PreferenceRule
from configs.terminal import say
from data_loaders.dataset import SequenceDataset
from data_loaders.exchange import Progress, map_parts, quiet
from data_loaders.manifest import read_manifest
from data_loaders.poison import PoisonedSampleError
from data_loaders.preference_rules import OUTCOMES, check_rule
from data_loaders.prompts import following_outcomes, prompt_ends


def count_impressions(
    dataset_url: str, rule: PreferenceRule, *, latest: int, seed: int, held_out: float
) -> dict[str, int]:
    """Impressions of all users by `OUTCOMES`, a Ray Data task a shard.

    Args:
        dataset_url: the prepared data set; all nodes must see it.
        rule: `alignment.logged.rule`.
        latest: of a user's training events, how many at the end a prompt may be cut before.
        seed: of the recipe.
        held_out: share of users whom alignment learns nothing from.

    Raises:
        ValueError: the data set lacks what the rule reads, or nothing was liked or disliked.
    """
    data, place = read_manifest(dataset_url), "alignment.logged.rule"
    check_rule(rule, data, dataset_url, place)
    task = functools.partial(
        _count_shard,
        dataset_url=dataset_url,
        rule=rule,
        latest=latest,
        seed=seed,
        held_out=held_out,
    )
    with quiet():
        progress = Progress(say)
        reports = map_parts("read impressions", progress, len(data.shards), task)
    totals = {name: sum(report[name] for report in reports) for name in OUTCOMES}
    if not totals["liked"] + totals["disliked"]:
        raise ValueError(
            f"{place} finds nothing to learn from: of {totals['neither']:,} impressions none is "
            "liked and none disliked; loosen the rule"
        )
    return totals


def _count_shard(
    index: int,
    *,
    dataset_url: str,
    rule: PreferenceRule,
    latest: int,
    seed: int,
    held_out: float,
) -> dict[str, Any]:
    """Impressions of the users of one shard of sequences."""
    dataset = SequenceDataset(dataset_url, cached_row_groups=1)
    liked = disliked = rows = 0
    for ids in dataset.row_groups(index):
        ends = prompt_ends(dataset, ids, seed, held_out)
        found = _outcomes(dataset, rule, ids, ends, np.clip(ends - 1, 0, latest))
        liked, disliked = liked + int((found > 0).sum()), disliked + int((found < 0).sum())
        rows += len(found)
    counts = (liked, disliked, rows - liked - disliked)
    return {"rows": rows, **dict(zip(OUTCOMES, counts, strict=True))}


def _outcomes(
    dataset: SequenceDataset,
    rule: PreferenceRule,
    ids: np.ndarray,
    ends: np.ndarray,
    tokens: np.ndarray,
) -> np.ndarray:
    """`following_outcomes` of the users who can be read: whether training does without the others
    is its matter."""
    try:
        return following_outcomes(dataset, rule, ids, ends, tokens)
    except PoisonedSampleError as error:
        sound = ~np.isin(ids, error.sample_ids)
        return _outcomes(dataset, rule, ids[sound], ends[sound], tokens[sound])
