"""Shards of a catalogue's embeddings in Ray actors, and fitting a quantizer over them.

Each holder keeps the embeddings of some consecutive parts in memory; fitting sends it tasks and
adds up what comes back. The driver sees progress and the fitted quantizer only.

Shape legend: n items of a shard, D width, L code levels.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from configs.tokenizers import Quantizer as QuantizerConfig
from data_loaders.exchange import users_error
from models.tokenizers.build import save_quantizer
from models.tokenizers.fit import fit_quantizer
from models.tokenizers.shards import Shard
from trainer.codes_quality import Quality, measure_quality
from trainer.item_codes import stage_shard
from trainer.item_embeddings import ItemEmbeddings
from trainer.monitor.progress import duration

POLL_S = 0.5
SAY_EVERY_S = 5.0
SETTLE_S = 2.0
"""For so long what tasks held that have just ended may still count as taken."""
HOLDER_GPU, FITTER_GPU = 0.75, 0.25
"""A holder leaves room on its GPU for the one process that trains an RQ-VAE."""


class _Holder:
    """One shard."""

    def __init__(self, embeddings: ItemEmbeddings, parts: Sequence[int], device: str) -> None:
        first = embeddings.parts[parts[0]].first_id - 1
        rows = torch.cat([embeddings.matrix(part) for part in parts])
        self._shard = Shard(first, rows.to(device))

    def up(self) -> None:
        """Answers once the shard is loaded."""

    def apply(self, task: Callable[..., Any], *arguments: Any) -> Any:
        return task(self._shard, *arguments)


@dataclass(frozen=True)
class ActorShards:
    """`models.tokenizers.shards.Shards` over holders; travels to other processes."""

    holders: tuple[ActorHandle, ...]

    def map(self, task: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`task(shard, *arguments)` of every shard, at once; results in the order of rows."""
        shared = [ray.put(argument) for argument in arguments]
        return list(ray.get([holder.apply.remote(task, *shared) for holder in self.holders]))


@dataclass(frozen=True)
class _Job:
    """What the fitter is told."""

    config: QuantizerConfig
    shards: ActorShards
    embeddings: ItemEmbeddings
    tokenizer_url: str
    ranked: bool
    device: str
    seed: int


class _Fitter:
    """Fits in one thread and tells of it in another."""

    def __init__(self) -> None:
        self._told: tuple[int, int, float] | None = None

    def run(self, job: _Job) -> Quality:
        def hear(step: int, total: int, loss: float) -> None:
            self._told = (step, total, loss)

        shards, width = job.shards, job.embeddings.width
        quantizer = fit_quantizer(
            shards, width, job.config, device=job.device, seed=job.seed, progress=hear
        )
        save_quantizer(quantizer, job.tokenizer_url)
        parts, staging = job.embeddings.parts, job.embeddings.staging_url
        shards.map(stage_shard, parts, staging, quantizer, job.ranked)
        return measure_quality(shards, quantizer, job.seed)

    def told(self) -> tuple[int, int, float] | None:
        return self._told


@contextmanager
def hold(
    embeddings: ItemEmbeddings, device: str, say: Callable[[str], None]
) -> Iterator[ActorShards]:
    """Holders of all items, one a free CPU (or GPU) and at most one a part; gone at the end.

    There is one at least, which is waited for where nothing is free.
    """
    filled = [index for index, part in enumerate(embeddings.parts) if part.rows]
    unit = "GPU" if device == "cuda" else "CPU"
    count = _free(unit, len(filled), say)
    options = {"num_gpus": HOLDER_GPU} if device == "cuda" else {"num_cpus": 1}
    groups = consecutive(np.array([embeddings.parts[index].rows for index in filled]), count)
    holders = tuple(
        ray.remote(_Holder)
        .options(**options)
        .remote(embeddings, [filled[i] for i in group], device)
        for group in groups
    )
    try:
        _await(holders, unit, say)
        yield ActorShards(holders)
    finally:
        for actor in holders:
            ray.kill(actor)


def _free(unit: str, most: int, say: Callable[[str], None]) -> int:
    """How many of `most` holders have room now; 1 where none has."""
    wanted = max(min(int(ray.cluster_resources().get(unit, 0)), most), 1)
    until = time.monotonic() + SETTLE_S
    while (free := int(ray.available_resources().get(unit, 0))) < wanted:
        if time.monotonic() > until:
            say(f"  only {free} of {wanted} {unit}s are free to hold embeddings")
            break
        time.sleep(POLL_S)
    return max(min(free, wanted), 1)


def _await(holders: Sequence[ActorHandle], unit: str, say: Callable[[str], None]) -> None:
    """Return once all are up, or failed, which fitting tells."""
    began, left = time.monotonic(), [holder.up.remote() for holder in holders]
    while left:
        _, left = ray.wait(left, num_returns=len(left), timeout=SAY_EVERY_S)
        if left:
            say(
                f"  hold embeddings  {len(holders) - len(left)} of {len(holders)} processes are up "
                f"(each waits for a free {unit}, then loads)  elapsed "
                f"{duration(time.monotonic() - began)}"
            )


def consecutive(sizes: np.ndarray, groups: int) -> list[np.ndarray]:
    """Indices of `sizes` [n] in at most `groups` runs of alike sums, none of them empty."""
    middle = np.cumsum(sizes) - sizes / 2
    group = np.minimum((middle / sizes.sum() * groups).astype(np.int64), groups - 1)
    runs = [np.flatnonzero(group == index) for index in range(groups)]
    return [run for run in runs if len(run)]


def fit_and_stage(
    config: QuantizerConfig,
    embeddings: ItemEmbeddings,
    tokenizer_url: str,
    *,
    ranked: bool,
    device: str,
    seed: int,
    say: Callable[[str], None],
) -> Quality:
    """Fit a quantizer to all items, write it below `tokenizer_url`, stage the items' codes.

    Args:
        ranked: stage candidates of the last level, too (`next_best`).

    Returns:
        What the codes are worth, on a sample of the items.

    Raises:
        ValueError: the embeddings or the settings cannot be fitted.
    """
    options = {"num_gpus": FITTER_GPU} if device == "cuda" else {"num_cpus": 0}
    with hold(embeddings, device, say) as shards:
        fitter = ray.remote(_Fitter).options(max_concurrency=2, **options).remote()
        try:
            job = _Job(config, shards, embeddings, tokenizer_url, ranked, device, seed)
            result = fitter.run.remote(job)
            _watch(result, fitter, say)
            quality: Quality = ray.get(result)
            return quality
        except ray.exceptions.RayTaskError as error:
            raise users_error(error) from error
        finally:
            ray.kill(fitter)


def _watch(result: ray.ObjectRef, fitter: ActorHandle, say: Callable[[str], None]) -> None:
    began = said = time.monotonic()
    done = False
    while not done:
        done = bool(ray.wait([result], timeout=POLL_S)[0])
        now = time.monotonic()
        if now - said < SAY_EVERY_S and not done:
            continue
        told = ray.get(fitter.told.remote())
        said = now
        if told is not None:
            step, total, loss = told
            say(_fit_line(step, total, loss, now - began))


def _fit_line(step: int, total: int, loss: float, spent: float) -> str:
    left = spent / step * (total - step)
    return (
        f"  fit quantizer  step {step:,}/{total:,} ({step / total:.0%})  loss {loss:.5f}  "
        f"{step / spent:.3g} steps/s  elapsed {duration(spent)}  left {duration(left)}"
    )
