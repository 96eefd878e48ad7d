"""Progress lines: refreshed in place on a terminal, rationed whole lines elsewhere."""

import io
import re
from collections.abc import Callable

import pytest

from trainer.monitor.progress import Progress, count, duration, size
from trainer.monitor.throughput import Memory, Speed


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def start(
    clock: Clock,
    stream: io.StringIO,
    say: Callable[[str], None] | None = None,
    start_step: int = 0,
) -> Progress:
    return Progress("pretrain", 100, start_step, say=say, stream=stream, clock=clock)


def step(progress: Progress, clock: Clock, number: int, seconds: float) -> None:
    clock.now += seconds
    speed = Speed(tokens_per_s=50_000 / seconds, mfu=0.0075)
    progress.update(number, 0, 4.25, speed, Memory(rss=3 << 30, device=None, device_total=None))


def test_a_line_says_everything() -> None:
    clock, stream = Clock(), io.StringIO()
    step(start(clock, stream), clock, 20, 10.0)
    line = stream.getvalue()
    for part in ("pretrain", "step 20/100 (20%)", "epoch 1", "loss 4.2500", "5k tokens/s"):
        assert part in line
    assert "MFU 0.8%" in line and "memory 3.0 GiB" in line
    assert "elapsed 0:10" in line and "left 0:40" in line


def test_without_a_terminal_lines_are_rationed_and_none_is_lost() -> None:
    clock, stream = Clock(), io.StringIO()
    with start(clock, stream) as progress:
        for number in range(1, 31):
            step(progress, clock, number, 1.0)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6 + 1  # steps 1, 6, …, 26, and the one held back at the end
    assert "step 30/100" in lines[-1] and "\r" not in stream.getvalue()


def test_the_last_step_is_always_told() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = start(clock, stream)
    step(progress, clock, 99, 1.0)
    step(progress, clock, 100, 0.1)
    progress.close()
    assert [line.split("  ")[1] for line in stream.getvalue().splitlines()] == [
        "step 99/100 (99%)",
        "step 100/100 (100%)",
    ]


def test_on_a_terminal_the_line_is_rewritten_and_notes_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    clock, stream = Clock(), Terminal()
    with start(clock, stream) as progress:
        step(progress, clock, 25, 1.0)
        progress.note("validation ndcg@10 0.1200")
        step(progress, clock, 50, 1.0)
    shown = stream.getvalue()
    assert shown.count("\n") == 2  # after the note and at the end
    assert "━━━━━━━━┄┄┄┄┄┄┄┄  50%" in shown
    drawn = [part for part in re.split(r"\r\x1b\[K|\n", shown) if part]
    assert max(map(len, drawn)) < 60 and "validation ndcg@10 0.1200" in drawn


def test_a_worker_speaks_through_its_own_channel() -> None:
    clock, stream, said = Clock(), Terminal(), list[str]()
    with start(clock, stream, said.append) as progress:
        step(progress, clock, 10, 1.0)
        step(progress, clock, 11, 1.0)
        progress.note("saved")
    assert stream.getvalue() == ""
    assert [line.split("  ")[0] for line in said] == ["pretrain", "saved", "pretrain"]
    assert not any("\x1b" in line or "\n" in line for line in said)


def test_time_left_counts_only_this_process() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = start(clock, stream, start_step=90)
    step(progress, clock, 95, 10.0)
    assert "left 0:10" in stream.getvalue()


def test_on_a_gpu_its_memory_is_shown() -> None:
    clock, stream = Clock(), io.StringIO()
    memory = Memory(rss=1, device=30 << 30, device_total=80 << 30)
    start(clock, stream).update(1, 0, 1.0, Speed(1.0, None), memory, {"accuracy": 0.61})
    line = stream.getvalue()
    assert "GPU 30.0 GiB of 80.0 GiB" in line and "accuracy 0.61" in line and "MFU" not in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(950), "950"),
        (count(999.6), "1k"),
        (count(41_234), "41.2k"),
        (count(3.07e6), "3.07M"),
        (size(512), "512 B"),
        (size(2 * 1024**3), "2.0 GiB"),
        (duration(59.6), "1:00"),
        (duration(3725), "1:02:05"),
        (duration(273_000), "3d 03:50"),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected
