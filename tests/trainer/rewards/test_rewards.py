"""Rewards by hand on small groups; what no item is, and the sum of all of them."""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from configs import rewards as kinds
from data_loaders.items import ItemFeature
from models.batch import JaggedBatch
from trainer.rewards import rules
from trainer.rewards.group import Group
from trainer.rewards.total import RewardSum
from trainer.rewards.user_function import load_function

COUNTS = torch.tensor([50, 20, 20, 8, 2, 0])
"""Train occurrences of items 1 … 6."""
CODES = torch.tensor([[0, 0], [1, 1], [1, 2], [1, 2], [2, 0], [2, 1], [2, 2]])
"""Ids of items 0 … 6; items 2 and 3 share one."""


def contexts(number: int) -> JaggedBatch:
    ones = torch.ones(number, dtype=torch.int64)
    return JaggedBatch(
        sample_ids=ones.cumsum(0),
        user_ids=ones,
        offsets=torch.arange(number + 1),
        item_ids=ones,
        timestamps=ones,
        next_timestamps=ones,
        target_ids=ones,
    )


def group(items: list[list[int]], targets: list[int], *, codes: bool = False) -> Group:
    """Candidates by falling log π; -1 is no candidate, 0 an id that the catalogue lacks."""
    table = torch.tensor(items)
    valid, table = table >= 0, table.clamp(min=0)
    wanted = torch.tensor(targets)
    return Group(
        items=table,
        codes=CODES[table] if codes else None,
        valid=valid,
        log_probs=(-torch.arange(table.shape[1]).float()).expand(table.shape),
        target_ids=wanted,
        target_codes=CODES[wanted] if codes else None,
        contexts=contexts(len(targets)),
    )


def near(found: Tensor, expected: list[list[float]]) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_hit() -> None:
    found = group([[3, 2, 0, -1], [1, 1, 4, 2]], [2, 1], codes=True)
    near(rules.hit(found, "item"), [[0, 1, 0, 0], [1, 1, 0, 0]])
    near(rules.hit(found, "id"), [[1, 1, 0, 0], [1, 1, 0, 0]])


def test_an_item_that_is_none_hits_nothing() -> None:
    """Neither an absent target nor an absent candidate makes a hit of 0 = 0."""
    found = group([[0, -1, 1]], [0])
    near(rules.hit(found, "item"), [[0, 0, 0]])
    near(rules.rank(found, "item"), [[0, 0, 0]])
    near(rules.legality(found), [[0, 0, 1]])
    near(rules.diversity(found), [[0, 0, 1]])
    assert rules.novelty(found, COUNTS)[0, :2].tolist() == [0, 0]


def test_prefix_stops_at_the_first_level_that_differs() -> None:
    found = group([[4, 6, 3, -1]], [5], codes=True)  # [2,0] [2,2] [1,2] against [2,1]
    near(rules.prefix(found), [[0.5, 0.5, 0, 0]])
    codes = torch.tensor([[[2, 1], [0, 1]]])
    illegal = replace(group([[0, 0]], [5], codes=True), codes=codes)
    near(rules.prefix(illegal), [[1.0, 0.0]])
    near(rules.prefix(group([[5, 4]], [5])), [[1, 0]])


def test_rank_by_hand() -> None:
    found = group([[4, 2, 5, -1], [1, 3, 4, 5]], [2, 6])
    first, third = 1 / math.log2(2), 1 / math.log2(4)
    total = first + third
    near(rules.rank(found, "item"), [[-first / total, 0, -third / total, 0], [0, 0, 0, 0]])


def test_rank_goes_by_log_probability_not_by_place() -> None:
    found = group([[4, 2, 5]], [2])
    turned = replace(found, log_probs=torch.tensor([[-3.0, -2.0, -1.0]]))
    assert rules.rank(turned, "item")[0, 0] > rules.rank(turned, "item")[0, 2]
    assert float(rules.rank(turned, "item").sum()) == pytest.approx(-1.0)


