"""The watch's decisions, without a training loop."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.guardrails import DivergenceConfig, GuardrailsConfig, LimitConfig
from trainer.guardrails import Watch, WatchState, bounds, sentence, severest


def watch_of(**config: object) -> Watch:
    return Watch(GuardrailsConfig.model_validate(config), WatchState())


def test_a_hacked_reward_is_told_after_so_many_validations() -> None:
    watch = watch_of(divergence=DivergenceConfig(validations=2, action="stop"))
    watch.begin({"ndcg@10": 0.3})
    course = [(1.0, 0.32), (2.0, 0.31), (0.8, 0.30), (2.5, 0.31), (2.6, 0.30), (2.7, 0.29)]
    alarms = []
    for step, (reward, value) in enumerate(course):
        watch.logged(step, {"reward": reward - 0.1})
        watch.logged(step, {"reward": reward + 0.1})
        alarms.append(watch.judged(step, {"ndcg@10": value}))
    assert alarms[:5] == [[]] * 5  # the reward fell once in between, and the metric rose
    [alarm] = alarms[5]
    assert alarm.action == "stop"
    told = "in 5 validations reward rose from 1.0000 to 2.7000 while ndcg@10 fell from 0.3200 to"
    assert told in alarm.reason  # from the metric's peak


def test_noise_hides_no_slow_fall() -> None:
    """Real numbers of a policy that collapses: hardly two steps in a row go the same way."""
    watch = watch_of(divergence={"validations": 3, "action": "roll_back"}, window=1)
    course = [(2.3476, 0.1334), (2.3516, 0.1299), (2.3512, 0.1297), (2.3577, 0.1222)]
    course += [(2.356, 0.1237), (2.359, 0.119), (2.3561, 0.1168)]
    start = (2.347, 0.1408)
    watch.begin({"ndcg@10": start[1]})
    told = []
    for step, (reward, value) in enumerate(course):
        for each in (*([start[0]] if step == 0 else []), reward):
            watch.logged(step, {"reward": each})
        told.append(watch.judged(step, {"ndcg@10": value}))
        assert not watch.kept({"ndcg@10": value})
    assert [bool(alarms) for alarms in told] == [False, False, *[True] * 5]
    assert told[-1][-1].reason.endswith("ndcg@10 fell from 0.1408 to 0.1168")


def test_the_start_is_where_the_course_begins() -> None:
    """Its reward is that of the first steps: of a window's, and of half an interval's at most."""
    watch = watch_of(divergence=DivergenceConfig(validations=2, action="roll_back"), window=3)

    def interval(step: int, rewards: list[float], value: float) -> list[str]:
        for reward in rewards:
            assert not watch.logged(step, {"reward": reward})
        return [alarm.reason for alarm in watch.judged(step, {"ndcg@10": value})]

    watch.begin({"ndcg@10": 0.5})
    assert interval(10, [1.0, 1.2, 1.1, 2.0, 2.0, 2.0, 2.0], 0.4) == []
    [told] = interval(20, [3.0, 3.0], 0.3)
    assert "rose from 1.1000 to 3.0000 while ndcg@10 fell from 0.5000 to 0.3000" in told
    # After a roll-back it begins with the policy that was returned to.
    watch.rolled_back()
    assert interval(30, [1.5, 2.5], 0.49) == []
    [told] = interval(40, [3.0], 0.48)
    assert "rose from 1.5000 to 3.0000 while ndcg@10 fell from 0.5000 to 0.4800" in told


def test_nothing_of_a_hacked_course_is_kept() -> None:
    """In the trainer's order of calls; what a roll-back returns to is where the course began."""

    def kept(action: str, course: list[tuple[float, float]]) -> list[float]:
        """Metrics of the policies kept; the negative of what was returned to."""
        watch = watch_of(divergence={"validations": 2, "action": action})
        watch.begin({"ndcg@10": 0.5})
        found = [0.5]
        for step, (reward, value) in enumerate(course):
            watch.logged(step, {"reward": reward - 0.1})
            watch.logged(step, {"reward": reward + 0.1})
            action_now = severest(watch.judged(step, {"ndcg@10": value}))
            if action_now in (None, "warn"):
                found += [value] * watch.kept({"ndcg@10": value})
            if action_now == "roll_back":
                assert watch.state.origin is not None
                found.append(-watch.state.origin)
                watch.rolled_back()
        return found

    hacked = [(1.0, 0.45), (2.0, 0.40), (1.0, 0.44), (2.0, 0.39)]
    assert kept("roll_back", hacked) == [0.5, -0.5, -0.5]
    assert kept("warn", hacked) == [0.5, 0.45, 0.40, 0.44, 0.39]
    # Suspicion ends as the metric recovers or the reward falls; a return leads there.
    assert kept("roll_back", [(1.0, 0.45), (2.0, 0.52), (3.0, 0.51), (4.0, 0.50)]) == [
        *(0.5, 0.52, -0.52),
    ]
    assert kept("roll_back", [(1.0, 0.45), (2.0, 0.46)]) == [0.5, -0.5]
    assert kept("roll_back", [(1.0, 0.45), (0.5, 0.44), (1.0, 0.43)]) == [0.5, 0.44]


