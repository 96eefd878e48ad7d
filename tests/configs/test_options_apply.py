"""Options that a model or a format has no use for are refused with the mend, not ignored."""

from pathlib import Path

import pytest

from configs.load import RecipeError, load_recipe

BASE = """\
name: base
output: out
data:
  source: {kind: public, name: ml-100k}
  loader: {max_length: 50}
model: {kind: hstu}
"""
DECODER = (
    "tokenizer={embeddings: [{kind: text}]}",
    "objective={kind: next_code}",
    "generation.beams=200",
)
LIFELONG = "model={kind: onerec, lifelong: {history: 2000}}"
PARQUET = "tokenizer={embeddings: [{kind: vectors, url: v, first_id: 1}]}"
NPY = "tokenizer={embeddings: [{kind: vectors, url: v, format: npy, item: sku}]}"
UNUSED_DECAY = "tokenizer.quantizer={kind: rq_vae, dead_code_threshold: 0, usage_decay: 0.5}"
PLAIN_LOG = "data.source={kind: csv, url: log.csv, columns: {user: u, item: i, timestamp: t}}"
VECTORS = "tokenizer={embeddings: [{kind: vectors, url: v}]}"
ACTIONS = "model={kind: onerec, positive_history: 9, positive_actions: [like]}"
ACTED = "data.source.columns.action=a"
RANKING = (
    "model={kind: hstu_ranking}",
    "objective={kind: multi_task, tasks: [{kind: label, label: like}]}",
)
LABELLED = f"{PLAIN_LOG[:-2]}, labels: {{like: l}}}}}}"
ITEM_LOG = f"{PLAIN_LOG[:-1]}, item_text: {{url: x, features: [kind, day]}}}}"
BY_AUC = "training.validation.metric=auc"
RATED = "data.source.columns.rating=r"
TABLE = "tokenizer={embeddings: [{kind: text, table: {url: t, separator: ;}}]}"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (
            ["objective={kind: sampled_softmax, in_batch_negatives: 64}"],
            "negatives='uniform' draws none of in_batch_negatives=64",
        ),
        (
            [
                "objective={kind: sampled_softmax, negatives: in_batch, shared: batch, "
                "num_negatives: 64}"
            ],
            "negatives='in_batch' draws none of num_negatives=64",
        ),
        (["recommend={users: [a], num_users: 9}"], "num_users=9 is for the first ones"),
        (["generation.beams=77"], "model.kind='hstu' scores every item"),
        ([*DECODER, "model={kind: tiger, history: 200}"], "model.history=200 events are never"),
        ([*DECODER, LIFELONG], "model.lifelong.history=2000 events are never delivered"),
        ([*DECODER, "model={kind: onerec, positive_from: 3.0}"], "positive_history reads, which"),
        (
            [*DECODER, "model={kind: hstu_decoder}", "objective.windows_per_user=2"],
            "windows_per_user=2 cuts windows",
        ),
        (
            [*DECODER, "model={kind: tiger}", "tables.std=0.5"],
            "tables.std is of embedding tables; model.kind='tiger' has none",
        ),
        (
            [*DECODER, "model={kind: tiger}", "evaluation.catalogue_chunk=100"],
            "catalogue_chunk is for models that score every item",
        ),
        (
            [*DECODER[1:], "model={kind: tiger}", PARQUET],
            "first_id=1 numbers the rows of format: npy",
        ),
        ([*DECODER[1:], "model={kind: tiger}", NPY], "item and vector name columns of Parquet"),
        ([*DECODER[1:], "model={kind: tiger}", TABLE], "separator and quoted_newlines are of CSV"),
        ([DECODER[0]], "model.kind='hstu' reads no semantic ids: set tokenizer to null"),
        ([*DECODER, "model={kind: lazy_decoder, dense_layers: 3}"], "dense_layers=3 says which"),
        (
            [*DECODER, "model={kind: tiger}", UNUSED_DECAY],
            "usage_decay says how dead codes are told",
        ),
        (
            [*DECODER[1:], VECTORS, ACTIONS, PLAIN_LOG],
            "model.positive_actions reads it, but the events have not an action",
        ),
        (
            [*DECODER[1:], VECTORS, f"{ACTIONS[:-1]}, positive_from: 2.5}}", PLAIN_LOG, ACTED],
            "model.positive_from reads it, but the events have not a rating",
        ),
        ([*DECODER[1:], VECTORS, ACTIONS, PLAIN_LOG, ACTED], None),
        ([*RANKING, VECTORS], "model.kind='hstu_ranking' reads no semantic ids"),
        (
            [*DECODER[1:], VECTORS, "model={kind: onerec, positive_history: 9}", PLAIN_LOG],
            "model.positive_history reads it, but the events have not a rating, nor an action that",
        ),
        (
            [*DECODER[1:], VECTORS, "model={kind: onerec, positive_history: 9}", PLAIN_LOG, RATED],
            None,
        ),
        ([*DECODER, "model={kind: tiger}", "objective.windows_per_user=2"], None),
        ([*DECODER, "model={kind: tiger}", "sharding.optimizer.lr=1"], "tiger' has none: remove"),
        ([*DECODER, "model={kind: tiger}", "sharding.hbm_gb=1"], "sharding.hbm_gb is of embedding"),
        ([*DECODER, "model={kind: tiger, item_table: true}", "sharding.optimizer.lr=1"], None),
        (["sharding={default: replicated, optimizer: {lr: 1}}"], None),
        ([*RANKING, LABELLED, "evaluation.ks=[1, 5]"], "evaluation.ks is of rankings of the"),
        ([*RANKING, LABELLED, "evaluation.filter_seen=false"], "evaluation.filter_seen is of"),
        ([*RANKING, LABELLED, "evaluation.head_share=0.5"], "evaluation.head_share is of"),
        ([*RANKING, LABELLED, "evaluation.catalogue_chunk=9"], "evaluation.catalogue_chunk is"),
        ([*RANKING, LABELLED, "recommend.top_k=3"], "recommends nothing: remove recommend"),
        ([*RANKING, LABELLED, BY_AUC, "evaluation.users_per_batch=9"], None),
        (["recommend.allow={feature: kind, values: [a]}"], "allow.0.feature='kind' is none of"),
        ([ITEM_LOG, "recommend.allow={feature: dya, since: 3}"], "features ['kind', 'day']: name"),
        ([ITEM_LOG, "recommend.allow={feature: day}"], "needs either values, or since and before"),
        (
            [ITEM_LOG, "recommend.allow={feature: day, values: [a], since: 3}"],
            "needs either values, or since and before",
        ),
        (
            [ITEM_LOG, "recommend.allow={feature: day, since: 2020-01-01, before: 3}"],
            "must both be numbers, or both ISO dates",
        ),
        ([ITEM_LOG, "recommend.allow={feature: day, since: soon}"], "'soon' is not an ISO date"),
        (
            [ITEM_LOG, "recommend.allow={feature: day, since: 3, before: 3}"],
            "before=3.0 must lie after since=3.0",
        ),
        (
            [ITEM_LOG, "recommend={users: [ann], allow_for: {anne: []}}"],
            "allow_for.anne is of a user that `users` does not name; did you mean 'ann'?",
        ),
        (
            [ITEM_LOG, "recommend={users: [a], allow_for: {a: {feature: k, values: [x]}}}"],
            "recommend.allow_for.a.0.feature='k' is none of",
        ),
        (
            [
                ITEM_LOG,
                "recommend={users: [a, b], allow: {feature: kind, values: [x]}, allow_for: "
                "{a: [{feature: day, since: 2020-01-01, before: 2021-01-01}], b: []}}",
            ],
            None,
        ),
        ([*DECODER, LIFELONG, "data.loader.max_length=2000"], None),
    ],
)
def test_what_does_not_apply(tmp_path: Path, overrides: list[str], part: str | None) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    if part is None:
        load_recipe(str(tmp_path / "base.yaml"), overrides)
        return
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(tmp_path / "base.yaml"), overrides)
    assert part in str(caught.value)