@given(
    st.lists(st.lists(st.integers(-1, 6), min_size=5, max_size=5), min_size=1, max_size=3),
    st.booleans(),
    st.permutations(range(5)),
)
@settings(deadline=None, max_examples=100)
def test_rank_is_worth_the_same_for_draws_of_one_outcome(
    items: list[list[int]], codes: bool, order: list[int]
) -> None:
    """Whatever their order; and less for likelier ones."""
    found = group(items, [1] * len(items), codes=codes)
    third = 2.0 if codes else 2.5  # items 2 and 3 share an id
    likely = -torch.tensor([0.0, 4.0, 2.0, third, 1.0, 3.0, 5.0])[found.items]
    found = replace(found, log_probs=likely.masked_fill(~found.valid, -torch.inf))
    worth = rules.rank(found, "id")
    columns = {name: getattr(found, name)[:, order] for name in ("items", "valid", "log_probs")}
    turned = replace(found, **columns, codes=CODES[columns["items"]] if codes else None)
    torch.testing.assert_close(rules.rank(turned, "id"), worth[:, order])
    for row, own in enumerate(found.items.tolist()):
        missed = [at for at in range(5) if found.valid[row, at] and own[at] != 1]
        if 1 not in [own[at] for at in range(5) if found.valid[row, at]]:
            assert not worth[row].any()
            continue
        for a, b in product(missed, missed):
            pair = own[a], own[b]
            if pair[0] == pair[1] or (codes and set(pair) == {2, 3}):
                assert worth[row, a] == worth[row, b]
            elif likely[row, a] > likely[row, b]:
                assert worth[row, a] < worth[row, b]


def test_diversity_sums_to_distinct_items() -> None:
    found = group([[4, 4, 4, 2], [1, 2, 0, 0]], [1, 1])
    near(rules.diversity(found), [[1 / 3, 1 / 3, 1 / 3, 1], [1, 1, 0, 0]])


def test_novelty_by_hand() -> None:
    found = rules.novelty(group([[1, 6, 4]], [1]), COUNTS)
    scale = math.log(106)
    near(found, [[1 - math.log(51) / scale, 1.0, 1 - math.log(9) / scale]])


def test_popularity_classes_are_equal_parts() -> None:
    assert rules.popularity_classes(COUNTS, 3).tolist() == [-1, 0, 0, 1, 1, 2, 2]
    assert rules.popularity_classes(COUNTS, 1).tolist() == [-1, 0, 0, 0, 0, 0, 0]


def test_quota_by_hand() -> None:
    """Popular items 1 and 2 are two of three (too many), then one of three."""
    classes = rules.popularity_classes(COUNTS, 3)
    found = group([[1, 2, 5, 0], [1, 5, 6, -1]], [1, 1])
    limited = rules.with_quota(classes, torch.tensor([0]))
    assert limited.tolist() == [-1, 0, 0, -1, -1, -1, -1]
    over = rules.over_represented(found, limited, 0.5)
    assert over.tolist() == [[True, True, False, False], [False] * 4]
    over = rules.over_represented(found, classes, 0.5)  # items 5 and 6 are a class, too
    assert over.tolist() == [[True, True, False, False], [False, True, True, False]]


@pytest.mark.parametrize(("share", "over"), [(0.5, False), (0.49, True), (0.51, False)])
def test_a_quota_that_is_just_filled_is_kept(share: float, over: bool) -> None:
    """Two of four items are half of them: not more."""
    limited = rules.with_quota(rules.popularity_classes(COUNTS, 3), torch.tensor([0]))
    found = group([[1, 2, 5, 6, 0, -1]], [1])
    expected = [[over, over, False, False, False, False]]
    assert rules.over_represented(found, limited, share).tolist() == expected


@pytest.mark.parametrize("number", [10, 20, 30, 100])
def test_rounding_fills_no_quota(number: int) -> None:
    """Every share in percent that is a whole number of items."""
    classes = torch.tensor([-1, 0, -1])
    for same in range(1, number):
        found = group([[1] * same + [2] * (number - same)], [1])
        assert not rules.over_represented(found, classes, same / number).any()


KINDS = ItemFeature(torch.tensor([0, 1, 1, 2, 2, 0, 0], dtype=torch.int32), ("song", "clip"))
"""Items 5 and 6 have no category."""


@pytest.mark.parametrize(
    ("limited", "halved"),
    [(None, (0, 1)), (("song",), (0,)), (("clip",), (1,)), (("song", "clip"), (0, 1))],
)
def test_a_quota_of_categories(limited: tuple[str, ...] | None, halved: tuple[int, ...]) -> None:
    """Groups of mostly songs, mostly clips, and mostly items without a category."""
    found = group([[1, 2, 1, 4], [4, 3, 4, 0], [5, 6, 5, 1]], [1, 3, 5])
    expected = torch.tensor([[1.0] * 4, [1.0, 1.0, 1.0, 0.0], [1.0] * 4])
    for row in halved:
        expected[row, :3] = 0.5
    configs: list[kinds.Reward] = [
        kinds.LegalityReward(),
        kinds.QuotaReward(feature="kind", limited=limited, largest_share=0.5, alpha=0.5),
    ]
    total = RewardSum(configs, COUNTS, features={"kind": KINDS})(found).total
    torch.testing.assert_close(total, expected)


