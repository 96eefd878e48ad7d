"""Names of what training and validation measure, and a recipe's metrics held to them."""

import math
from collections.abc import Sequence

from configs.alignment import (
    Alignment,
    GBPOConfig,
    GeneratedPairsBase,
    IterativePreferenceConfig,
    OnlineBase,
)
from configs.guardrails import DivergenceConfig, LimitConfig
from configs.objectives import MultiTaskConfig, Objective
from configs.rewards import reward_names
from configs.schema import closest
from configs.training import ValidationConfig

GROUPS = ("", "/head", "/tail", "/cold", "/liked")
"""Suffixes of ranking metrics: every user, users whose target is popular, the other users, those of
them whose target no training event has, and users who liked their target by the alignment's rule. A
group without users has no metrics."""

LEFT_OUT = "users_left_out"
"""Beside the metrics of users: how many of them a stage left out, as nobody can read them."""

_SPREAD = ("reward_std", "zero_std", "unique", "legality")
"""Of generated groups."""


def selectable_metrics(objective: Objective, ks: Sequence[int], *, judged: bool) -> list[str]:
    """Validation metrics of which larger is better, so that a checkpoint may be selected on them.

    Args:
        objective: of training; a reward model's is measured by its tasks.
        ks: cut-offs.
        judged: there are held-out preference pairs.
    """
    if isinstance(objective, MultiTaskConfig):
        labels = [task.name for task in objective.tasks if task.kind == "label"]
        names = [*(["auc"] if labels else []), *(f"auc/{name}" for name in labels)]
        return names + [f"r2/{task.name}" for task in objective.tasks if task.kind == "dwell"]
    names = [f"{metric}@{k}" for metric in ("hr", "ndcg") for k in ks] + ["mrr"]
    return [*names, "preference_accuracy"] if judged else names


def validation_metrics(
    objective: Objective, ks: Sequence[int], *, judged: bool, writes_codes: bool
) -> list[str]:
    """All that validation of a policy measures, those of groups of users among them."""
    ranking = selectable_metrics(objective, ks, judged=False)
    groups = GROUPS if judged else GROUPS[:-1]
    ranked = [f"{name}{group}" for group in groups for name in ranking]
    names = [*ranked, *(f"coverage@{k}" for k in ks)]
    if writes_codes:
        names += [f"{name}/id" for name in ranked] + ["legality"]
    return [*names, "preference_accuracy"] if judged else names


def training_metrics(alignment: Alignment) -> list[str]:
    """What an alignment's training steps measure."""
    names = ["loss", *(["supervised_loss"] if alignment.supervised_weight > 0 else [])]
    if isinstance(alignment, GBPOConfig) and not alignment.generates:
        return [*names, "logged_loss", "liked", "disliked", "entropy", "kl"]
    if isinstance(alignment, OnlineBase):
        return names + _of_groups(alignment)
    names += ["preference_loss", "accuracy", "margin", "rewards/chosen", "rewards/rejected"]
    names += ["entropy", "kl"]
    if isinstance(alignment, GeneratedPairsBase):
        names += ["reward", *_SPREAD]
    if isinstance(alignment, IterativePreferenceConfig):
        names += ["reward_best", "reward_worst", "tied"]
    return names


def _of_groups(alignment: OnlineBase) -> list[str]:
    names = ["policy_loss", "ratio", "clip_low", "clip_high", "bounded", "entropy"]
    names += ["reward", *_SPREAD]
    names += [f"reward/{name}" for name in reward_names(alignment.rewards)]
    if alignment.reference is not None:
        names += ["kl"]
    if isinstance(alignment, GBPOConfig) and alignment.logged is not None:
        names += ["logged_loss", "liked", "disliked"]
    if alignment.rollout_actors is not None:
        names += ["staleness", "queue_wait", "dropped"]
    return names


