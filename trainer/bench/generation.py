"""The other half of `tandem bench beam`: encode and generate, against `transformers`.

Our TIGER and the T5 of `transformers` have the same weights and read the same histories; before
anything is timed, both must return the same ids and scores. Contestants take turns, so that other
work on the machine meets them alike.

Shape legend: N requests, S events of each history, L levels, W beams, V items.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from configs import storage
from configs.decoders import TIGERConfig
from configs.generation import BeamConfig
from models.base import CatalogueSizes
from models.batch import JaggedBatch
from models.generation.catalogue_trie import CatalogueTrie
from models.generation.kv_cache import BeamCache
from models.generation.search import Generated, StepDecoder, generate
from models.tiger import TIGER
from trainer.bench import t5_rival
from trainer.bench.beam import CODES, LEVELS, SHARED, SKEW, tree_codes
from trainer.bench.measure import machine, table
from trainer.bench.t5_rival import CachedDictTrie, T5Rival

MODEL = TIGERConfig(
    width=128,
    num_encoder_layers=4,
    num_decoder_layers=4,
    num_heads=4,
    head_width=32,
    feedforward_width=512,
    dropout=0.0,
    history=20,
)
"""2.1M parameters."""
OURS, CONSTRAINED, FREE = "ours", "T5 generate, dict trie", "T5 generate, unconstrained"
MOST_RIVAL_BEAMS = 64
"""Beyond, T5 is not run: it keeps a history's keys once a beam."""
BAR = 8.0
"""Times more users per second than T5 with a dict trie, at 50 beams."""
PARAMETERS_APART = 0.02
TOLERANCE = 1e-4
"""Of log-probabilities of an id."""
TURN_S = 0.5
"""A contestant calls until its turn has lasted this long. Were turns as short as calls, the quicker
contestant would find a quiet moment of a busy machine sooner."""
BUDGET_S = 60.0
"""Of one case; the round that exceeds it is the last."""


@dataclass(frozen=True)
class GenerationRow:
    """One contestant in one case: a batch through encoder and beam search."""

    items: int
    beams: int
    contestant: str
    ms: float
    """Of a batch, wall time."""
    cpu_ms: float
    """Of a batch, over all threads: what a busy machine distorts least."""
    users_per_s: float
    asked: tuple[int, ...]
    """Beams of a request that the model was asked about, by level."""
    asked_share: float
    """Of the beams searched."""


def bench_generation(
    output: str,
    *,
    items: Sequence[int],
    beams: Sequence[int],
    batch: int,
    repeats: int,
    seed: int,
    say: Callable[[str], None],
) -> list[GenerationRow]:
    """Measure, print, and leave `generation.json` below `output` (any URL).

    Without the extra `bench` ours is measured alone, and a sentence says so.

    Raises:
        AssertionError: T5 returns other ids or scores, or has not as many parameters.
    """
    torch.manual_seed(seed)
    model = TIGER(MODEL, (), CatalogueSizes(max(items), 0, {}, {}, (CODES,) * LEVELS)).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"TIGER of {count:,} parameters, {MODEL.history * LEVELS} tokens of history")
    rival = T5Rival(model) if t5_rival.is_installed() else None
    if rival is None:
        say(t5_rival.MISSING)
    else:
        assert abs(rival.num_parameters / count - 1) <= PARAMETERS_APART, rival.num_parameters
    rows: list[GenerationRow] = []
    for each in items:
        case = _Case.of(model, rival, each, batch, seed)
        for width in beams:
            rows += case.measured(width, repeats)
            most = case.most_rival_beams
            alone = f", without T5, which has {most} here at most" if width > most else ""
            say(f"  {each:,} items, {width} beams measured{alone if rival is not None else ''}")
    setting = {"model": MODEL.model_dump(), "parameters": count, "levels": LEVELS, "codes": CODES}
    setting |= {"batch": batch, "seed": seed, "shared": SHARED, "skew": SKEW, "repeats": repeats}
    result = {
        "machine": machine() | {"load": os.getloadavg()},
        "setting": setting,
        "generation": [asdict(row) for row in rows],
        "summary": summary(rows),
    }
    storage.make_directory(output)
    storage.write_json(storage.join(output, "generation.json"), result)
    say("\n" + render(rows))
    return rows


def summary(rows: Sequence[GenerationRow]) -> dict[str, Any]:
    """How many times more users ours serves in each case, and whether the bar is met."""
    ours = {(row.items, row.beams): row for row in rows if row.contestant == OURS}
    times: list[dict[str, Any]] = [
        {
            "items": row.items,
            "beams": row.beams,
            "over": row.contestant,
            "users": _times(ours[row.items, row.beams], row),
            "cpu": row.cpu_ms / ours[row.items, row.beams].cpu_ms,
        }
        for row in rows
        if row.contestant != OURS
    ]
    judged = [x["users"] for x in times if x["over"] == CONSTRAINED and x["beams"] == 50]
    met = all(users >= BAR for users in judged) if judged else None
    return {"times": times, "bar_over_dict_trie_at_50_beams": BAR, "met": met}


def render(rows: Sequence[GenerationRow]) -> str:
    """The table: contestants of each case below each other."""
    ours = {(row.items, row.beams): row for row in rows if row.contestant == OURS}
    lines = []
    for row in rows:
        times = _times(ours[row.items, row.beams], row)
        cells = [f"{row.items:,}", str(row.beams), row.contestant, f"{row.ms:.1f}"]
        lines.append(
            [*cells, f"{row.cpu_ms:.1f}", f"{row.users_per_s:.1f}", f"{times:.1f}", _asked(row)]
        )
    header = ["items", "beams", "contestant", "ms", "cpu ms", "users/s", "ours ×"]
    return table([*header, "beams asked by level"], lines)


