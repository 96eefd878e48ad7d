"""The watch's decisions, without a training loop."""

from configs.guardrails import DivergenceConfig, GuardrailsConfig, LimitConfig
from trainer.guardrails import Watch, WatchState


def watch_of(**config: object) -> Watch:
    return Watch(GuardrailsConfig.model_validate(config), WatchState())


def test_a_hacked_reward_is_told_after_so_many_validations() -> None:
    watch = watch_of(divergence=DivergenceConfig(validations=2, action="stop"))
    watch.begin({"ndcg@10": 0.3})
    course = [(1.0, 0.30), (2.0, 0.29), (1.9, 0.28), (2.5, 0.27), (2.6, 0.26)]
    alarms = []
    for step, (reward, value) in enumerate(course):
        watch.logged(step, {"reward": reward - 0.1})
        watch.logged(step, {"reward": reward + 0.1})
        alarms.append(watch.validated(step, {"ndcg@10": value}))
    assert alarms[:4] == [None] * 4  # the reward fell once in between
    assert alarms[4] is not None and alarms[4].action == "stop"
    assert "reward rose from 1.9000 to 2.6000 while ndcg@10 fell from 0.2800" in alarms[4].reason


def test_a_rising_metric_is_no_divergence() -> None:
    watch = watch_of(divergence=DivergenceConfig(validations=1))
    watch.begin({"ndcg@10": 0.3})
    for step in range(4):
        watch.logged(step, {"reward": float(step)})
        assert watch.validated(step, {"ndcg@10": 0.3 + step}) is None


def test_of_several_alarms_the_severest_counts_and_all_are_kept() -> None:
    limits = (
        LimitConfig(metric="hr@50", max_drop=0.01, action="warn"),
        LimitConfig(metric="legality", min=1.0, action="stop"),
        LimitConfig(metric="coverage@10", min=0.2, action="roll_back"),
    )
    watch = watch_of(limits=limits)
    watch.begin({"hr@50": 0.5, "legality": 1.0, "coverage@10": 0.5})
    assert watch.validated(1, {"hr@50": 0.496, "legality": 1.0, "coverage@10": 0.2}) is None
    alarm = watch.validated(2, {"hr@50": 0.49, "legality": 0.9, "coverage@10": 0.1})
    assert alarm is not None and alarm.action == "stop" and "legality is 0.9000" in alarm.reason
    assert sorted(a["action"] for a in watch.state.alarms) == ["roll_back", "stop", "warn"]


def test_what_is_not_a_number_breaks_every_bound() -> None:
    watch = watch_of(limits=(LimitConfig(metric="kl", max=1.0),), window=1)
    watch.begin({})
    assert watch.logged(1, {"kl": 0.5}) is None
    assert watch.logged(2, {"kl": float("nan")}) is not None


def test_a_state_that_travelled_decides_alike() -> None:
    config = GuardrailsConfig(limits=(LimitConfig(metric="kl", max=1.0, action="stop"),), window=3)
    watch = Watch(config, WatchState())
    watch.begin({})
    for step in (1, 2):
        assert watch.logged(step, {"kl": 3.0}) is None
    moved = Watch(config, WatchState(**vars(watch.state)))
    assert moved.logged(3, {"kl": 3.0}) is not None