def test_a_reward_that_does_not_rise_from_the_start_on_is_no_divergence() -> None:
    watch = watch_of(divergence=DivergenceConfig(validations=1))
    watch.begin({"ndcg@10": 0.5})
    watch.logged(1, {"reward": 1.0})
    assert watch.judged(1, {"ndcg@10": 0.4}) == []


def test_a_divergence_of_one_validation_is_told_in_the_singular() -> None:
    watch = watch_of(divergence=DivergenceConfig(validations=1), window=1)
    watch.begin({"ndcg@10": 0.4})
    watch.logged(1, {"reward": 1.0})
    assert watch.judged(1, {"ndcg@10": 0.5}) == []
    watch.logged(2, {"reward": 2.0})
    (alarm,) = watch.judged(2, {"ndcg@10": 0.3})
    assert "in 1 validation reward rose from 1.0000 to 2.0000" in alarm.reason


def test_a_rising_metric_is_no_divergence() -> None:
    watch = watch_of(divergence=DivergenceConfig(validations=1))
    watch.begin({"ndcg@10": 0.3})
    for step in range(4):
        watch.logged(step, {"reward": float(step)})
        assert watch.judged(step, {"ndcg@10": 0.3 + step}) == []


def test_of_several_alarms_the_severest_counts_and_all_are_kept() -> None:
    limits = (
        LimitConfig(metric="hr@50", max_drop=0.01, action="warn"),
        LimitConfig(metric="legality", min=1.0, action="stop"),
        LimitConfig(metric="coverage@10", min=0.2, action="roll_back"),
    )
    watch = watch_of(limits=limits)
    watch.begin({"hr@50": 0.5, "legality": 1.0, "coverage@10": 0.5})
    assert watch.judged(1, {"hr@50": 0.496, "legality": 1.0, "coverage@10": 0.2}) == []
    alarms = watch.judged(2, {"hr@50": 0.49, "legality": 0.9, "coverage@10": 0.1})
    assert severest(alarms) == "stop" and severest([]) is None
    assert sentence(alarms, "stop") == (
        "guardrail: hr@50 fell from 0.5000 to 0.4900, by 2.000%: more than the 1% allowed; "
        "legality is 0.9000, below its limit of 1; coverage@10 is 0.1000, below its limit of 0.2; "
        "stopping"
    )
    assert [a["action"] for a in watch.state.alarms] == ["warn", "stop", "roll_back"]