def _asked(row: GenerationRow) -> str:
    return f"{' '.join(map(str, row.asked))} ({row.asked_share:.0%})"


def check_alike(ours: Generated, codes: Tensor, scores: Tensor) -> None:
    """Both found the same ids [N, W, L] with the same scores [N, W], best first.

    Neighbours whose scores rounding could swap may be swapped.

    Raises:
        AssertionError: they did not.
    """
    torch.testing.assert_close(ours.scores, scores, atol=TOLERANCE, rtol=0.0)
    near = ours.scores.diff(dim=1).abs() <= 2 * TOLERANCE
    edge = near.new_zeros(near.shape[0], 1)
    # What follows the last one is not known: it may be as near.
    unclear = torch.cat([edge, near], 1) | torch.cat([near, ~edge], 1)
    same = (ours.codes == codes).all(-1)
    assert bool((same | unclear).all()), "T5 returns other ids"


@dataclass(frozen=True)
class _Case:
    """One catalogue, and a batch of histories over it."""

    model: TIGER
    rival: T5Rival | None
    trie: CatalogueTrie
    dict_trie: CachedDictTrie | None
    histories: JaggedBatch

    @staticmethod
    def of(model: TIGER, rival: T5Rival | None, items: int, batch: int, seed: int) -> "_Case":
        generator = torch.Generator().manual_seed(seed)
        codes = tree_codes(items, generator)
        trie = CatalogueTrie.build(codes, (CODES,) * LEVELS)
        dict_trie = None if rival is None else CachedDictTrie(codes, CODES)
        read = torch.randint(items, (batch * MODEL.history,), generator=generator)
        times = torch.arange(read.numel())
        histories = JaggedBatch(
            sample_ids=torch.arange(batch),
            user_ids=torch.arange(batch) + 1,
            offsets=torch.arange(batch + 1) * MODEL.history,
            item_ids=read + 1,
            timestamps=times,
            next_timestamps=times + 1,
            target_ids=torch.zeros_like(read),
            item_codes=codes[read],
        )
        return _Case(model, rival, trie, dict_trie, histories)

    @property
    def most_rival_beams(self) -> int:
        """Of T5: what it is asked for, and as many as there are first codes."""
        return min(MOST_RIVAL_BEAMS, self.trie.num_states(1))

    def measured(self, width: int, repeats: int) -> list[GenerationRow]:
        """A row each contestant.

        T5 is left out of a search that is too wide for it, or that has more beams than first codes:
        it cannot have fewer beams than asked for.
        """
        fits = width <= self.most_rival_beams
        runs: dict[str, Callable[[], object]] = {OURS: partial(self._ours, width)}
        if self.rival is not None and fits:
            assert self.dict_trie is not None and self.histories.item_codes is not None
            read = self.histories.item_codes.unflatten(0, (-1, MODEL.history))
            codes, scores = self.rival.generate(read, width, self.dict_trie, scored=True)
            assert scores is not None
            check_alike(self._ours(width), codes, scores)
            generate_t5 = partial(self.rival.generate, read, width, scored=False)
            runs[CONSTRAINED] = partial(generate_t5, self.dict_trie)
            runs[FREE] = partial(generate_t5, None)
        batch, searched = self.histories.num_sequences, self._searched(width)
        counted = _Counted(self.model)
        self._ours(width, counted)
        asked = {name: tuple(counted.asked) if name == OURS else searched for name in runs}
        return [
            GenerationRow(
                *(self.trie.num_items, width, name, 1e3 * wall, 1e3 * cpu, batch / wall),
                *(asked[name], sum(asked[name]) / sum(searched)),
            )
            for name, (wall, cpu) in _in_turns(runs, repeats).items()
        ]

    def _searched(self, width: int) -> tuple[int, ...]:
        """Beams of a request by level."""
        beams = [1]
        for branch in self.trie.max_branch[:-1]:
            beams.append(min(width, beams[-1] * branch))
        return tuple(beams)

    @torch.inference_mode()
    def _ours(self, width: int, decoder: StepDecoder | None = None) -> Generated:
        context = self.model.encode(self.histories, {}, 0, "last")
        batch = self.histories.num_sequences
        decoder = decoder or self.model
        return generate(decoder, context, batch, self.trie, BeamConfig(beams=width))


class _Counted:
    """A decoder that notes how many beams of a request it is asked about, level by level."""

    def __init__(self, model: TIGER) -> None:
        self._model, self.asked = model, list[int]()
        self.codebook_sizes = model.codebook_sizes
        self.new_cache = model.new_cache

    def step(self, context: Any, cache: BeamCache, level: int, tokens: Tensor | None) -> Tensor:
        """As the model's."""
        self.asked.append(1 if tokens is None else tokens.shape[1])
        return self._model.step(context, cache, level, tokens)


def _in_turns(
    runs: dict[str, Callable[[], object]], repeats: int
) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of each, the shortest of `repeats` turns after one that warms up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for _ in range(repeats + 1):
        for name, run in runs.items():
            taken[name].append(_turn(run))
        if time.perf_counter() - begun > BUDGET_S and len(taken[OURS]) > 1:
            break
    return {
        name: (min(wall for wall, _ in times[1:]), min(cpu for _, cpu in times[1:]))
        for name, times in taken.items()
    }


def _turn(run: Callable[[], object]) -> tuple[float, float]:
    """Mean wall and CPU seconds of as many calls as fill a turn."""
    start, cpu, calls = time.perf_counter(), time.process_time(), 0
    while calls == 0 or time.perf_counter() - start < TURN_S:
        run()
        calls += 1
    return (time.perf_counter() - start) / calls, (time.process_time() - cpu) / calls


def _times(ours: GenerationRow, row: GenerationRow) -> float:
    return ours.users_per_s / row.users_per_s
