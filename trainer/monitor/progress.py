"""One line that says where training stands.

On a terminal the line is refreshed in place. Anywhere else (a log file, a Ray worker whose lines
the driver prints) whole lines come out, at most one every few seconds.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

from trainer.monitor.throughput import Memory, Speed

TERMINAL_EVERY_S = 0.1
LINE_EVERY_S = 5.0
BAR_CELLS = 16
ERASE_LINE = "\r\x1b[K"


class Progress:
    """Progress of one stage; a context manager, so that the last line is never lost."""

    def __init__(
        self,
        stage: str,
        total_steps: int,
        start_step: int = 0,
        *,
        say: Callable[[str], None] | None = None,
        stream: TextIO | None = None,
        every_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the stage's clock.

        Args:
            stage: word that begins each line.
            total_steps: optimizer steps of the whole stage.
            start_step: steps done before this process (a resumed stage).
            say: receives whole lines instead of `stream` (a worker's way to the terminal).
            stream: where to print; standard output unless told.
            every_s: least seconds between lines; 0.1 on a terminal, 5 elsewhere.
            clock: seconds, for tests.
        """
        self._stage, self._total, self._first = stage, total_steps, start_step
        self._stream = sys.stdout if stream is None else stream
        self._say = say
        self._in_place = say is None and self._stream.isatty()
        default = TERMINAL_EVERY_S if self._in_place else LINE_EVERY_S
        self._every_s = default if every_s is None else every_s
        self._clock = clock
        self._start = clock()
        self._shown_at = -math.inf
        self._line = ""
        self._pending = False

    def update(
        self,
        step: int,
        epoch: int,
        loss: float,
        speed: Speed,
        memory: Memory,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Tell of the newest step; printed now if the last line is old enough or this is the end.

        Args:
            step: optimizer steps done, of the whole stage.
            epoch: epoch of that step, counted from 0.
            loss: mean loss of the step over all ranks.
            speed: since the last update.
            memory: of this process.
            metrics: further numbers worth a glance, by name.
        """
        self._line = self._render(step, epoch, loss, speed, memory, metrics or {})
        self._pending = True
        if step >= self._total or self._clock() - self._shown_at >= self._every_s:
            self._show()

    def note(self, text: str) -> None:
        """Print a line that stays, above the refreshed one: a validation, a checkpoint."""
        if self._say is not None:
            self._say(text)
            return
        self._stream.write(f"{ERASE_LINE if self._in_place else ''}{text}\n")
        if self._in_place and self._line:
            self._stream.write(self._fitted(self._line))
        self._stream.flush()

    def close(self) -> None:
        """Print what was held back and leave the cursor on a fresh line."""
        if self._pending:
            self._show()
        if self._in_place and self._line:
            self._stream.write("\n")
            self._stream.flush()
        self._line = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _show(self) -> None:
        self._shown_at, self._pending = self._clock(), False
        if self._say is not None:
            self._say(self._line)
            return
        if self._in_place:
            self._stream.write(ERASE_LINE + self._fitted(self._line))
        else:
            self._stream.write(self._line + "\n")
        self._stream.flush()

    def _fitted(self, line: str) -> str:
        # A wrapped line could not be erased; the last column is left to the cursor.
        return line[: shutil.get_terminal_size().columns - 1]

    def _render(
        self,
        step: int,
        epoch: int,
        loss: float,
        speed: Speed,
        memory: Memory,
        metrics: Mapping[str, float],
    ) -> str:
        share = min(step / max(self._total, 1), 1.0)
        elapsed = self._clock() - self._start
        done = step - self._first
        left = elapsed / done * max(self._total - step, 0) if done > 0 else None
        parts = [
            f"{self._stage}  {_bar(share)} {share:4.0%}" if self._in_place else self._stage,
            f"step {step:,}/{self._total:,}" + ("" if self._in_place else f" ({share:.0%})"),
            f"epoch {epoch + 1}",
            f"loss {loss:.4f}",
            *(f"{name} {value:.4g}" for name, value in metrics.items()),
            f"{count(speed.tokens_per_s)} tokens/s",
            *([] if speed.mfu is None else [f"MFU {speed.mfu:.1%}"]),
            _memory(memory),
            f"elapsed {duration(elapsed)}",
            f"left {'?' if left is None else duration(left)}",
        ]
        return "  ".join(parts)


def _bar(share: float) -> str:
    filled = round(share * BAR_CELLS)
    return "━" * filled + "┄" * (BAR_CELLS - filled)


def _memory(memory: Memory) -> str:
    if memory.device is None or memory.device_total is None:
        return f"memory {size(memory.rss)}"
    return f"GPU {size(memory.device)} of {size(memory.device_total)}"


def count(value: float) -> str:
    """A count in three digits: 950, 41.2k, 3.07M, 1.2G."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * scale:
            digits = f"{value / scale:.3g}"
            return f"{digits}{unit}"
    return f"{value:.0f}"


def size(num_bytes: float) -> str:
    """Bytes in binary units: 512 B, 1.9 GiB."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """Time as 4:07, 1:02:05 or 3d 04:10."""
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"
