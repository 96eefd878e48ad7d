"""Rules against plain loops written from their words."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from configs.preferences import LabelRule, PreferenceRule, RatingRule, WatchTimeRule
from data_loaders.dataset import Slices
from data_loaders.manifest import DatasetManifest
from data_loaders.preference_rules import check_rule, duration_buckets, outcomes
from data_loaders.synthetic import write_synthetic

LABELS = ("like", "hate", "long_view", "share")
SECONDS = st.sampled_from([0.0, 1.0, 3.0, 5.0, 5.5, 12.0, 60.0, float("nan")])
EVENTS = st.tuples(st.integers(0, 15), SECONDS, SECONDS, st.sampled_from([1.0, 2.0, 3.0, 4.5]))
USERS = st.lists(st.lists(EVENTS, max_size=14), max_size=4)
Users = list[list[tuple[int, float, float, float]]]


def slices_of(users: Users) -> Slices:
    """Labels, dwell time, duration and rating of the events of users."""
    columns = list(zip(*(event for user in users for event in user), strict=True)) or [()] * 4
    lengths = [len(user) for user in users]
    return Slices(
        sample_ids=np.arange(len(users)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rows={"user_id": np.arange(len(users)) + 1},
        events={
            "labels": np.array(columns[0], np.int64),
            "dwell_times": np.array(columns[1], np.float32),
            "durations": np.array(columns[2], np.float32),
            "ratings": np.array(columns[3], np.float32),
        },
    )


def by_watch_time(user: list[tuple[int, float, float, float]], rule: WatchTimeRule) -> list[int]:
    """1, −1 or 0 for each event of one user, by comparing it with every other event."""
    found = []
    for mask, dwell, duration, _ in user:
        if mask & 2 and rule.negative:
            found.append(-1)
            continue
        known = not math.isnan(dwell) and not math.isnan(duration) and duration > 0
        alike = [d for _, d, s, _ in user if known and same_bucket(d, s, duration, rule)]
        more, less = sum(d > dwell for d in alike), sum(d < dwell for d in alike)
        top, bottom = more < rule.liked_share * len(alike), less < rule.disliked_share * len(alike)
        shares = [share for share in (rule.liked_share, rule.disliked_share) if share > 0]
        enough = len(alike) * min(shares) >= 1
        if not rule.disliked_share and less < min(rule.liked_share, 0.5) * len(alike):
            top = False
        found.append((top - bottom) * enough)
    return found


def same_bucket(dwell: float, seconds: float, duration: float, rule: WatchTimeRule) -> bool:
    if math.isnan(dwell) or math.isnan(seconds) or seconds <= 0:
        return False
    base, epsilon = rule.duration_base, rule.duration_epsilon
    return exponent(seconds + epsilon, base) == exponent(duration + epsilon, base)


def exponent(seconds: float, base: float) -> int:
    """The n with base^n <= seconds < base^(n+1), by trying."""
    n = 0
    while base ** (n + 1) <= seconds:
        n += 1
    while base**n > seconds:
        n -= 1
    return n


@pytest.mark.parametrize("base", [1.5, 2.0, 3.0, 10.0])
def test_a_power_of_the_base_opens_its_bucket(base: float) -> None:
    rule = WatchTimeRule(duration_base=base, duration_epsilon=1.0)
    exact = [base**n - 1 for n in range(1, 20) if base**n - 1 + 1.0 == base**n]
    assert duration_buckets(np.array(exact), rule).tolist() == [
        exponent(seconds + 1.0, base) for seconds in exact
    ]
    assert len(exact) > 5


@given(
    users=USERS,
    shares=st.sampled_from([(0.25, 0.25), (0.5, 0.5), (0.3, 0.1), (0.2, 0.6), (0.25, 0.0)]),
    negative=st.booleans(),
    base=st.sampled_from([1.5, 2.0, 10.0]),
)
@settings(deadline=None, max_examples=200)
def test_watch_time_compares_with_the_users_own_events_of_alike_duration(
    users: Users, shares: tuple[float, float], negative: bool, base: float
) -> None:
    rule = WatchTimeRule(
        liked_share=shares[0],
        disliked_share=shares[1],
        negative=("hate",) if negative else (),
        duration_base=base,
    )
    found = outcomes(slices_of(users), rule, LABELS)
    assert found.rewards.tolist() == [x for user in users for x in by_watch_time(user, rule)]
    assert not (found.liked & found.disliked).any()
    assert sum(found.counts().values()) == len(found.liked)


def test_the_top_quarter_of_each_bucket_is_liked() -> None:
    short = [(0, float(dwell), 5.0, 1.0) for dwell in (1, 2, 3, 4)]
    long = [(0, float(dwell), 60.0, 1.0) for dwell in (9, 8, 7, 6, 5, 5, 5, 50)]
    found = outcomes(slices_of([short + long, long[:3]]), WatchTimeRule(), LABELS)
    expected = [-1, 0, 0, 1, 1, 0, 0, 0, -1, -1, -1, 1, 0, 0, 0]
    assert found.rewards.tolist() == expected
    assert found.counts() == {"liked": 3, "disliked": 4, "neither": 8}


def test_nothing_is_liked_for_a_tie_with_the_shortest() -> None:
    rule = WatchTimeRule(disliked_share=0)
    unwatched = [(0, 0.0, 60.0, 1.0)] * 19
    found = outcomes(slices_of([[*unwatched, (0, 60.0, 60.0, 1.0)], unwatched]), rule, LABELS)
    assert found.rewards.tolist() == [0] * 19 + [1] + [0] * 19


@pytest.mark.parametrize("size", [20, 25, 50, 100])
def test_shares_in_percent_have_exact_edges(size: int) -> None:
    """Those of liked and of disliked add up to 1: only an event that lies in both is neither."""
    users = slices_of([[(0, float(dwell), 60.0, 1.0) for dwell in range(size)]])
    for liked in range(1, 100):
        rule = WatchTimeRule(liked_share=liked / 100, disliked_share=(100 - liked) / 100)
        found = outcomes(users, rule, ()).rewards
        top, bottom = -(-liked * size // 100), -(-(100 - liked) * size // 100)
        assert top + bottom - size in (0, 1)
        enough = min(liked, 100 - liked) * size >= 100
        assert (found == 1).sum() == (size - bottom) * enough, liked
        assert (found == -1).sum() == (size - top) * enough, liked


@given(users=USERS, skip=st.booleans(), explicit=st.booleans())
@settings(deadline=None, max_examples=100)
def test_labels_are_what_they_say(users: Users, skip: bool, explicit: bool) -> None:
    disliked = ("hate",) if explicit or not skip else ()
    rule = LabelRule(liked=("long_view", "like"), disliked=disliked, skip_is_disliked=skip)
    expected = []
    for mask, *_ in (event for user in users for event in user):
        names = {name for bit, name in enumerate(LABELS) if mask >> bit & 1}
        hated = bool(names & set(disliked))
        skipped = skip and not names - set(disliked)
        liked = bool(names & {"like", "long_view"})
        expected.append(-1 if hated or skipped else int(liked))
    assert outcomes(slices_of(users), rule, LABELS).rewards.tolist() == expected


@given(users=USERS)
@settings(deadline=None, max_examples=30)
def test_ratings_by_threshold(users: Users) -> None:
    found = outcomes(slices_of(users), RatingRule(), ())
    expected = [(e[3] >= 4) - (e[3] <= 2) for user in users for e in user]
    assert found.rewards.tolist() == [float(x) for x in expected]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"kind": "labels", "liked": ["like"]}, "nothing is disliked"),
        ({"kind": "labels", "liked": []}, "at least 1"),
        ({"kind": "labels", "liked": ["a"], "disliked": ["b", "a"]}, r"\['a'\] cannot be both"),
        ({"kind": "watch_time", "liked_share": 0.8, "disliked_share": 0.3}, "overlap"),
        ({"kind": "rating", "liked_from": 1}, "must be below"),
        ({"kind": "watch_time", "liked_from": 1}, "liked_from"),
    ],
)
def test_rules_that_say_nothing_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(PreferenceRule).validate_python(settings_)


def test_what_the_data_set_lacks_is_named(tmp_path: Any) -> None:
    more = {"ratings": False, "labels": True, "dwell_times": True}
    bare = write_synthetic(str(tmp_path), 5, 5, 3.0, 1, **more)

    def refused(rule: PreferenceRule, manifest: DatasetManifest = bare) -> str:
        with pytest.raises(ValueError) as error:
            check_rule(rule, manifest, "the-url")
        return str(error.value)

    assert "no ratings" in refused(RatingRule())
    with pytest.raises(ValueError, match=r"choose another alignment\.logged\.rule\.kind"):
        check_rule(RatingRule(), bare, "the-url", "alignment.logged.rule")
    assert "alignment.rule.liked names ['follow']" in refused(
        LabelRule(liked=("follow", "like"), skip_is_disliked=True)
    )
    assert "alignment.rule.disliked names ['no']" in refused(
        LabelRule(liked=("like",), disliked=("no",))
    )
    assert "no duration times" in refused(WatchTimeRule())
    full = bare.model_copy(update={"has_durations": True})
    assert "alignment.rule.negative names ['no']" in refused(WatchTimeRule(negative=("no",)), full)
    check_rule(WatchTimeRule(negative=("hate",)), full, "the-url")
    check_rule(LabelRule(liked=("long_view",), skip_is_disliked=True), bare, "the-url")