@given(users=st.integers(1, 10**9), percent=st.integers(0, 99), times=st.integers(1, 10**6))
def test_a_drop_of_exactly_what_is_allowed_is_allowed(users: int, percent: int, times: int) -> None:
    hits = 100 * times
    users += hits
    limit = LimitConfig(metric="hr@50", max_drop=percent / 100, action="stop")
    watch = watch_of(limits=(limit,))
    watch.begin({"hr@50": hits / users})
    kept = times * (100 - percent)
    assert watch.judged(1, {"hr@50": kept / users}) == []
    assert watch.judged(2, {"hr@50": (kept - 1) / users})


def test_a_drop_of_nothing_and_to_what_is_no_number() -> None:
    watch = watch_of(limits=(LimitConfig(metric="hr@50", max_drop=0.0, action="stop"),))
    watch.begin({"hr@50": 0.0})
    assert watch.judged(1, {"hr@50": 0.0}) == []
    watch.begin({"hr@50": 0.1})
    assert watch.judged(1, {"hr@50": 0.1}) == []
    assert len(watch.judged(1, {"hr@50": float("nan")})) == 1


def test_what_was_logged_is_judged_however_little_it_is() -> None:
    watch = watch_of(limits=(LimitConfig(metric="kl", max=1.0, action="stop"),), window=3)
    watch.begin({})
    for step, values in enumerate([(0.8, 1.1), (0.9,), (0.9, 0.9, 0.9)]):
        assert [watch.logged(step, {"kl": value}) for value in values] == [[]] * len(values)
        assert watch.judged(step, {}) == []
    # What was logged before a judgement makes no policy good that comes after it.
    assert watch.logged(4, {"kl": 1.2}) == [] and len(watch.judged(4, {})) == 1
    assert watch.judged(5, {}) == []  # nothing is there to judge by


def test_a_window_that_was_full_as_it_was_logged_is_told_once() -> None:
    watch = watch_of(limits=(LimitConfig(metric="kl", max=1.0, action="stop"),), window=2)
    watch.begin({})
    assert watch.logged(1, {"kl": 2.0}) == []
    assert len(watch.logged(2, {"kl": 2.0})) == 1 and watch.judged(2, {}) == []


def test_what_is_broken_for_long_is_warned_of_once() -> None:
    """And again after a judgement found it kept; whatever validation says of the same metric."""
    limit = LimitConfig(metric="legality", min=0.5, action="warn")
    watch = watch_of(limits=(limit,), window=1)
    watch.begin({"legality": 0.9})

    def epoch(*values: float) -> int:
        raised = [alarm for value in values for alarm in watch.logged(1, {"legality": value})]
        return len(raised + watch.judged(1, {"legality": 0.9}))

    assert [epoch(0.1, 0.6, 0.1), epoch(0.2, 0.2), epoch(0.2, 0.9)] == [1, 0, 0]
    assert [epoch(0.9, 0.4), epoch(0.1), epoch(0.9), epoch(0.1)] == [1, 0, 0, 1]
    assert len(watch.state.alarms) == 3 and watch.state.standing == ["training 0"]
    assert [len(watch.judged(9, {"legality": value})) for value in (0.1, 0.2, 0.9, 0.1)] == [
        1,
        0,
        0,
        1,
    ]


def test_what_is_not_a_number_breaks_every_bound() -> None:
    watch = watch_of(limits=(LimitConfig(metric="kl", max=1.0),), window=1)
    watch.begin({})
    assert watch.logged(1, {"kl": 0.5}) == []
    assert len(watch.logged(2, {"kl": float("nan")})) == 1


def test_a_step_without_a_measure_says_nothing_of_it() -> None:
    watch = watch_of(limits=(LimitConfig(metric="accuracy", min=0.4),), window=2)
    watch.begin({})
    assert watch.logged(1, {"loss": 1.0}, {"accuracy"}) == watch.judged(1, {}) == []
    assert watch.logged(2, {"loss": 1.0, "accuracy": 0.3}) == []
    assert watch.logged(3, {"loss": 1.0}, {"accuracy"}) == []
    assert len(watch.judged(3, {})) == 1
    with pytest.raises(ValueError, match="'accuracy', which is not measured; here are loss"):
        watch.logged(4, {"loss": 1.0})


