"""What an evaluation leaves behind: `results.json` and `recommendations.json`, typed.

Numbers are comparable only under one protocol; `compare` refuses anything else.
"""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeVar

from pydantic import Field, FiniteFloat, NonNegativeInt, ValidationError, model_validator

from configs.base import Config
from configs.guardrails import Action
from configs.objectives import MultiTaskConfig
from configs.recipe import Recipe
from configs.redaction import redacted
from configs.storage import fingerprint, read_sealed, write_sealed
from trainer.monitor.reward_report import reward_layout

RESULTS_FILE = "results.json"
RECOMMENDATIONS_FILE = "recommendations.json"
PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "ray", "pyarrow")
MODEL_ORDER = ("popularity", "pretrained", "aligned")
TARGETS = ("head", "tail", "cold")
Part = Literal["validation", "test"]
Metrics = dict[str, FiniteFloat]
C = TypeVar("C", bound=Config)


class Protocol(Config):
    """What was asked of the models. Equal fingerprints mean: the same task on the same data."""

    data: str
    """Fingerprint of the prepared data set's manifest."""
    split: dict[str, Any]
    filter_seen: bool
    candidates: Literal["full catalogue", "logged events"] = "full catalogue"
    candidates_per_request: int | None = Field(default=None, exclude_if=lambda n: n is None)
    """Events that shared a request and its history, where those were the candidates."""
    head_share: float
    ks: tuple[int, ...]
    """Cut-offs that were measured; not in the fingerprint, since each stands for itself."""
    fingerprint: str

    @model_validator(mode="after")
    def _fingerprint_is_its_own(self) -> "Protocol":
        if self.fingerprint != fingerprint(_identity(self.model_dump(mode="json"))):
            raise ValueError(
                f"protocol.fingerprint {self.fingerprint[:12]} does not belong to the protocol it "
                "stands beside: the file was edited; run `tandem evaluate` again"
            )
        return self


def protocol(recipe: Recipe, data_fingerprint: str) -> dict[str, Any]:
    """The `protocol` block of `results.json`, JSON-able, with its fingerprint.

    Args:
        recipe: says how the data are split and what is measured.
        data_fingerprint: `fingerprint` of the prepared data set's manifest.
    """
    fields: dict[str, Any] = {
        "data": data_fingerprint,
        "split": recipe.data.split.model_dump(mode="json"),
        "filter_seen": recipe.evaluation.filter_seen,
        "candidates": "logged events" if recipe.ranks_candidates else "full catalogue",
        "head_share": recipe.evaluation.head_share,
    }
    if isinstance(recipe.objective, MultiTaskConfig):
        fields["candidates_per_request"] = recipe.objective.candidates
    fields["fingerprint"] = fingerprint(_identity(fields))
    fields["ks"] = sorted(set(recipe.evaluation.ks))
    return Protocol.model_validate(fields).model_dump(mode="json")


def _identity(protocol: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in protocol.items() if k not in ("ks", "fingerprint")}


class ModelResult(Config):
    """Numbers of one model; a part that was not measured is null."""

    validation: Metrics | None = None
    test: Metrics | None = None
    preference_accuracy: FiniteFloat | None = None
    """Share of held-out preference pairs whose winner scores above its loser."""
    calibration: dict[str, tuple[tuple[FiniteFloat, FiniteFloat, FiniteFloat], ...]] | None = Field(
        default=None, exclude_if=lambda curves: curves is None
    )
    """Of a reward model on test: label → (mean probability, share with it, events) of bins."""
    checkpoint: str | None = None
    """Hash of the checkpoint that was measured."""


class OutcomeCounts(Config):
    """What a rule says of events."""

    liked: NonNegativeInt
    disliked: NonNegativeInt
    neither: NonNegativeInt


class PreferenceCounts(OutcomeCounts):
    """Preference pairs of the alignment stage, and what their rule says of training events."""

    pairs: NonNegativeInt
    validation_pairs: NonNegativeInt
    candidates: NonNegativeInt
    """A winner and one loser that the rule allows; `rule.pairs_per_user` limits what is kept."""
    users: NonNegativeInt
    """Users with a pair."""


class AlarmRecord(Config):
    """A guardrail that alignment broke."""

    step: NonNegativeInt
    action: Action
    reason: str


class SelectedPolicy(Config):
    """Which policy of the alignment stage was measured as `aligned`."""

    step: NonNegativeInt
    """0 is the policy that alignment began with: none that it made kept the guardrails."""
    selected_on: Literal["validation", "guardrails", "last step"]


