"""`tandem bench`: measurements that the README quotes, each against how others do it."""

from collections.abc import Callable
from typing import Any

import click
from click.decorators import FC

from configs.terminal import say

_threads = click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=None,
    help="Threads of every contestant.  [default: the machine's cores]",
)


def add_commands(group: click.Group) -> None:
    """Add every bench to the group `tandem bench`; each is one function below."""
    _add_beam(group)
    _add_decoders(group)
    _add_rollout(group)
    _add_checkpoint(group)


def _output(files: str) -> Callable[[FC], FC]:
    told = f"Directory (any URL) for {files}."
    return click.option("--output", default="runs/bench", show_default=True, help=told)


def _add_beam(group: click.Group) -> None:
    @group.command("beam")
    @_output("beam.json and generation.json")
    @click.option(
        "--part",
        type=click.Choice(["all", "constraint", "generation"]),
        default="all",
        show_default=True,
        help="The constraint step alone, whole generation alone, or both.",
    )
    @click.option(
        "--items",
        type=click.IntRange(min=2),
        multiple=True,
        default=(12_101, 1_000_000),
        show_default=True,
        help="Catalogue size (repeatable).",
    )
    @click.option(
        "--beams",
        type=click.IntRange(min=1),
        multiple=True,
        default=(50, 512),
        show_default=True,
        help="Beams a request (repeatable).",
    )
    @click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True)
    @click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True)
    @click.option("--seed", type=int, default=0, show_default=True)
    @_threads
    def beam(output: str, part: str, threads: int | None, **sizes: Any) -> None:
        """Constrained beam search: its constraint step, against a dict trie and a compare of
        prefixes, and whole generation, against transformers' generate (extra `bench`)."""
        from trainer.bench import measure
        from trainer.bench.beam import bench_beam
        from trainer.bench.generation import bench_generation

        with measure.threads(threads):
            if part in ("all", "constraint"):
                bench_beam(output, **sizes, say=say)
            if part in ("all", "generation"):
                bench_generation(output, **sizes, say=say)


def _add_decoders(group: click.Group) -> None:
    @group.command("decoders")
    @_output("decoders.json")
    @click.option("--width", type=click.IntRange(min=8), default=256, show_default=True)
    @click.option("--layers", type=click.IntRange(min=2), default=8, show_default=True)
    @click.option("--heads", type=click.IntRange(min=1), default=4, show_default=True)
    @click.option("--levels", type=click.IntRange(min=1), default=3, show_default=True)
    @click.option("--codes", type=click.IntRange(min=2), default=256, show_default=True)
    @click.option("--history", type=click.IntRange(min=1), default=100, show_default=True)
    @click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True)
    @click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
    @click.option("--seed", type=int, default=0, show_default=True)
    def decoders(output: str, batch: int, repeats: int, seed: int, **sizes: int) -> None:
        """Training cost of lazy decoder, encoder-decoder and naive decoder-only, side by side."""
        from trainer.bench.decoders import Shape, bench_decoders

        shape = Shape(**sizes)
        bench_decoders(output, shape, batch=batch, repeats=repeats, seed=seed, say=say)


def _add_rollout(group: click.Group) -> None:
    @group.command("rollout")
    @_output("data and rollout.json")
    @click.option("--items", type=click.IntRange(min=2), default=12_101, show_default=True)
    @click.option("--prompts", type=click.IntRange(min=1), default=64, show_default=True)
    @click.option("--group", type=click.IntRange(min=2), default=16, show_default=True)
    @click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
    @click.option("--seed", type=int, default=0, show_default=True)
    @_threads
    def rollout(output: str, threads: int | None, **sizes: int) -> None:
        """Groups per second of online alignment against a plain loop, and a step's parts."""
        from trainer.bench import measure
        from trainer.bench.rollout import bench_rollout

        with measure.threads(threads):
            bench_rollout(output, **sizes, say=say)


def _add_checkpoint(group: click.Group) -> None:
    @group.command("checkpoint")
    @_output("checkpoint.json")
    @click.option("--items", type=click.IntRange(min=100), default=400_000, show_default=True)
    @click.option("--width", type=click.IntRange(min=8), default=256, show_default=True)
    @click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True)
    @click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
    @click.option("--seed", type=int, default=0, show_default=True)
    @_threads
    def checkpoint(output: str, threads: int | None, **sizes: int) -> None:
        """Saving and loading against plain sequential writing and reading of as many bytes, and
        what training waits for a save behind it."""
        from trainer.bench import measure
        from trainer.bench.checkpoint import bench_checkpoint

        with measure.threads(threads):
            bench_checkpoint(output, **sizes, say=say)
