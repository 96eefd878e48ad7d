"""What the distributed steps of preparation say while they work."""

import threading

from data_loaders.exchange import Progress


def test_a_phase_without_a_ready_part_says_that_it_goes_on() -> None:
    lines: list[str] = []
    twice = threading.Event()

    def say(line: str) -> None:
        lines.append(line)
        if sum("part 1 of 3 after" in each for each in lines) == 2:
            twice.set()

    progress = Progress(say, every_s=0.0, patience_s=0.04)
    with progress.phase("read", 3):
        progress.step("read", 1, 3, 10)
        assert twice.wait(30)
    assert "part 1 of 3," in lines[0] and all("wait for a free CPU" in each for each in lines[1:])
    said = len(lines)
    assert not threading.Event().wait(0.1) and len(lines) == said
