"""What a recipe of online alignment may not say, and what it says by default."""

from typing import Any

import pytest
from pydantic import ValidationError

from configs.alignment import GBPOConfig, GRPOConfig, rewards_of
from configs.recipe import Recipe

SKIPS = {"skip_is_disliked": True}
ALONE = {"alone": True, "rule": {"kind": "rating"}}


def recipe(alignment: dict[str, Any], **blocks: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "output": "unused",
            "data": {"source": {"kind": "csv", "url": "x", "columns": {"rating": "r"}}},
            "model": {"kind": "sasrec", "width": 8},
            "alignment": alignment,
            "cluster": {"num_workers": 2},
        }
        | blocks
    )


def test_defaults_need_no_preferences() -> None:
    found = recipe({"kind": "grpo"}).alignment
    assert isinstance(found, GRPOConfig)
    assert found.rule is None and found.clip_low == 0.2 and found.clip_high == 0.28
    assert [reward.kind for reward in found.rewards] == ["hit"]
    assert found.generation.kind == "ancestral"


def limit(**fields: Any) -> dict[str, Any]:
    return {"guardrails": {"limits": [{"metric": "hr@50", "max_drop": 0.01}, fields]}}


DROP = {"metric": "preference_accuracy", "max_drop": 0.01}
DIVERGENCE: dict[str, Any] = {"guardrails": {"divergence": {}}}