def test_a_quota_of_no_category() -> None:
    config = kinds.QuotaReward(feature="kind", limited=("clips",))
    with pytest.raises(ValueError, match="kind='clips', but no item .* did you mean 'clip'"):
        RewardSum([config], COUNTS, features={"kind": KINDS})


def test_sum_and_parts() -> None:
    configs: list[kinds.Reward] = [
        kinds.QuotaReward(classes=3, limited=(0,), largest_share=0.5, alpha=0.25),
        kinds.HitReward(weight=2.0),
        kinds.RankReward(),
        kinds.LegalityReward(weight=0.5),
        kinds.LegalityReward(weight=0.25),
    ]
    found = RewardSum(configs, COUNTS)(group([[1, 2, 5, -1]], [1]))
    assert set(found.parts) == {"hit", "rank", "legality_1", "legality_2", "quota"}
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    misses = [-second / (second + third), -third / (second + third)]
    before = [2.75, 0.75 + misses[0], 0.75 + misses[1], 0.0]
    near(found.total, [[before[0] * 0.25, before[1] * 0.25, before[2], 0.0]])
    torch.testing.assert_close(torch.stack(list(found.parts.values())).sum(0), found.total)


def test_a_quota_does_not_lift_what_is_negative() -> None:
    configs: list[kinds.Reward] = [
        kinds.LegalityReward(weight=-1.0),
        kinds.QuotaReward(classes=3, largest_share=0.0, alpha=0.0),
    ]
    near(RewardSum(configs, COUNTS)(group([[1, 5]], [1])).total, [[-1.0, -1.0]])


class Probabilities:
    """A reward model that knows its answers."""

    outputs = ("click", "like")

    def score(self, contexts: JaggedBatch, candidates: Tensor) -> dict[str, Tensor]:
        assert contexts.num_sequences == candidates.shape[0]
        return {"click": candidates / 10, "like": candidates / 100}


def test_p_score_of_a_reward_model() -> None:
    config = kinds.ModelReward(run="somewhere", tasks={"click": 1.0, "like": 5.0}, weight=2.0)
    rewards = RewardSum([config], COUNTS, {"somewhere": Probabilities()})
    near(rewards(group([[2, 4, 0, -1]], [1])).total, [[0.6, 1.2, 0, 0]])
    unknown = kinds.ModelReward(run="somewhere", tasks={"share": 1.0})
    with pytest.raises(ValueError, match=r"\['click', 'like'\], not 'share'"):
        RewardSum([unknown], COUNTS, {"somewhere": Probabilities()})


def even_items(found: Group) -> Tensor:
    """A user's reward; says something also where there is no candidate."""
    return (found.items % 2 == 0).to(torch.float64)


def one_number(found: Group) -> Tensor:
    return torch.zeros(())


def two_arguments(found: Group, more: int) -> Tensor:
    return found.log_probs


def raises(found: Group) -> Tensor:
    raise KeyError("my lookup")


def quits(found: Group) -> Tensor:
    sys.exit(0)


def starved(found: Group) -> Tensor:
    raise MemoryError("no room")


def infinite(found: Group) -> Tensor:
    return torch.where(found.items == 4, torch.inf, 1.0)


def too_large(found: Group) -> Tensor:
    """Finite, but not in float32."""
    return torch.full(found.items.shape, 1e300, dtype=torch.float64)


def complex_numbers(found: Group) -> Tensor:
    return torch.zeros(found.items.shape, dtype=torch.complex64)


def spoils(found: Group) -> Tensor:
    """What a user does whose own table counts from 0; numpy's view goes past torch's notice."""
    found.items.numpy()[:] -= 1
    found.contexts.item_ids.zero_()
    found.valid[:] = False
    return found.items.float()


CONSTANT = 3
HERE = "tests.trainer.rewards.test_rewards"


