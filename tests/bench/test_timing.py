"""Rounds, intervals, and the clock of a GPU."""

import contextlib
import time
import types

import torch
from pytest_benchmark.stats import Stats

from bench import timing
from bench.timing import interleaved, is_wide, paired_ratio
from tests.bench.layers import CPU


def test_rounds_are_interleaved():
    """After the warm-up, each runner once a round, in rotating order."""
    order = []

    def runner(name):
        def run():
            order.append(name)
            time.sleep(6e-3)  # long enough not to be repeated inside a sample

        return run

    stats = interleaved({name: runner(name) for name in "abc"}, CPU, 0.0)
    assert "".join(order[12:]) == "abcbcacababcbca"
    assert all(len(s.data) == 5 for s in stats.values())
    ratio = paired_ratio(stats["a"], stats["b"])
    assert ratio["q1"] <= ratio["median"] <= ratio["q3"]


def test_interval_of_a_ratio():
    """It holds the median, and shrinks with the rounds."""
    stats = {name: Stats() for name in "ab"}
    for i in range(8):
        stats["a"].update(1.0 + 0.1 * (i % 2))
        stats["b"].update(1.0)
    few = paired_ratio(stats["a"], stats["b"])
    assert few["low"] <= few["median"] <= few["high"]
    assert is_wide({"low": 0.9, "high": 1.1, "median": 1.0})
    assert not is_wide({"low": 0.98, "high": 1.02, "median": 1.0})


def test_a_gpu_is_timed_by_events(monkeypatch):
    """Warm, with the cache cleared before each call, and replayed: on a stand-in for a GPU whose
    clock ticks once an operation."""
    clock, log = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock[0]

        def elapsed_time(self, end):
            return end.time - self.time

    class Graph:
        def replay(self):
            log.append("replay")

    class Block(contextlib.nullcontext):
        def wait_stream(self, other):
            log.append("wait")

    class Buffer:
        def zero_(self):
            log.append("clear")
            clock[0] += 100

    def run():
        log.append("run")
        clock[0] += 1

    stand_in = types.SimpleNamespace(
        Event=Event,
        CUDAGraph=Graph,
        Stream=Block,
        stream=Block,
        graph=Block,
        current_stream=Block,
        synchronize=lambda device: None,
        get_device_properties=lambda device: types.SimpleNamespace(L2_cache_size=1 << 20),
    )
    monkeypatch.setattr(timing.torch, "cuda", stand_in)
    monkeypatch.setattr(timing.torch, "empty", lambda *size, **options: Buffer())
    device = torch.device("cuda")
    assert round(timing.warm(run, 5, device), 6) == 5e-3
    log.clear()
    assert round(timing.cold(run, 3, device), 6) == 3e-3  # without the time of clearing
    assert log == ["clear", "run"] * 3
    log.clear()
    timing.replayed(run)()
    assert log == ["wait", "run", "run", "run", "wait", "run", "replay"]