@pytest.mark.parametrize(
    ("alignment", "sentence"),
    [
        ({"kind": "dpo"} | limit(metric="hr@50", min=0.1) | DIVERGENCE, "divergence.reward='rewa"),
        (
            {"kind": "grpo"} | limit(metric="hr@5O", max_drop=0.1),
            r"limits.1.metric='hr@5O' is not "
            r"measured \(did you mean hr@5\?\); allowed: \['hr@1', ",
        ),
        (
            {"kind": "grpo", "validation": None} | limit(**DROP),
            "limits.0.metric='hr@50' is not me"
            "asured; allowed.*; alignment.validation=null: validation measures nothing",
        ),
        (
            {"kind": "grpo"} | limit(**DROP),
            "limits.1.metric=.* measured, which needs alignment.rule",
        ),
        ({"kind": "grpo", "reference": None} | limit(metric="kl", max=1), "'kl' is not measured"),
        ({"kind": "grpo"} | limit(metric="kl", max_drop=0.1), "'kl' has a max_drop, which is rela"),
        ({"kind": "grpo"} | limit(metric="mrr", min=0.1, confidence=0.9), "selected by its max_dr"),
        (
            {"kind": "grpo"} | limit(metric="mrr", max_drop=0, confidence=0.9, action="warn"),
            "the action roll_back or stop",
        ),
        (
            {"kind": "grpo"} | limit(metric="coverage@10", max_drop=0, confidence=0.9),
            "limits.1.metric='coverage@10' has a confidence, which is told from what each user",
        ),
        (
            {"kind": "grpo", "epochs": 1} | DIVERGENCE,
            "validations=2 can never be reached: there are 1 after the start",
        ),
        ({"kind": "grpo", "guardrails": {"divergence": {"metric": "ndcg@7"}}}, "mean ndcg@"),
        ({"kind": "grpo", "kl": {"weight": 0.1}, "reference": None}, "needs a reference policy"),
        ({"kind": "grpo", "reference": {"mixing": 0.5}}, "mixing=0.5 is how far the reference mo"),
        (
            {"kind": "grpo", "advantages": {"scaling": "none", "epsilon": 0.1}},
            "epsilon is added to a std",
        ),
        ({"kind": "grpo", "prompts": {"per_step": 3}}, "prompts.per_step=3 must be a multiple"),
        ({"kind": "grpo", "rewards": [{"kind": "prefix"}]}, "scores items: use kind=hit"),
        ({"kind": "grpo", "rewards": [{"kind": "hit", "by": "id"}]}, r"rewards\.0\.by=id"),
        (
            {"kind": "grpo", "guardrails": {"limits": [{"metric": "kl", "min": 2, "max": 1}]}},
            "min=2 is above max=1",
        ),
        ({"kind": "grpo", "generation": {"kind": "ancestral", "top_p": 0.9}}, "set top_p to 1"),
        ({"kind": "grpo", "rewards": []}, "at least 1 item"),
        ({"kind": "grpo", "validation": {"metric": "preference_accuracy"}}, "is not measured"),
        ({"kind": "grpo", "delta": 0.1}, "delta"),
        ({"kind": "gbpo", "clip_high": 0.2}, "clip_high"),
        ({"kind": "gbpo", "logged": {"rule": {"kind": "watch_time"}}}, "columns.dwell"),
        (
            {"kind": "grpo", "rewards": [{"kind": "hit"}, {"kind": "quota", "feature": "kind"}]},
            "does not provide",
        ),
        ({"kind": "grpo", "rollout_actors": {}}, "needs 3 CPUs of the embedded Ray, which has"),
        ({"kind": "grpo", "rollout_actors": {"snapshot_every": 5}}, "more than max_staleness=4"),
        ({"kind": "gbpo", "logged": {"alone": True}}, "rule"),
        (
            {"kind": "gbpo", "logged": ALONE, "inner_epochs": 2, "kl": {"weight": 0.1}},
            "logged.alone=true generates nothing, which kl and inner_epochs would be for",
        ),
        ({"kind": "dpo", "rule": None}, "rule"),
        ({"kind": "grpo", "generation": {"kind": "ancestral", "samples": 1}}, "samples=1 makes gr"),
        ({"kind": "ipa", "generation": {"kind": "beam", "beams": 1}}, "beams=1 makes groups of"),
        ({"kind": "grpo", "rewards": [{"kind": "quota"}]}, "no term of a weight other than 0"),
        ({"kind": "ipa", "rewards": [{"kind": "hit", "weight": 0}]}, "no term of a weight other"),
        (
            {"kind": "gbpo", "logged": {"rule": {"kind": "labels", "liked": ["no"]} | SKIPS}},
            r"alignment\.logged\.rule names the labels \['no'\]",
        ),
        ({"kind": "grpo", "rule": {"kind": "labels", "liked": ["no"]} | SKIPS}, r"nt\.rule names"),
        ({"kind": "grpo", "rewards": [{"kind": "legality"}]}, "of legality alone are the same"),
        (
            {"kind": "ipa", "rewards": [{"kind": "legality"}, {"kind": "diversity"}]},
            "legality and diversity alone .* generation.kind='beam' makes",
        ),
    ],
)
def test_what_cannot_be(alignment: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        recipe(alignment)


@pytest.mark.parametrize(
    "alignment",
    [
        {"kind": "grpo", "rewards": [{"kind": "diversity"}]},
        {"kind": "grpo", "rewards": [{"kind": "legality"}, {"kind": "quota"}]},
        {"kind": "grpo", "rewards": [{"kind": "legality"}, {"kind": "rank"}]},
        {"kind": "grpo", "generation": {"kind": "ancestral", "samples": 2}},
    ],
)
def test_what_may_teach_is_allowed(alignment: dict[str, Any]) -> None:
    assert recipe(alignment).alignment is not None


@pytest.mark.parametrize(
    "metric", ["hr@50/tail", "coverage@10", "loss", "reward/hit_2", "kl", "preference_accuracy"]
)
def test_guardrails_may_watch_what_is_measured(metric: str) -> None:
    rewards = [{"kind": "hit"}, {"kind": "hit", "weight": 0.5}]
    alignment = {"kind": "grpo", "rule": {"kind": "rating"}, "rewards": rewards}
    assert recipe(alignment | limit(metric=metric, min=0) | {"epochs": 2})
    assert recipe(alignment | DIVERGENCE)


def test_what_generates_nothing_rates_nothing() -> None:
    alone = recipe({"kind": "gbpo", "logged": ALONE})
    assert rewards_of(alone.alignment) == ()
    assert rewards_of(recipe({"kind": "gbpo"}).alignment) != ()
    assert Recipe.model_validate(alone.model_dump(mode="json")) == alone  # as workers read it


def test_gbpos_own_rule() -> None:
    """The top quarter of a duration bucket is liked; only negative feedback is disliked."""
    rule = {"kind": "watch_time", "disliked_share": 0, "negative": ["hate"]}
    columns = {"dwell": "d", "duration": "e", "labels": {"hate": "h"}}
    source = {"kind": "csv", "url": "x", "columns": columns}
    found = recipe({"kind": "gbpo", "logged": {"rule": rule}}, data={"source": source}).alignment
    assert isinstance(found, GBPOConfig) and found.logged is not None
    assert found.logged.rule.kind == "watch_time"
