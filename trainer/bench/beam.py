"""`tandem bench beam`: what it costs to generate legal ids, against how others do it.

The constraint step is masking and selecting alone: logits, prefixes and scores of each level are
recorded first, and all contestants get the same ones; their results must agree.

A step looks at the children of its beams' prefixes, of which a larger catalogue has more, up to K.
So `over fewest items` rises with branching, and is not judged. Growth with the catalogue itself is:
the steps of the smallest one are repeated in a larger one that has the same prefixes, with the same
children, among its own.

Shape legend: N requests, W beams, L levels, K codes of a level, V items, P picked.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from configs import storage
from configs.generation import BeamConfig
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.search import Generated, items_of
from models.generation.strategies import Beams, TrieLevel, advance, first_beams
from models.ops.hashing import mix64
from trainer.bench.measure import best_of, machine, table
from trainer.bench.rivals import DictTrie, Mask, PrefixComparison, masked_step, no_mask

LEVELS, CODES = 4, 256
TO_ITEMS = "to items"
SHARED = 0.1
"""Share of items that have another item's id."""
SKEW = (1.0, 5.5, 5.5, 1.0)
"""By level: a prefix takes its u^skew · K-th favourite code, u uniform. Of 12,101 items' ids 54%
are then still open (others begin alike) after two codes and 19% after three; of those that balanced
residual k-means gives Beauty's 12,101 items 55% and 19%; of uniform ones 15% and 0.1%."""
MOST_COMPARED = 1 << 30
"""Comparisons of a prefix with a row that one timing may take; larger steps are scaled."""
BAR_OVER_DICT = 50.0
"""Times faster than the dict trie, at 50 beams."""
MOST_GROWTH = 1.25
"""Times longer that a step may take where only the catalogue is larger: noise of a timing."""


CONTESTANTS = ("free", "dict", "dict numpy", "compare")
"""Beside ours: no constraint at all, dict tries that write masks through torch and through numpy,
and a compare of prefixes with every row."""


@dataclass(frozen=True)
class ConstraintRow:
    """Milliseconds of one step, by contestant."""

    items: int
    beams: int
    step: str
    """`level 0` …, or `to items`: the resolution of ids into items."""
    ms: dict[str, float]

    def over(self, contestant: str) -> float:
        """How many times faster ours is."""
        return self.ms[contestant] / self.ms["ours"]


@dataclass(frozen=True)
class _Step:
    """What a constraint step starts from."""

    prefixes: Tensor
    beams: Beams
    logits: Tensor
    at: TrieLevel


