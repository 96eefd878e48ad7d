"""Throughput windows, the matmul probe and memory."""

import pytest
import torch

from trainer.monitor.throughput import Throughput, measured_peak_flops, memory_in_use


def test_windows_follow_each_other() -> None:
    ticks = iter([0.0, 2.0, 6.0])
    meter = Throughput(10.0, None, world_size=1, clock=lambda: next(ticks))
    meter.add(100)
    meter.add(100)
    assert meter.read().tokens_per_s == 100
    meter.add(100)
    second = meter.read()
    assert second.tokens_per_s == 25 and second.mfu is None


def test_mfu_is_the_share_of_all_ranks_peak() -> None:
    ticks = iter([0.0, 1.0])
    meter = Throughput(2.0, 300.0, world_size=4, clock=lambda: next(ticks))
    meter.add(100)
    assert meter.read().mfu == pytest.approx(100 * 2 * 3 / (300 * 4))


def test_pauses_do_not_slow_training_down() -> None:
    ticks = iter([0.0, 1.0, 91.0, 100.0])
    meter = Throughput(1.0, None, world_size=1, clock=lambda: next(ticks))
    with meter.paused():
        pass  # the clock passes 90 seconds
    meter.add(100)
    assert meter.read().tokens_per_s == 10


def test_the_probe_measures_something_plausible_and_only_once() -> None:
    cpu = torch.device("cpu")
    peak = measured_peak_flops(cpu, torch.float32)
    assert 1e8 < peak < 1e14
    assert measured_peak_flops(cpu, torch.float32) == peak


def test_memory_grows_with_what_is_held() -> None:
    before = memory_in_use(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = memory_in_use(torch.device("cpu"))
    assert after.rss - before.rss > held.numel() // 2
    assert after.device is None
