"""Guardrails of alignment: limits on metrics, reward against metric, and what follows.

The watch itself decides; the training loop carries out. All its numbers are equal on all ranks, so
that every rank decides alike, and its state travels with the checkpoints.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from types import MappingProxyType
from typing import Any

from configs.guardrails import Action, DivergenceConfig, GuardrailsConfig, LimitConfig

FOLLOWS: dict[Action, str] = {
    "warn": "going on",
    "roll_back": "returning to the last policy that kept the limits",
    "stop": "stopping",
}
ROUNDING = 1e-9
"""What a share of two metrics may be off by."""
Shares = Mapping[str, list[float]]
"""Metric → what each group of users adds to it."""
NO_SHARES: Shares = MappingProxyType({})
SEVERITY: dict[Action, int] = {"warn": 0, "roll_back": 1, "stop": 2}


@dataclass(frozen=True)
class Alarm:
    """A broken guardrail."""

    step: int
    action: Action
    reason: str
    """A sentence without a full stop."""

    def to_dict(self) -> dict[str, Any]:
        """As results and reports keep it."""
        return asdict(self)


def severest(alarms: Sequence[Alarm]) -> Action | None:
    """What to do about all of them; None where there are none."""
    return max((alarm.action for alarm in alarms), key=SEVERITY.__getitem__, default=None)


def sentence(alarms: Sequence[Alarm], follows: Action) -> str:
    """Everything that is broken, and what follows."""
    return f"guardrail: {'; '.join(alarm.reason for alarm in alarms)}; {FOLLOWS[follows]}"


@dataclass
class WatchState:
    """What a resumed stage must know; JSON-able."""

    start: dict[str, float] = field(default_factory=dict)
    """Validation metrics before the first step."""
    start_shares: dict[str, list[float]] = field(default_factory=dict)
    """What each group of users added to those whose limits ask for confidence."""
    recent: dict[str, list[float]] = field(default_factory=dict)
    """Training metric → its last logged values, none of before the last judgement."""
    standing: list[str] = field(default_factory=list)
    """What was warned of, and found kept at no judgement since."""
    rewards: list[float] = field(default_factory=list)
    """Since the last validation."""
    origin: float | None = None
    """Divergence's metric of the last policy that kept the limits; a course begins there."""
    course: list[list[float]] = field(default_factory=list)
    """Mean reward and metric of the origin and of each validation since."""
    rollbacks: int = 0
    lr_ratio: float = 1.0
    alarms: list[dict[str, Any]] = field(default_factory=list)


