"""results.json: typed, fingerprinted, and comparable only under one protocol."""

import pytest

from configs.storage import read_json, write_bytes, write_json
from tests.trainer.monitor.invented import metrics, recipe, recommendations, results
from trainer.monitor.notes import alarm_sentences, sampling_note
from trainer.monitor.results import (
    AlarmRecord,
    ModelResult,
    Results,
    SelectedPolicy,
    compare,
    library_versions,
    protocol,
    read_recommendations,
    read_results,
    table_rows,
    write_results,
)
from trainer.monitor.terminal import render_table

URL = "memory://results-test/results.json"


def evaluated(**evaluation: object) -> Results:
    return results(protocol=protocol(recipe(evaluation=evaluation), "d" * 64))


def test_written_results_read_back_whole() -> None:
    chosen = recipe(seed=3)
    measured = {
        "models": {
            "popularity": {"validation": metrics(0.06, 0.03, 0.02), "test": None},
            "pretrained": {
                "validation": metrics(0.2, 0.5, 0.5),
                "test": metrics(0.19, 0.5, 0.5),
                "preference_accuracy": 0.6,
                "checkpoint": "c" * 64,
            },
        },
        "protocol": protocol(chosen, "d" * 64),
        "semantic_ids": "e" * 64,
    }
    counts = {"pairs": 9, "validation_pairs": 1, "candidates": 20, "users": 4}
    counts |= {"liked": 30, "disliked": 5, "neither": 2}
    aligned = {"pairs": {"url": "memory://pairs", **counts}, "impressions": None, "alarms": []}
    aligned |= {"checkpoint": {"step": 6, "hash": "f" * 64}, "selected_on": "validation"}
    assert write_results(URL, chosen, measured, aligned) == read_results(URL)
    assert "impressions" not in read_json(URL)
    said = {"liked": 7, "disliked": 0, "neither": 3}
    alarm = {"step": 4, "action": "warn", "reason": "low"}
    written = write_results(
        URL, chosen, measured, aligned | {"impressions": said, "alarms": [alarm]}
    )
    assert read_results(URL) == written
    stored = read_json(URL)
    assert stored["impressions"] == said and stored["alarms"] == [alarm]
    assert stored["selected"] == {"step": 6, "selected_on": "validation"}
    assert stored["seed"] == 3 and stored["preferences"] == counts
    assert stored["models"]["pretrained"] == measured["models"]["pretrained"]
    assert stored["semantic_ids"] == "e" * 64
    assert {"python", "torch", "ray"} <= stored["versions"].keys()


def test_the_fingerprint_covers_what_was_asked_and_nothing_else() -> None:
    base = protocol(recipe(), "d" * 64)["fingerprint"]
    same = [
        protocol(recipe(seed=5, model={"kind": "sasrec"}), "d" * 64),
        protocol(recipe(evaluation={"ks": [10], "users_per_batch": 8}), "d" * 64),
    ]
    other = [
        protocol(recipe(), "e" * 64),
        protocol(recipe(evaluation={"filter_seen": False}), "d" * 64),
        protocol(recipe(evaluation={"head_share": 0.1}), "d" * 64),
    ]
    assert {p["fingerprint"] for p in same} == {base}
    assert len({base, *(p["fingerprint"] for p in other)}) == 4


def test_an_edited_protocol_is_noticed() -> None:
    content = results().model_dump(mode="json")
    content["protocol"]["filter_seen"] = False
    write_json(URL, content)
    with pytest.raises(
        ValueError, match=r"results\.json is damaged or foreign at protocol: .*was edited"
    ):
        read_results(URL)


@pytest.mark.parametrize("damage", [b'{"name": "tr', b"{}", b"[1]"])
def test_a_damaged_file_is_named(damage: bytes) -> None:
    write_bytes(URL, damage)
    with pytest.raises(ValueError, match=r"results\.json"):
        read_results(URL)


def test_a_metric_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        ModelResult(test={"mrr": float("nan")})


def test_comparing_across_protocols_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"differ in filter_seen \(True against False\)"):
        compare(evaluated(), evaluated(filter_seen=False))


def test_comparing_reports_what_both_have() -> None:
    models = {"pretrained": ModelResult(test={"mrr": 0.2, "users": 5.0, "hr@1": 0.1})}
    after = {"pretrained": ModelResult(test={"mrr": 0.15, "users": 5.0}), "other": ModelResult()}
    (change,) = compare(results(models=models), results(models=after))
    assert (change.model, change.metric) == ("pretrained", "mrr")
    assert change.delta == pytest.approx(-0.05)
    with pytest.raises(ValueError, match="no validation metric"):
        compare(results(models=models), results(models=after), "validation")


