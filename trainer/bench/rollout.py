"""`tandem bench rollout`: groups per second against a plain loop, and where a step's time goes.

Both families of models align a synthetic data set by GRPO on this process alone, through the very
code of the stage. The plain loop has the same policy and prompts, and draws one candidate after the
other; before anything is timed, what it says of its own candidates must be what the loss says.

Shape legend: N prompts, G candidates of a prompt, L code levels, V items.
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from configs import storage
from configs.alignment import GRPOConfig
from configs.recipe import Recipe
from data_loaders.semantic_ids import write_semantic_ids
from data_loaders.synthetic import write_synthetic
from models.base import CodeDecoder, SequenceModel, TableModel
from models.batch import JaggedBatch
from models.generation.log_probs import child_log_probs
from models.ops.windows import windows_ending_at
from sharding.parallelize import ParallelModel
from trainer.align_online import OnlineUpdates, prompt_loader
from trainer.bench.measure import best_of, machine, table
from trainer.codes import with_codes
from trainer.logged_steps import LoggedSteps
from trainer.objectives.online import OnlineLoss
from trainer.objectives.scoring import Candidates
from trainer.policy import Worker, parallelize_policy, start_worker
from trainer.scoring import Likelihood, build_scorer
from trainer.trainer import TrainerState

CODES, LEVELS, WIDTH, HISTORY = 256, 3, 64, 20
USERS = 512
TOLERANCE = 1e-3
"""Of log-probabilities."""
PARTS = ("prompts", "rollout", "reward", "inputs", "loss", "update")


@dataclass(frozen=True)
class RolloutRow:
    """One family of models."""

    family: str
    items: int
    groups_per_s: float
    plain_groups_per_s: float
    seconds: dict[str, float]
    """Part of a step → its shortest wall time."""


def bench_rollout(
    output: str, *, items: int, prompts: int, group: int, repeats: int, seed: int, say: Any
) -> list[RolloutRow]:
    """Measure, print, and leave `rollout.json` below `output` (any URL).

    Raises:
        AssertionError: the plain loop disagrees with the loss on a candidate's probability.
    """
    rows = []
    for family in ("items (hstu)", "semantic ids (tiger)"):
        url = storage.join(storage.absolute(output), family.split()[0])
        rows.append(_measured(family, url, items, prompts, group, repeats, seed))
        say(f"  {family}: measured")
    setting = {"items": items, "prompts": prompts, "group": group, "width": WIDTH, "seed": seed}
    result = {
        "machine": machine() | {"load": os.getloadavg()},
        "setting": setting,
        "rollout": [asdict(row) for row in rows],
    }
    storage.write_json(storage.join(output, "rollout.json"), result)
    say("\n" + render(rows))
    return rows


def render(rows: list[RolloutRow]) -> str:
    """The table that is printed."""
    header = ["family", "groups/s", "plain loop", "times", *(f"{part} ms" for part in PARTS)]
    return table(
        header,
        [
            [
                row.family,
                f"{row.groups_per_s:,.1f}",
                f"{row.plain_groups_per_s:,.1f}",
                f"{row.groups_per_s / row.plain_groups_per_s:.1f}",
                *(f"{1000 * row.seconds[part]:,.1f}" for part in PARTS),
            ]
            for row in rows
        ],
    )


def _measured(
    family: str, url: str, items: int, prompts: int, group: int, repeats: int, seed: int
) -> RolloutRow:
    """One family, trained for a few steps on data that are written first."""
    worker = _worker(family.startswith("semantic"), url, items, prompts, group, seed)
    config = worker.recipe.alignment
    assert isinstance(config, GRPOConfig)
    loss = OnlineLoss(build_scorer(worker, normalised=True), config)
    policy = parallelize_policy(
        worker,
        loss.model,
        loss,
        total_steps=1000,
        optimizer=config.optimizer,
        sparse_lr=worker.recipe.sharding.optimizer.lr,
    )
    updates = OnlineUpdates(worker, config, loss, None)
    updates.attach(policy, LoggedSteps(1, repeats + 1, repeats + 1, guarded=False))
    with prompt_loader(worker, config, TrainerState()) as loader:
        steps = [next(loader) for _ in range(repeats + 1)]
    first = updates.cut(steps[0])
    generator = torch.Generator().manual_seed(seed)
    batch = first[0].batch
    drawn, log_probs = plain_rollout(worker, policy, batch, group, generator)
    told = Likelihood.of(worker, policy)(drawn)
    apart = float((told - log_probs).abs().max())
    assert apart <= TOLERANCE, f"the plain loop's log-probabilities are {apart} off the loss's"
    plain, _ = best_of(lambda: plain_rollout(worker, policy, batch, group, generator), repeats)
    ours, _ = best_of(lambda: updates.rolled_out(first, 0), repeats)
    number = batch.num_sequences
    seconds = _parts(updates, policy, steps)
    return RolloutRow(family, items, number / ours, number / plain, seconds)


def _parts(updates: OnlineUpdates, policy: ParallelModel, steps: list[Any]) -> dict[str, float]:
    """Shortest time of each part of a step; the first step only warms up."""
    times: dict[str, list[float]] = defaultdict(list)
    backward = policy._backward

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times[part].append(time.perf_counter() - begun)

    def timed_backward(*args: Any) -> Any:
        with timed("loss"):
            return backward(*args)

    inside: Any = policy
    inside._backward = timed_backward  # a step does both at once
    for step in steps:
        with timed("prompts"):
            prompts = updates.cut(step)
        with timed("rollout"):
            rollouts = updates.rolled_out(prompts, step.step)
        with timed("reward"):
            rewarded = updates.rewarded(rollouts)
        with timed("inputs"):
            inputs = updates.inputs(prompts, rollouts, rewarded, step.step)
        with timed("update"):
            policy.train_step(inputs, step.sample_ids)
        times["update"][-1] -= times["loss"][-1]
    return {part: min(values[1:]) for part, values in times.items()}


def plain_rollout(
    worker: Worker,
    policy: ParallelModel,
    batch: JaggedBatch,
    group: int,
    generator: torch.Generator,
) -> tuple[Candidates, Tensor]:
    """Groups of independent samples, one prompt and one candidate after the other.

    Returns:
        the candidates, and log π [N, G] as the loop met it.
    """
    ends = batch.offsets[1:] - 1
    singles = [windows_ending_at(batch, end[None], HISTORY) for end in ends]
    draw = _draw_codes if isinstance(policy.model, CodeDecoder) else _draw_items
    drawn = [draw(worker, policy, single, group, generator) for single in singles]
    found, log_probs = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    if found.dim() == 2:
        return Candidates(batch, found), log_probs
    read = with_codes(batch, worker.catalogue.codes)
    nobody = torch.ones(found.shape[:2], dtype=torch.int64)
    return Candidates(read, nobody, found), log_probs


def _draw_items(
    worker: Worker, policy: ParallelModel, batch: JaggedBatch, group: int, generator: Any
) -> tuple[Tensor, Tensor]:
    """Items [G] of one prompt, and their log π."""
    objective: Any = worker.recipe.objective

    def use(model: TableModel, embeddings: dict[str, Tensor]) -> Tensor:
        assert isinstance(model, SequenceModel)
        queries: Tensor = model(batch, embeddings, 0)
        return queries[-1].float()

    query = policy.infer(batch, use)
    keys = policy.item_keys(torch.arange(1, worker.num_items + 1))
    log_probs = (keys @ query / objective.temperature).log_softmax(0)
    items = [
        int(torch.multinomial(log_probs.exp(), 1, generator=generator)) + 1 for _ in range(group)
    ]
    chosen = torch.tensor(items)
    return chosen, log_probs[chosen - 1]


def _draw_codes(
    worker: Worker, policy: ParallelModel, batch: JaggedBatch, group: int, generator: Any
) -> tuple[Tensor, Tensor]:
    """Ids [G, L] of one prompt, written code by code, and their log π."""
    trie = worker.catalogue.trie
    batch = with_codes(batch, worker.catalogue.codes)

    def use(model: TableModel, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        assert isinstance(model, CodeDecoder)
        context = model.encode(batch, embeddings, 0, "last")
        ids: list[list[int]] = []
        sums: list[float] = []
        for _ in range(group):
            cache, state = model.new_cache(context), torch.zeros(1, 1, dtype=torch.int64)
            written: list[int] = []
            total = 0.0
            for level in range(trie.num_levels):
                last = torch.tensor([[written[-1]]]) if written else None
                logits = model.step(context, cache, level, last)
                tokens, following, legal = trie.children(level, state)
                log_probs = child_log_probs(logits, tokens, legal)[0, 0]
                place = int(torch.multinomial(log_probs.exp(), 1, generator=generator))
                total += float(log_probs[place])
                written.append(int(tokens[0, 0, place]))
                state = following[:, :, place]
                if level + 1 < trie.num_levels:
                    cache.select(torch.zeros(1, 1, dtype=torch.int64))
            ids.append(written)
            sums.append(total)
        return torch.tensor(ids), torch.tensor(sums)

    found: tuple[Tensor, Tensor] = policy.infer(batch, use)
    return found


def _worker(codes: bool, url: str, items: int, prompts: int, group: int, seed: int) -> Worker:
    """The worker of an online alignment on synthetic data, in a world of one."""
    data = storage.join(url, "data")
    write_synthetic(data, USERS, items, HISTORY, seed, features=False)
    settings: dict[str, Any] = {"output": url, "fingerprint": "bench", "semantic_ids": None}
    recipe: dict[str, Any] = {
        "name": "bench-rollout",
        "output": url,
        "seed": seed,
        "data": {
            "source": {"kind": "public", "name": "ml-100k"},
            "loader": {"global_batch": prompts, "max_length": HISTORY, "prefetch": 0},
        },
        "model": {"kind": "hstu", "width": WIDTH, "num_layers": 2},
        "sharding": {"default": "row_wise"},
        "alignment": {
            "kind": "grpo",
            "rule": None,
            "reference": None,
            "supervised_weight": 0,
            "prompts": {"per_step": prompts},
            "generation": {"kind": "ancestral", "samples": group},
            "rewards": [{"kind": "hit"}, {"kind": "rank"}],
        },
        "evaluation": {"ks": [10]},
        "cluster": {"num_workers": 1, "threads_per_worker": torch.get_num_threads()},
    }
    if codes:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(CODES, (items + 1, LEVELS), generator=generator)
        settings["semantic_ids"] = storage.join(url, "semantic_ids")
        write_semantic_ids(
            settings["semantic_ids"], data, ids, (CODES,) * LEVELS, tokenizer="random"
        )
        recipe |= {
            "model": {"kind": "tiger", "width": WIDTH, "history": HISTORY}
            | {"num_encoder_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
            | {"head_width": WIDTH // 4, "feedforward_width": 4 * WIDTH},
            "objective": {"kind": "next_code"},
            "tokenizer": {"embeddings": [{"kind": "text"}], "collisions": "keep"},
        }
    settings["recipe"] = Recipe.model_validate(recipe).model_dump(mode="json")
    return start_worker(settings, lambda line: None)