class Results(Config):
    """Content of `results.json`."""

    name: str
    seed: int
    protocol: Protocol
    recipe: dict[str, Any]
    """The resolved recipe."""
    versions: dict[str, str]
    models: dict[str, ModelResult]
    """`popularity`, `pretrained`, `aligned`, or other names."""
    preferences: PreferenceCounts | None = None
    impressions: OutcomeCounts | None = Field(
        default=None, exclude_if=lambda counts: counts is None
    )
    """Those of the log that alignment learns from; null where it learns from none."""
    alarms: tuple[AlarmRecord, ...] = ()
    """Of the alignment stage's guardrails."""
    selected: SelectedPolicy | None = None
    """Null without alignment, and in files of before it was kept."""
    semantic_ids: str | None = None
    """Fingerprint of the item → semantic id table, where items have semantic ids."""

    def ordered_models(self) -> tuple[str, ...]:
        """Model names: the usual three in their order, then the others by name."""
        known = [name for name in MODEL_ORDER if name in self.models]
        return (*known, *sorted(set(self.models) - set(known)))

    def metrics(self, model: str, part: Part) -> Metrics:
        """Numbers of a model on a part, and its preference accuracy; empty if not measured."""
        result = self.models[model]
        measured = result.test if part == "test" else result.validation
        if measured is None or result.preference_accuracy is None:
            return measured or {}
        return {**measured, "preference_accuracy": result.preference_accuracy}