def bench_beam(
    output: str,
    *,
    items: Sequence[int],
    beams: Sequence[int],
    batch: int,
    repeats: int,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Measure, print, and leave `beam.json` below `output` (any URL).

    Raises:
        ValueError: a catalogue that this many codes cannot name, or of fewer ids than beams.
        AssertionError: a contestant's result differs from ours.
    """
    wrong = [count for count in items if not 1 < count <= CODES**LEVELS // 2]
    if wrong or not items or not beams:
        raise ValueError(
            f"--items {wrong}: {LEVELS} levels of {CODES} codes are for 2 to {CODES**LEVELS // 2} "
            "items"
        )
    rows: list[ConstraintRow] = []
    for count in items:
        generator = torch.Generator().manual_seed(seed)
        codes = tree_codes(count, generator)
        trie = CatalogueTrie.build(codes, (CODES,) * LEVELS)
        if trie.num_states(LEVELS) < max(beams):
            raise ValueError(
                f"--beams {max(beams)}: {count:,} items have {trie.num_states(LEVELS):,} ids, and "
                "every beam needs one: lower --beams or raise --items"
            )
        say(f"{count:,} items, {trie.num_states(LEVELS):,} ids, branches {trie.max_branch}")
        rivals = DictTrie(codes), PrefixComparison(codes)
        for width in beams:
            rows += _constraint(trie, rivals, width, batch, repeats, generator)
            timed = compared_share(count, width, batch)
            scaled = "" if timed == 1.0 else f"; compare timed on {timed:.0%} of a batch and scaled"
            say(f"  {width} beams measured{scaled}")
    grown = partial(growth_of, batch=batch, repeats=repeats, seed=seed)
    result = {
        "machine": machine(),
        "setting": {
            "levels": LEVELS,
            "codes": CODES,
            "batch": batch,
            "shared": SHARED,
            "skew": SKEW,
            "seed": seed,
            "repeats": repeats,
            "most_compared": MOST_COMPARED,
        },
        "constraint": [asdict(row) for row in rows],
        "summary": summary(rows) | _growth(items, beams, grown, say),
    }
    storage.make_directory(output)
    storage.write_json(storage.join(output, "beam.json"), result)
    say("\n" + render(rows))


def _growth(
    items: Sequence[int],
    beams: Sequence[int],
    grown: Callable[[int, int, int], float],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Growth from the smallest catalogue to each larger one (`grown`, by both sizes and beams),
    judged and said; None where there is no pair to judge."""
    fewest, cases = min(items), []
    fitting = [width for width in beams if width <= fewest - int(SHARED * fewest)]
    for count in sorted({*items} - {fewest}):
        for width in fitting:
            times = grown(fewest, count, width)
            cases.append({"items": count, "beams": width, "times": times})
            say(
                f"  {width} beams: steps of levels 1 … {LEVELS - 1} over the same prefixes and "
                f"children take {times:.2f} times as long among {count:,} items as among "
                f"{fewest:,} (at most {MOST_GROWTH})"
            )
    met = all(case["times"] <= MOST_GROWTH for case in cases) if cases else None
    return {"growth_at_equal_children": cases, "most_growth": MOST_GROWTH, "growth_met": met}


def tree_codes(count: int, generator: torch.Generator) -> Tensor:
    """Codes [V, L] of a catalogue whose prefixes are shared as in real ones (see `SKEW`).

    A share of the items has another one's id.
    """
    num_ids = count - int(SHARED * count)
    ids = torch.empty(0, dtype=torch.int64)
    while ids.numel() < num_ids:
        ids = torch.cat([ids, _skewed_ids(num_ids, generator)]).unique()
    ids = ids[torch.randperm(ids.numel(), generator=generator)[:num_ids]]
    doubles = ids[torch.randint(num_ids, (count - num_ids,), generator=generator)]
    ids = torch.cat([ids, doubles])[torch.randperm(count, generator=generator)]
    return torch.stack([ids // CODES ** (LEVELS - 1 - level) % CODES for level in range(LEVELS)], 1)


def _skewed_ids(count: int, generator: torch.Generator) -> Tensor:
    """Ids [count] as numbers of L digits; every prefix has its own order of preferred codes."""
    ids = torch.zeros(count, dtype=torch.int64)
    for skew in SKEW:
        rank = (
            (torch.rand(count, generator=generator).pow(skew) * CODES).long().clamp(max=CODES - 1)
        )
        mixed = mix64(ids)
        ids = ids * CODES + (rank * (2 * mixed + 1) + (mixed >> 32)) % CODES
    return ids


def growth_of(fewest: int, count: int, width: int, batch: int, repeats: int, seed: int) -> float:
    """Times longer steps take in a catalogue of `count` items that contains the one of `fewest`.

    All other items begin with codes that the contained ones do not have, so that beams, logits and
    children are the same. Level 0, whose prefix is the same in all catalogues, is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = tree_codes(fewest, generator)
    others = torch.randint(CODES, (count - fewest, LEVELS), generator=generator)
    others[:, 0] += CODES
    small = CatalogueTrie.build(codes, (CODES,) * LEVELS)
    large = CatalogueTrie.build(torch.cat([codes, others]), (2 * CODES, *[CODES] * (LEVELS - 1)))
    config = BeamConfig(beams=width)
    taken = [0.0, 0.0]
    for step in _recorded(small, config, batch, generator)[0][1:]:
        states = large.walk(step.prefixes.flatten(0, 1)).view_as(step.beams.states)
        moved = (
            replace(step.beams, states=states),
            step.logits,
            TrieLevel(large, step.at.level, None),
        )
        runs = (step.beams, step.logits, step.at), moved
        turns = [
            [best_of(partial(advance, config, *run), 1) for run in runs] for _ in range(repeats)
        ]
        assert torch.equal(turns[-1][0][1].scores, turns[-1][1][1].scores), "the steps differ"
        for place in range(2):
            taken[place] += min(turn[place][0] for turn in turns)
    return taken[1] / taken[0]


def compared_share(items: int, beams: int, batch: int) -> float:
    """Share of a batch on which the compare of prefixes, linear in it, is timed."""
    return min(1.0, MOST_COMPARED / (items * beams * batch))


def summary(rows: Sequence[ConstraintRow]) -> dict[str, Any]:
    """Mean step of each case, how many times faster ours is, and whether the bar is met."""
    means = [_mean(case) for case in _cases(rows)]
    fewest = {mean.beams: mean for mean in reversed(means)}
    return {
        "mean_steps": [
            {"items": mean.items, "beams": mean.beams, "ours_ms": mean.ms["ours"]}
            | {f"over {name}": mean.over(name) for name in CONTESTANTS}
            | {"over fewest items": mean.ms["ours"] / fewest[mean.beams].ms["ours"]}
            for mean in means
        ],
        "bar_over_dict_at_50_beams": BAR_OVER_DICT,
        "met": all(mean.over("dict") >= BAR_OVER_DICT for mean in means if mean.beams == 50),
    }


def render(rows: Sequence[ConstraintRow]) -> str:
    """The table: each level and the mean step of each case, ours beside the others' multiples."""
    header = ["items", "beams", "step", "ours ms"]
    for name in CONTESTANTS:
        header += [f"{name} ms", "×"]
    shown = []
    for case in _cases(rows):
        shown += [*(row for row in case if row.step != TO_ITEMS), _mean(case)]
        shown += [row for row in case if row.step == TO_ITEMS]
    return table(header, [_line(row) for row in shown])


def _line(row: ConstraintRow) -> list[str]:
    cells = [f"{row.items:,}", str(row.beams), row.step, f"{row.ms['ours']:.3f}"]
    for name in CONTESTANTS:
        there = name in row.ms
        cells += [f"{row.ms[name]:.2f}", f"{row.over(name):,.1f}"] if there else ["-", ""]
    return cells


def _cases(rows: Sequence[ConstraintRow]) -> list[list[ConstraintRow]]:
    """Rows by catalogue and beams, ascending."""
    cases = sorted({(row.items, row.beams) for row in rows})
    return [[row for row in rows if (row.items, row.beams) == case] for case in cases]


def _mean(case: Sequence[ConstraintRow]) -> ConstraintRow:
    steps = [row.ms for row in case if row.step != TO_ITEMS]
    ms = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    return ConstraintRow(case[0].items, case[0].beams, "mean step", ms)


def _constraint(
    trie: CatalogueTrie,
    rivals: tuple[DictTrie, PrefixComparison],
    width: int,
    batch: int,
    repeats: int,
    generator: torch.Generator,
) -> list[ConstraintRow]:
    config = BeamConfig(beams=width)
    steps, found = _recorded(trie, config, batch, generator)
    by_dict, by_compare = rivals
    share = compared_share(trie.num_items, width, batch)
    rows = []
    for step in steps:
        ours_s, picked = best_of(
            partial(advance, config, step.beams, step.logits, step.at), repeats
        )
        times = {"ours": ours_s, "free": _unconstrained(step, picked, repeats)}
        times["dict"] = _rival(by_dict.mask, step, picked, repeats)
        times["dict numpy"] = _rival(by_dict.mask_numpy, step, picked, repeats)
        times["compare"] = _rival(by_compare.mask, step, picked, repeats, share)
        rows.append(_row(trie, width, f"level {step.at.level}", times))
    ours_s, items = best_of(partial(items_of, found, trie, width), repeats)
    dict_s, expected = best_of(partial(by_dict.items, found.codes, width), repeats)
    assert items.tolist() == expected, "the dict trie resolves ids into other items"
    rows.append(_row(trie, width, TO_ITEMS, {"ours": ours_s, "dict": dict_s}))
    return rows


def _row(trie: CatalogueTrie, width: int, step: str, seconds: dict[str, float]) -> ConstraintRow:
    return ConstraintRow(trie.num_items, width, step, {k: 1e3 * v for k, v in seconds.items()})


def _unconstrained(step: _Step, picked: Beams, repeats: int) -> float:
    count = picked.scores.shape[1]
    run = partial(masked_step, no_mask, step.prefixes, step.logits, step.beams.scores, count)
    return best_of(run, repeats)[0]


def _rival(mask: Mask, step: _Step, picked: Beams, repeats: int, share: float = 1.0) -> float:
    """Seconds of a contestant's step, whose result must be ours.

    With a share below 1, timed on the first requests and scaled to all of them.
    """
    batch, count = picked.scores.shape
    timed = max(1, int(share * batch))
    inputs = (step.prefixes[:timed], step.logits[:timed], step.beams.scores[:timed])
    seconds, (best, totals) = best_of(partial(masked_step, mask, *inputs, count), repeats)
    place = (picked.parents * step.logits.shape[2] + picked.tokens)[:timed]
    expected = picked.scores[:timed]
    torch.testing.assert_close(best, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(totals.gather(1, place), expected, rtol=1e-4, atol=1e-4)
    return seconds * batch / timed


def _recorded(
    trie: CatalogueTrie, config: BeamConfig, batch: int, generator: torch.Generator
) -> tuple[list[_Step], Generated]:
    """The steps of a search under random logits, and what it found."""
    root = torch.zeros(batch, 1, dtype=torch.int64)
    beams, prefixes, steps = first_beams(config, None, root), root[..., None][..., :0], []
    for level in range(LEVELS):
        logits = torch.randn(*beams.states.shape, CODES, generator=generator)
        steps.append(_Step(prefixes, beams, logits, TrieLevel(trie, level, None)))
        beams = advance(config, beams, logits, steps[-1].at)
        earlier = prefixes.gather(1, beams.parents[..., None].expand(-1, -1, level))
        prefixes = torch.cat([earlier, beams.tokens[..., None]], dim=2)
    valid, scores = beams.states >= 0, beams.scores
    assert bool(valid.all()), "there are as many ids as beams"
    return steps, Generated(prefixes, beams.states, scores, scores, scores, valid)