def test_a_function_of_the_users() -> None:
    found = RewardSum([kinds.FunctionReward(path=f"{HERE}:even_items")], COUNTS)
    near(found(group([[2, 3, 4, -1]], [1])).total, [[1, 0, 1, 0]])
    with pytest.raises(ValueError, match=r"returned \[\]; it must return one number for each"):
        load_function(f"{HERE}:one_number")(group([[1]], [1]))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("raises", r":raises' raised KeyError: 'my lookup' \(.*test_rewards.py:\d+\); mend it"),
        ("quits", r":quits' raised SystemExit: 0 \(.*test_rewards.py:\d+\); mend it"),
        ("infinite", ":infinite' returned inf for 2 of 3 candidates, .* item 4 for user 1 "),
        ("too_large", ":too_large' returned inf for 3 of 3"),
        ("complex_numbers", ":complex_numbers' returned complex numbers; it must return one"),
    ],
)
def test_a_function_that_fails_is_named(name: str, sentence: str) -> None:
    """As a mistake of the user's, which nobody tries again, and not of a step's samples."""
    with pytest.raises(ValueError, match=sentence):
        RewardSum([kinds.FunctionReward(path=f"{HERE}:{name}")], COUNTS)(group([[4, 3, 4]], [1]))


def test_memory_that_a_function_lacks_is_no_mistake_of_it() -> None:
    with pytest.raises(MemoryError):
        load_function(f"{HERE}:starved")(group([[1]], [1]))


def test_a_function_cannot_spoil_what_is_trained_on() -> None:
    found, untouched = (group([[2, 3, 4, -1]], [1]) for _ in range(2))
    near(load_function(f"{HERE}:spoils")(found), [[1, 2, 3, 0]])
    for name in ("items", "valid"):
        assert torch.equal(getattr(found, name), getattr(untouched, name))
    assert torch.equal(found.contexts.item_ids, untouched.contexts.item_ids)


def test_modules_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found, and what is wrong with one is said with its line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in {
        "reward_of_mine": "def one(group):\n    return group.log_probs.exp()\n",
        "reward_broken": "\nraise RuntimeError('no table')\n",
        "reward_wrong": "def f(:\n",
        "reward_script": "import sys\nsys.exit(0)\n",
        "reward_needs": "import no_such_package_of_mine\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    near(load_function("reward_of_mine:one")(group([[1]], [1])), [[1.0]])
    for name, sentence in {
        "reward_broken": r"raises RuntimeError: no table \(.*reward_broken.py:2\); mend it there",
        "reward_wrong": r"raises SyntaxError: .* \(.*reward_wrong.py:1\)",
        "reward_script": r"raises SystemExit: 0 \(.*reward_script.py:2\)",
        "reward_needs": r"raises ModuleNotFoundError: .*of_mine' \(.*reward_needs.py:1\)",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            load_function(f"{name}:one")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("no.such.package:reward", "cannot be imported .*: install .* on every node, or, with"),
        ("torch:zeros", "must take one argument, .* does not tell what it takes"),
        (f"{HERE}:absent", "has no 'absent'"),
        (f"{HERE}:CONSTANT", "is int, not a function"),
        (f"{HERE}:two_arguments", "must take one argument"),
    ],
)
def test_a_function_that_cannot_be_called(path: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RewardSum([kinds.FunctionReward(path=path)], COUNTS)


@pytest.mark.parametrize(
    "block",
    [
        {"kind": "function", "path": "os.system"},
        {"kind": "function", "path": "a b:c"},
        {"kind": "quota", "classes": 3, "limited": [3]},
        {"kind": "quota", "limited": ["clip"]},
        {"kind": "quota", "feature": "kind", "classes": 3},
        {"kind": "model", "run": "x", "tasks": {}},
        {"kind": "hit", "weight": float("inf")},
        {"kind": "hit", "weigth": 1},
    ],
)
def test_what_a_recipe_may_not_say(block: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(kinds.Reward).validate_python(block)


def test_a_path_without_its_function_is_told_how_to_write_it() -> None:
    with pytest.raises(ValidationError, match=r"'ok.good' names no function: write it `package\."):
        TypeAdapter(kinds.Reward).validate_python({"kind": "function", "path": "ok.good"})


async def awaited(found: Group) -> Tensor:
    return torch.zeros(found.items.shape)


def yields(found: Group) -> Iterator[Tensor]:
    yield torch.zeros(found.items.shape)


class Awaited:
    async def __call__(self, found: Group) -> Tensor:
        return torch.zeros(found.items.shape)


of_a_class = Awaited()


@pytest.mark.parametrize(
    ("name", "told"),
    [("awaited", "is async"), ("of_a_class", "is async"), ("yields", "return one number")],
)
def test_what_gives_no_numbers_when_called_is_refused_when_read(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load_function(f"{HERE}:{name}")