def library_versions() -> dict[str, str]:
    """Python's and the stack's versions as installed here; what is absent is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_results(
    url: str,
    recipe: Recipe,
    measured: Mapping[str, Any],
    aligned: Mapping[str, Any] | None,
) -> Results:
    """Write `results.json`, whole or not at all.

    Args:
        url: of the file.
        recipe: the resolved recipe.
        measured: what the evaluation answered: `models`, `protocol` and `semantic_ids`.
        aligned: outputs of the align stage, if there was one: `pairs` with what `PreferenceCounts`
            says of them (or null), `impressions` with `OutcomeCounts` (or null; absent in records
            of before they were counted), `alarms`, the guardrails that it broke, and its
            `checkpoint`, with what that was `selected_on`.
    """
    outputs = {"pairs": None, "impressions": None, "alarms": [], **(aligned or {})}
    results = Results(
        name=recipe.name,
        seed=recipe.seed,
        protocol=measured["protocol"],
        recipe=redacted(recipe.model_dump(mode="json")),
        versions=library_versions(),
        models=measured["models"],
        preferences=_counts(PreferenceCounts, outputs["pairs"]),
        impressions=_counts(OutcomeCounts, outputs["impressions"]),
        alarms=tuple(AlarmRecord.model_validate(alarm) for alarm in outputs["alarms"]),
        selected=None if aligned is None else _selected(aligned),
        semantic_ids=measured["semantic_ids"],
    )
    write_sealed(url, results.model_dump(mode="json"))
    return results


def _selected(aligned: Mapping[str, Any]) -> SelectedPolicy:
    step, selected_on = aligned["checkpoint"]["step"], aligned["selected_on"]
    return SelectedPolicy(step=step, selected_on=selected_on)


def _counts(kind: type[C], stage: Mapping[str, Any] | None) -> C | None:
    """Those of what a stage told."""
    return None if stage is None else kind(**{name: stage[name] for name in kind.model_fields})


def read_results(url: str) -> Results:
    """Read `results.json`; a damaged or foreign one raises ValueError that names it."""
    return _parsed(Results, url)


class UserRecommendations(Config):
    """What one user is offered; `items`, `titles` and `scores` are parallel, best first."""

    user: str
    history: tuple[str, ...]
    """Titles of the last events, oldest first."""
    items: tuple[str, ...]
    """Raw ids."""
    titles: tuple[str, ...]
    """Empty where the catalogue has none."""
    scores: tuple[FiniteFloat, ...]

    @model_validator(mode="after")
    def _columns_are_parallel(self) -> "UserRecommendations":
        if not len(self.items) == len(self.titles) == len(self.scores):
            raise ValueError(f"items, titles and scores of user {self.user!r} differ in number")
        return self

    def newest(self) -> tuple[str, ...]:
        """Titles of the last events, newest first."""
        return tuple(title or "(no title)" for title in reversed(self.history))

    def offers(self) -> tuple[tuple[str, float], ...]:
        """What to call each recommended item (its title, or its id), and its score."""
        labels = [
            title or f"item {item}" for item, title in zip(self.items, self.titles, strict=True)
        ]
        return tuple(zip(labels, self.scores, strict=True))


class Recommendations(Config):
    """Content of `recommendations.json`."""

    users: tuple[UserRecommendations, ...]


def read_recommendations(url: str) -> Recommendations:
    """Read `recommendations.json`; a damaged or foreign one raises ValueError that names it."""
    return _parsed(Recommendations, url)


def _parsed(kind: type[C], url: str) -> C:
    try:
        return kind.model_validate(read_sealed(url))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the top"
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{url} is damaged or foreign at {place}: {reason}") from error


class Change(Config):
    """A metric of one model in two results."""

    model: str
    metric: str
    before: float
    after: float

    @property
    def delta(self) -> float:
        """after − before."""
        return self.after - self.before


def compare(before: Results, after: Results, part: Part = "test") -> tuple[Change, ...]:
    """Changes of every metric that both results have for a model of the same name.

    Raises:
        ValueError: the results were measured under different protocols, or share no number.
    """
    if before.protocol.fingerprint != after.protocol.fingerprint:
        old, new = (_identity(r.protocol.model_dump(mode="json")) for r in (before, after))
        differing = ", ".join(
            f"{k} ({_short(old[k])} against {_short(new[k])})" for k in old if old[k] != new[k]
        )
        raise ValueError(
            f"cannot compare {before.name!r} with {after.name!r}: their protocols differ in "
            f"{differing}, so the numbers answer different questions; evaluate both under one"
        )
    changes = tuple(
        Change(model=model, metric=metric, before=value, after=after.metrics(model, part)[metric])
        for model in before.ordered_models()
        if model in after.models
        for metric, value in before.metrics(model, part).items()
        if metric in after.metrics(model, part) and not metric.startswith("users")
    )
    if not changes:
        raise ValueError(
            f"{before.name!r} and {after.name!r} have no {part} metric of a model in common"
        )
    return changes


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"


class TableRow(Config):
    """One metric over the models, and what alignment did to it."""

    group: str
    """Heading it belongs under."""
    label: str
    metric: str
    values: dict[str, float | None]
    """Model → number; None where it was not measured."""
    delta: float | None
    """aligned − pretrained; None where either is missing."""

    @property
    def relative(self) -> float | None:
        """The delta as a share of the pretrained number."""
        base = self.values.get("pretrained")
        return None if self.delta is None or not base else self.delta / abs(base)


def table_rows(results: Results, part: Part) -> tuple[TableRow, ...]:
    """The results table, in reading order; the split by popularity at the cut-off nearest to 10."""
    metrics = {name: results.metrics(name, part) for name in results.ordered_models()}
    measured = {metric for values in metrics.values() for metric in values}
    ks = results.protocol.ks
    near = min(ks, key=lambda k: abs(k - 10))
    split = [
        (f"{m.upper()}@{near} {g}", f"{m}@{near}/{g}") for m in ("hr", "ndcg") for g in TARGETS
    ]
    liked = [(f"{m.upper()}@{k} of liked", f"{m}@{k}/liked") for m in ("hr", "ndcg") for k in ks]
    by_id = [(f"{m.upper()}@{k} of ids", f"{m}@{k}/id") for m in ("hr", "ndcg") for k in ks]
    by_id += [("MRR of ids", "mrr/id")]
    by_id += [(f"{label} of ids", f"{metric}/id") for label, metric in split]
    layout = [
        ("Hit rate", [(f"HR@{k}", f"hr@{k}") for k in ks]),
        ("Ranking", [*((f"NDCG@{k}", f"ndcg@{k}") for k in ks), ("MRR", "mrr")]),
        ("Popular and rare targets", split),
        ("Semantic ids", [*by_id, ("Legal ids", "legality")]),
        ("Catalogue coverage", [(f"Coverage@{k}", f"coverage@{k}") for k in ks]),
        ("Held-out preferences", [("Pairs ranked right", "preference_accuracy"), *liked]),
    ]
    layout += reward_layout(measured)
    return tuple(
        _row(group, label, metric, metrics)
        for group, entries in layout
        for label, metric in entries
        if metric in measured
    )


def _row(group: str, label: str, metric: str, metrics: Mapping[str, Metrics]) -> TableRow:
    values = {model: numbers.get(metric) for model, numbers in metrics.items()}
    before, after = values.get("pretrained"), values.get("aligned")
    delta = None if before is None or after is None else after - before
    return TableRow(group=group, label=label, metric=metric, values=values, delta=delta)