def test_table_rows_hold_signed_changes() -> None:
    rows = {row.metric: row for row in table_rows(results(), "test")}
    assert rows["hr@10"].delta == pytest.approx(0.005)
    assert rows["hr@10/tail"].delta is not None and rows["hr@10/tail"].delta < 0
    assert rows["coverage@10"].relative == pytest.approx(-0.03 / 0.51)
    assert rows["preference_accuracy"].values["popularity"] is None
    assert "users" not in rows and "mrr/head" not in rows


def test_without_alignment_nothing_has_changed() -> None:
    models = {name: m for name, m in results().models.items() if name != "aligned"}
    rows = table_rows(results(models=models), "test")
    assert rows and all(row.delta is None and row.relative is None for row in rows)


def test_the_note_gives_the_binomial_standard_error() -> None:
    hits = ModelResult(test={"hr@10": 0.5, "users": 2500.0})
    note = sampling_note(results(models={"pretrained": hits}), "test") or ""
    assert "0.0100 for HR@10 (2,500 users);" in note and "pairs" not in note
    counts = results().preferences
    assert counts is not None
    counts = counts.model_copy(update={"validation_pairs": 400})
    both = {"pretrained": hits, "aligned": ModelResult(preference_accuracy=0.8)}
    note = sampling_note(results(models=both, preferences=counts), "test") or ""
    assert "HR@10 (2,500 users) and 0.0200 or more for pairs ranked right (400 pairs);" in note
    assert sampling_note(results(models=both, preferences=None), "validation") is None
    fewer = ModelResult(validation={"users": 8.0, "users_left_out": 2.0})
    note = sampling_note(results(models={"pretrained": fewer}), "validation") or ""
    assert note.startswith("2 users are left out of these numbers")
    assert sampling_note(results(models={"pretrained": ModelResult()}), "test") is None


def test_the_note_says_where_pairs_were_selected_on() -> None:
    chosen = results()
    alignment = {"kind": "dpo", "validation": {"metric": "preference_accuracy"}}
    chosen = chosen.model_copy(update={"recipe": chosen.recipe | {"alignment": alignment}})
    assert "no test of it" in (sampling_note(chosen, "test") or "")
    assert "no test of it" not in (sampling_note(results(), "test") or "")


def test_alarms_are_sentences() -> None:
    alarm = AlarmRecord(step=1200, action="roll_back", reason="hr@50 fell")
    told = alarm_sentences(results().model_copy(update={"alarms": (alarm,)}))
    returned = "alignment returned to the last policy that kept the limits"
    assert told == (f"Guardrail at step 1,200: hr@50 fell; {returned}.",)
    assert told[0] in render_table(results().model_copy(update={"alarms": (alarm,)}))
    warned = AlarmRecord(step=1200, action="warn", reason="the reward may be hacked")
    later = AlarmRecord(step=1300, action="warn", reason="hr@50 fell")
    told = alarm_sentences(results().model_copy(update={"alarms": (alarm, warned, later)}))
    both = f"Guardrail at step 1,200: hr@50 fell; the reward may be hacked; {returned}."
    assert told == (both, "Guardrail at step 1,300: hr@50 fell; alignment went on.")


def test_the_pretrained_policy_is_not_passed_off_as_an_aligned_one() -> None:
    alarm = AlarmRecord(step=2, action="stop", reason="hr@50 fell")

    def selected(step: int) -> Results:
        policy = SelectedPolicy(step=step, selected_on="guardrails")
        return results().model_copy(update={"alarms": (alarm,), "selected": policy})

    nothing = "No aligned policy is known to keep the limits: 'aligned' is the pretrained one."
    assert alarm_sentences(selected(0))[1:] == (nothing,)
    assert render_table(selected(0)).endswith(nothing)
    assert len(alarm_sentences(selected(6))) == 1 and nothing not in render_table(selected(6))


def test_recommendations_are_checked_and_named() -> None:
    url = "memory://results-test/recommendations.json"
    content = recommendations().model_dump(mode="json")
    write_json(url, content)
    user = read_recommendations(url).users[0]
    assert user.newest()[0].endswith("seen 5") and user.offers()[0] == ("Invented film 1", 0.899)
    content["users"][0]["titles"].pop()
    write_json(url, content)
    with pytest.raises(ValueError, match="differ in number"):
        read_recommendations(url)


def test_versions_name_python_and_the_stack() -> None:
    assert library_versions()["python"].startswith("3.")
