"""Sentences beside the results: how far chance goes, and what guardrails said."""

import math
from itertools import groupby

from configs.guardrails import Action
from configs.measured import LEFT_OUT
from trainer.guardrails import SEVERITY
from trainer.monitor.results import Part, Results

ALARM_FOLLOWS: dict[Action, str] = {
    "warn": "alignment went on",
    "roll_back": "alignment returned to the last policy that kept the limits",
    "stop": "alignment stopped",
}


def alarm_sentences(results: Results) -> tuple[str, ...]:
    """What guardrails said of alignment, a sentence for each step at which they spoke, and whether
    they left nothing of it."""
    told = []
    for step, together in groupby(results.alarms, key=lambda alarm: alarm.step):
        alarms = list(together)
        reasons = "; ".join(alarm.reason for alarm in alarms)
        action = max((alarm.action for alarm in alarms), key=SEVERITY.__getitem__)
        told.append(f"Guardrail at step {step:,}: {reasons}; {ALARM_FOLLOWS[action]}.")
    nothing = nothing_kept(results)
    return (*told, *([nothing] if nothing else []))


def nothing_kept(results: Results) -> str | None:
    """A sentence where `aligned` is the policy that alignment began with."""
    if results.selected is None or results.selected.step > 0:
        return None
    return "No aligned policy is known to keep the limits: 'aligned' is the pretrained one."


def sampling_note(results: Results, part: Part) -> str | None:
    """How far a model's shares may be off by the choice of users and pairs alone, and who is left
    out of them."""
    sentences = (_chance(results, part), _left_out(results, part))
    return " ".join(told for told in sentences if told) or None


def _left_out(results: Results, part: Part) -> str | None:
    """By `failures.poisoned_sample`, of the model that misses most."""
    each = (results.metrics(model, part).get(LEFT_OUT, 0) for model in results.ordered_models())
    most = max(each, default=0)
    if not most:
        return None
    return (
        f"{most:,.0f} users are left out of these numbers, as what the data hold of them cannot be "
        "used (failures.poisoned_sample.action=skip)."
    )


def _chance(results: Results, part: Part) -> str | None:
    errors = [_hit_rate_error(results, part), _preference_error(results)]
    known = [error for error in errors if error is not None]
    if not known:
        return None
    told = f"One standard error is about {' and '.join(known)}"
    told += "; smaller differences between models may be chance."
    if _chosen_by_pairs(results):
        told += " The pairs ranked right chose the aligned epoch as well: no test of it."
    return told


def _chosen_by_pairs(results: Results) -> bool:
    validation = (results.recipe.get("alignment") or {}).get("validation") or {}
    return bool(validation.get("metric") == "preference_accuracy")


def _hit_rate_error(results: Results, part: Part) -> str | None:
    for model in reversed(results.ordered_models()):
        metrics = results.metrics(model, part)
        share, users = metrics.get("hr@10"), metrics.get("users")
        if share is not None and users:
            return f"{_binomial_error(share, users):.4f} for HR@10 ({users:,.0f} users)"
    return None


def _preference_error(results: Results) -> str | None:
    pairs = 0 if results.preferences is None else results.preferences.validation_pairs
    for model in reversed(results.ordered_models()):
        share = results.models[model].preference_accuracy
        if share is not None and pairs:
            # Pairs of one user are alike, so that the true error is rather larger than smaller.
            error = _binomial_error(share, pairs)
            return f"{error:.4f} or more for pairs ranked right ({pairs:,} pairs)"
    return None


def _binomial_error(share: float, trials: float) -> float:
    return math.sqrt(share * (1 - share) / trials)