def test_a_state_that_travelled_decides_alike() -> None:
    config = GuardrailsConfig(limits=(LimitConfig(metric="kl", max=1.0, action="stop"),), window=3)
    watch = Watch(config, WatchState())
    watch.begin({})
    for step in (1, 2):
        assert watch.logged(step, {"kl": 3.0}) == []
    moved = Watch(config, WatchState(**vars(watch.state)))
    assert len(moved.logged(3, {"kl": 3.0})) == 1


def test_what_is_broken_before_alignment_is_refused_or_warned_of() -> None:
    limit = {"metric": "hr@50", "min": 0.9}
    for action in ("stop", "roll_back"):
        with pytest.raises(
            ValueError, match=r"limits\.0 is broken before .*hr@50 is 0\.0500, below"
        ):
            watch_of(limits=[limit | {"action": action}]).begin({"hr@50": 0.05})
    watch = watch_of(limits=[limit | {"action": "warn"}])
    [alarm] = watch.begin({"hr@50": 0.05})
    assert (alarm.step, alarm.action) == (0, "warn") and watch.state.alarms == [alarm.to_dict()]
    assert watch.judged(1, {"hr@50": 0.06}) == []  # it stands
    assert watch_of(limits=[limit | {"action": "stop"}]).begin({"hr@50": 0.9}) == []


def users_of(mean: float, spread: float, seed: int = 0) -> dict[str, list[float]]:
    """What 128 groups of users add to a metric: on average, and how differently."""
    drawn = np.random.default_rng(seed).normal(size=128)
    return {"ndcg@10": ((mean + spread * (drawn - drawn.mean())) / 128).tolist()}


SURE = {"metric": "ndcg@10", "max_drop": 0.1, "confidence": 0.95}


@pytest.mark.parametrize(
    ("value", "spread", "alarmed", "kept"),
    [
        (0.5, 0.0, False, True),  # nothing has changed
        (0.48, 0.1, False, True),  # 0.03 above the least allowed, one standard error is 0.009
        (0.46, 0.1, False, False),  # above it, and maybe below
        (0.44, 0.1, False, False),  # below it, and maybe above
        (0.44, 0.0, True, False),
        (0.42, 0.1, True, False),
        (0.3, 10.0, False, False),  # far below, of users who tell nothing
    ],
)
def test_a_limit_with_confidence_takes_no_chance_for_a_drop_nor_for_none(
    value: float, spread: float, alarmed: bool, kept: bool
) -> None:
    watch = watch_of(limits=[SURE])
    watch.begin({"ndcg@10": 0.5}, users_of(0.5, 0.0))
    watch = Watch(watch.config, WatchState(**json.loads(json.dumps(asdict(watch.state)))))
    found, shares = {"ndcg@10": value}, users_of(value, spread)
    alarms = watch.judged(1, found, shares)
    assert [alarm.reason.endswith("allowed, with 0.95 confidence") for alarm in alarms] == (
        [True] * alarmed
    )
    assert (not alarms and watch.kept(found, shares)) == kept


def test_bounds_are_missed_as_seldom_as_their_confidence_says() -> None:
    """Users in groups of unequal sizes, each with a change that is mostly none; the truth is 0."""
    random = np.random.default_rng(3)
    low, high, runs, users = 0, 0, 2000, 1500
    group = random.integers(0, 128, users)
    for _ in range(runs):
        changes = random.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=users) / users
        below, above = bounds(np.bincount(group, changes, 128).tolist(), 0.95)
        low, high = low + (below > 0), high + (above < 0)
    assert 0.03 < low / runs < 0.07 and 0.03 < high / runs < 0.07
