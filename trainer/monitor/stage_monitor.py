"""What rank 0 shows and records while a stage trains: progress line, TensorBoard, metrics file."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType

import torch

from trainer.monitor.progress import Progress
from trainer.monitor.throughput import Throughput, measured_peak_flops, memory_in_use
from trainer.monitor.tracker import Tracker

SHOWN = ("reward", "accuracy", "kl")
"""What the line of an alignment shows besides its loss, which says little of a policy: while the
policy is the one that was rolled out, the loss of a group is 0."""


class StageMonitor:
    """Progress, throughput and tracker of one training stage. Other ranks have none."""

    def __init__(
        self,
        stage: str,
        *,
        total_steps: int,
        start_step: int,
        unjudged: bool = False,
        directory_url: str,
        forward_flops_per_token: float,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
        say: Callable[[str], None],
    ) -> None:
        """Open the tracker at the resumed step, which is maybe `unjudged`; start the clocks."""
        self._device = device
        self._tracker = Tracker(directory_url, start_step or None, unjudged=unjudged)
        self._progress = Progress(stage, total_steps, start_step, say=say)
        peak = measured_peak_flops(device, dtype)
        self._throughput = Throughput(forward_flops_per_token, peak, world_size)

    def add_tokens(self, tokens: int) -> None:
        """Count a step's tokens over all ranks."""
        self._throughput.add(tokens)

    def paused(self) -> AbstractContextManager[None]:
        """Context whose time is not training: validation, saving."""
        return self._throughput.paused()

    def log_step(self, step: int, epoch: int, loss: float, values: Mapping[str, float]) -> None:
        """Record and show a training step."""
        speed, memory = self._throughput.read(), memory_in_use(self._device)
        row = {"train/loss": loss, "epoch": float(epoch), "speed/tokens_per_s": speed.tokens_per_s}
        row |= {f"train/{name}": value for name, value in values.items()}
        row["memory/rss_bytes"] = float(memory.rss)
        if speed.mfu is not None:
            row["speed/mfu"] = speed.mfu
        self._tracker.log(step, row)
        shown = {name: values[name] for name in SHOWN if name in values}
        self._progress.update(step, epoch, loss, speed, memory, shown)

    def log_validation(self, step: int, metrics: Mapping[str, float], sentence: str) -> None:
        """Record validation metrics and say how they compare."""
        self._tracker.log(step, {f"validation/{name}": v for name, v in metrics.items()})
        self._progress.note(sentence)

    def log_alarm(self, sentence: str) -> None:
        """Say that a guardrail is broken, and what follows."""
        self._progress.note(sentence)

    def flush(self) -> None:
        """Make all rows durable; call before a checkpoint is committed."""
        self._tracker.flush()

    def __enter__(self) -> "StageMonitor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Print the last line and close the files."""
        self._progress.close()
        self._tracker.__exit__(kind, error, trace)