def check_metrics(
    objective: Objective,
    ks: Sequence[int],
    validation: ValidationConfig | None,
    alignment: Alignment | None,
    *,
    writes_codes: bool,
) -> None:
    """Refuse to select checkpoints on what is not measured, and guardrails that can never speak.

    Args:
        objective: of training.
        ks: cut-offs.
        validation: of training.
        alignment: with its own validation and guardrails.
        writes_codes: whether the model writes semantic ids.

    Raises:
        ValueError: a metric is not measured, or too seldom.
    """
    _check_selection("training", validation, selectable_metrics(objective, ks, judged=False))
    if alignment is None:
        return
    judged, validation = alignment.rule is not None, alignment.validation
    _check_selection("alignment", validation, selectable_metrics(objective, ks, judged=judged))
    validated: list[str] = []
    if validation is not None:
        validated = validation_metrics(objective, ks, judged=judged, writes_codes=writes_codes)
    training = training_metrics(alignment)
    _check_limits(alignment.guardrails.limits, training, validated)
    if alignment.guardrails.divergence is not None:
        most = _validations(alignment.epochs, validation)
        _check_divergence(alignment.guardrails.divergence, training, validated, most)


def _validations(epochs: int, config: ValidationConfig | None) -> float:
    """How many there are after the start; no bound where steps are counted, which data decide."""
    if config is None:
        return 0
    return math.inf if config.every_steps is not None else -(-epochs // config.every_epochs)


def _check_selection(block: str, config: ValidationConfig | None, allowed: Sequence[str]) -> None:
    if config is not None and config.metric not in allowed:
        raise ValueError(_refusal(f"{block}.validation.metric", config.metric, allowed))


def _check_limits(
    limits: Sequence[LimitConfig], training: Sequence[str], validation: Sequence[str]
) -> None:
    for at, limit in enumerate(limits):
        path, metric = f"alignment.guardrails.limits.{at}.metric", limit.metric
        known = [*validation, *training]
        if limit.confidence is not None and not _is_of_users(metric):
            raise ValueError(
                f"{path}={metric!r} has a confidence, which is told from what each user adds to a "
                "metric, and nobody adds to this one by himself: name an hr, an ndcg or mrr, or "
                "leave confidence out"
            )
        if limit.max_drop is None or metric not in known:
            _require(path, metric, known, validation)
        elif metric not in validation:
            raise ValueError(
                f"{path}={metric!r} has a max_drop, which is relative to validation before "
                "alignment, and no validation measures it: give it min or max instead"
            )


def _is_of_users(metric: str) -> bool:
    """Whether it is a mean over users, as ranking metrics of items are."""
    return metric.startswith(("hr@", "ndcg@", "mrr")) and not metric.endswith("/id")


def _check_divergence(
    config: DivergenceConfig, training: Sequence[str], validation: Sequence[str], validations: float
) -> None:
    """`validations`: how many there are after the start."""
    path = "alignment.guardrails.divergence"
    _require(f"{path}.reward", config.reward, training, validation)
    _require(f"{path}.metric", config.metric, validation, validation)
    if config.validations > validations:
        raise ValueError(
            f"{path}.validations={config.validations} can never be reached: there are "
            f"{validations} after the start; lower it, raise alignment.epochs, lower "
            "alignment.validation.every_epochs, or set alignment.validation.every_steps"
        )


def _require(path: str, metric: str, allowed: Sequence[str], validation: Sequence[str]) -> None:
    if metric not in allowed:
        told = _refusal(path, metric, allowed)
        none = "; alignment.validation=null: validation measures nothing"
        raise ValueError(told if validation else told + none)


def _refusal(path: str, metric: str, allowed: Sequence[str]) -> str:
    """A sentence with the nearest spelling and what there is, the groups left out."""
    guess = closest(metric, allowed)
    plain = [
        name for name in dict.fromkeys(allowed) if not name.removesuffix("/id").endswith(GROUPS[1:])
    ]
    told = "" if guess is None else f" (did you mean {guess}?)"
    told += ", which needs alignment.rule" if metric == "preference_accuracy" else ""
    return f"{path}={metric!r} is not measured{told}; allowed: {plain}"