class Watch:
    """Holds metrics to the limits; `state` is the caller's, who saves it."""

    def __init__(self, config: GuardrailsConfig, state: WatchState) -> None:
        self.config = config
        self.state = state

    @property
    def acts(self) -> bool:
        """Whether an alarm may need an earlier policy to go back to."""
        actions = [limit.action for limit in self.config.limits]
        if self.config.divergence is not None:
            actions.append(self.config.divergence.action)
        return any(action != "warn" for action in actions)

    def begin(self, metrics: Mapping[str, float], shares: Shares = NO_SHARES) -> list[Alarm]:
        """Validation before the first step, which drops are relative to; empty without one.

        Args:
            metrics: what it measured.
            shares: what each group of users adds to ranking metrics.

        Returns:
            What is broken already, of limits that only warn.

        Raises:
            ValueError: what is broken already would ask for a return to a policy that keeps it.
        """
        state, alarms = self.state, []
        state.start = dict(metrics)
        sure = [limit.metric for limit in self.config.limits if limit.confidence is not None]
        state.start_shares = {name: shares[name] for name in sure if name in shares}
        for at, limit in enumerate(self.config.limits):
            broken = _broken(limit, metrics[limit.metric], None) if limit.metric in metrics else ""
            if broken and limit.action != "warn":
                raise ValueError(
                    f"alignment.guardrails.limits.{at} is broken before alignment: {broken}; there "
                    "is no policy that keeps it to return to: loosen it, or set action=warn"
                )
            alarms.append(self._alarm(f"validation {at}", limit.action, 0, broken))
        self.kept(metrics)
        return self._raised(alarms)

    def kept(self, metrics: Mapping[str, float], shares: Shares = NO_SHARES) -> bool:
        """Of a policy that broke no limit, by its validation: whether to select it, and to return
        to it later.

        Not while divergence is suspected, where that would act: a return must leave the whole
        course, not the end of it, and so must what a stop ends with. Nor where a limit's confidence
        is wanting. `shares` as of `begin`.
        """
        for limit in self.config.limits:
            slack = self._slack(limit, shares)
            if slack is not None and slack[0] < -ROUNDING:
                return False
        divergence = self.config.divergence
        if divergence is None:
            return True
        if divergence.action != "warn" and _suspected(self.state.course):
            return False
        self.state.origin = metrics.get(divergence.metric)
        return True

    def logged(
        self, step: int, metrics: Mapping[str, float], unmeasured: Collection[str] = ()
    ) -> list[Alarm]:
        """A training step that is logged; its alarms, of metrics whose window is full.

        Args:
            step: updates done.
            metrics: what it measured.
            unmeasured: what training measures, and this step had nothing to measure of.

        Raises:
            ValueError: a limit's metric is measured nowhere.
        """
        state, alarms = self.state, []
        self._refuse_unknown({*metrics, *unmeasured})
        divergence = self.config.divergence
        if divergence is not None and divergence.reward in metrics:
            state.rewards.append(metrics[divergence.reward])
        for name in {limit.metric for limit in self.config.limits} & metrics.keys():
            state.recent[name] = [*state.recent.get(name, []), metrics[name]][-self.config.window :]
        for at, limit in enumerate(self.config.limits):
            if limit.metric in metrics and self._is_full(limit.metric):
                broken = _broken(limit, _mean(state.recent[limit.metric]), None)
                place = f"training {at}"
                alarms.append(self._alarm(place, limit.action, step, broken, settled=False))
        return self._raised(alarms)

    def judged(
        self, step: int, validated: Mapping[str, float], shares: Shares = NO_SHARES
    ) -> list[Alarm]:
        """Of a policy that is kept if it breaks no limit; its alarms.

        Args:
            step: which made the policy.
            validated: its validation; empty without one. Training metrics are held to what was
                logged since the judgement before, however little.
            shares: as of `begin`.
        """
        state, alarms = self.state, []
        for at, limit in enumerate(self.config.limits):
            name = limit.metric
            if state.recent.get(name):
                broken = _broken(limit, _mean(state.recent[name]), None)
                if not broken or not self._is_full(name):  # else it was said as it was logged
                    alarms.append(self._alarm(f"training {at}", limit.action, step, broken))
            if name in validated:
                slack = self._slack(limit, shares)
                broken = _broken(limit, validated[name], state.start.get(name), slack)
                alarms.append(self._alarm(f"validation {at}", limit.action, step, broken))
        divergence = self.config.divergence
        if divergence is not None:
            broken = self._diverged(divergence, validated)
            alarms.append(self._alarm("divergence", divergence.action, step, broken))
        state.recent = {}
        return self._raised(alarms)

    def _slack(self, limit: LimitConfig, shares: Shares) -> tuple[float, float] | None:
        """Between which bounds the metric is above the least allowed, where confidence is asked."""
        start, now = self.state.start_shares.get(limit.metric), shares.get(limit.metric)
        if limit.confidence is None or limit.max_drop is None or start is None or now is None:
            return None
        least = [(1 - limit.max_drop) * share for share in start]
        return bounds([a - b for a, b in zip(now, least, strict=True)], limit.confidence)

    def _refuse_unknown(self, logged: set[str]) -> None:
        validated = set(self.state.start)
        divergence = self.config.divergence
        wanted = {limit.metric: validated | logged for limit in self.config.limits}
        wanted |= {
            limit.metric: validated for limit in self.config.limits if limit.max_drop is not None
        }
        if divergence is not None:
            wanted |= {divergence.reward: logged, divergence.metric: validated}
        for name, measured in wanted.items():
            if name not in measured:
                raise ValueError(
                    f"alignment.guardrails watches {name!r}, which is not measured; here are "
                    f"{', '.join(sorted(measured)) or 'no validation metrics'}"
                )

    def _is_full(self, metric: str) -> bool:
        return len(self.state.recent[metric]) == self.config.window

    def _alarm(
        self, place: str, action: Action, step: int, broken: str, *, settled: bool = True
    ) -> Alarm | None:
        """Of what is `broken`, if anything is. A warning stands until a judgement (`settled`) finds
        its limit kept, so that what is broken for long is said once."""
        standing = self.state.standing
        if not broken:
            if settled and place in standing:
                standing.remove(place)
            return None
        if action == "warn":
            if place in standing:
                return None
            standing.append(place)
        return Alarm(step, action, broken)

    def _diverged(self, config: DivergenceConfig, metrics: Mapping[str, float]) -> str:
        """How the reward seems to be hacked, in a sentence; empty where it does not."""
        state = self.state
        if not state.rewards or config.metric not in metrics:
            return ""
        if not state.course and state.origin is not None:
            # The reward of where the course begins: of its first steps, never of most of them.
            first = max(1, min(self.config.window, len(state.rewards) // 2))
            state.course.append([_mean(state.rewards[:first]), state.origin])
        state.course.append([_mean(state.rewards), metrics[config.metric]])
        state.rewards = []
        course, number = state.course, len(state.course)
        ends = range(number - config.validations + 1, number + 1)
        if number <= config.validations or not all(_suspected(course[:end]) for end in ends):
            return ""
        reward, metric = course[-1]
        lower = [place for place in range(number) if course[place][0] < reward]
        since = max(lower, key=lambda place: course[place][1])
        lasted = number - 1 - since
        return (
            f"the reward may be hacked: in {lasted} validation{'s' if lasted > 1 else ''} "
            f"{config.reward} rose from {course[since][0]:.4f} to {reward:.4f} "
            f"while {config.metric} fell from {course[since][1]:.4f} to {metric:.4f}"
        )

    def _raised(self, held: Sequence[Alarm | None]) -> list[Alarm]:
        """Keep the alarms among what was held to limits. A roll-back too many stops."""
        alarms = [self._bounded(alarm) for alarm in held if alarm is not None]
        self.state.alarms += [alarm.to_dict() for alarm in alarms]
        return alarms

    def _bounded(self, alarm: Alarm) -> Alarm:
        done = self.state.rollbacks
        if alarm.action != "roll_back" or done < self.config.max_rollbacks:
            return alarm
        allowed = f"alignment.guardrails.max_rollbacks={self.config.max_rollbacks}"
        return Alarm(alarm.step, "stop", f"{alarm.reason}, and {allowed} allows no more roll-backs")

    def rolled_back(self) -> None:
        """Learn less from here; what was averaged belongs to the policy that was left."""
        state = self.state
        state.rollbacks += 1
        state.lr_ratio *= self.config.rollback_lr_ratio
        state.recent, state.rewards, state.course, state.standing = {}, [], [], []


def _suspected(course: list[list[float]]) -> bool:
    """Whether the last (reward, metric) has a higher reward and a lower metric than the one before,
    or than the first: in steps alone, a slow fall would hide behind noise."""
    earlier = course[:1] + course[-2:-1]
    return any(course[-1][0] > reward and course[-1][1] < metric for reward, metric in earlier)


def bounds(shares: Sequence[float], confidence: float) -> tuple[float, float]:
    """Below and above which the sum over all users is, each with this confidence.

    The groups are alike and drawn from one population, so that the spread over them tells that of
    their sum. There are enough of them to take Student's distribution for the normal one.
    """
    number, total = len(shares), sum(shares)
    variance = sum((share - total / number) ** 2 for share in shares) * number / (number - 1)
    margin = NormalDist().inv_cdf(confidence) * math.sqrt(variance)
    return total - margin, total + margin


def _broken(
    limit: LimitConfig,
    value: float,
    start: float | None,
    slack: tuple[float, float] | None = None,
) -> str:
    """How `value` breaks a limit, in a sentence; empty where it keeps it, or may well keep it."""
    name, broken, drop = limit.metric, "", limit.max_drop
    may_keep = slack is not None and slack[1] >= 0
    if drop is not None and start is not None and not may_keep:
        # Both are rounded already: a drop of exactly what is allowed must not miss by that.
        fell = 1.0 - value / start if start else 0.0
        if not fell <= drop + ROUNDING:
            broken = (
                f"{name} fell from {start:.4f} to {value:.4f}, by {fell:.3%}: more than the "
                f"{100 * drop:g}% allowed"
            )
            broken += f", with {limit.confidence:.4g} confidence" if slack is not None else ""
    if limit.min is not None and not value >= limit.min:
        broken = f"{name} is {value:.4f}, below its limit of {limit.min:g}"
    if limit.max is not None and not value <= limit.max:
        broken = f"{name} is {value:.4f}, above its limit of {limit.max:g}"
    return broken


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
