"""Rounds, intervals, and the clock of a GPU."""

import contextlib
import time
import types

import pytest
import torch
from pytest_benchmark.stats import Stats

from bench.measure import timing
from bench.measure.timing import interleaved, is_wide, paired_ratio
from tests.bench.layers import CPU, TINY


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


def test_runners_that_need_not_be_alike():
    """Each is called as often as fits a sample, in three rounds at least."""
    seconds = {"fast": 1e-3, "slow": 8e-3}
    samples = {name: [] for name in seconds}

    def sample(name, repeats, device):
        samples[name].append(repeats)
        return seconds[name] * repeats

    runners = {name: name for name in seconds}
    stats = interleaved(runners, CPU, 0.0, sample=sample, span=1e-2, alike=False)
    assert samples == {"fast": [1, 1, 10, 10, 10], "slow": [1, 1, 1, 1, 1]}
    assert {name: round(s.median, 6) for name, s in stats.items()} == seconds


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


class FakeCuda:
    """A GPU whose clock ticks once an operation, in milliseconds, and what was done on it."""

    L2 = 1 << 20

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = fake.now

            def elapsed_time(self, end):
                return end.time - self.time

        class Graph:
            def capture_begin(self):
                fake.log.append("begin")

            def capture_end(self):
                fake.log.append("end")

            def replay(self):
                fake.log.append("replay")

        class Block(contextlib.nullcontext):
            def wait_stream(self, other):
                fake.log.append("wait")

            def synchronize(self):
                fake.log.append("synchronize")

        stand_in = types.SimpleNamespace(
            Event=Event,
            CUDAGraph=Graph,
            Stream=Block,
            stream=Block,
            current_stream=Block,
            synchronize=lambda device: fake.log.append("synchronize"),
            get_device_properties=lambda device: types.SimpleNamespace(L2_cache_size=self.L2),
        )
        monkeypatch.setattr(timing.torch, "cuda", stand_in)
        monkeypatch.setattr(timing, "_side_stream", Block)
        self.device = torch.device("cuda")

    def run(self):
        self.log.append("run")
        self.now += 1


@pytest.fixture
def gpu(monkeypatch):
    return FakeCuda(monkeypatch)


def test_a_gpu_is_timed_by_events(gpu):
    assert round(timing.warm(gpu.run, 5, gpu.device), 6) == 5e-3


def test_the_processor_is_timed_with_room_in_the_queue(gpu, monkeypatch):
    """Only the calls, and never more of them than the queue holds before the GPU is waited for."""
    monkeypatch.setattr(timing, "QUEUE", 3)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: gpu.now)
    assert timing.host(gpu.run, 7, gpu.device) == 7
    some = ["synchronize", *["run"] * 3]
    assert gpu.log == [*some, *some, "synchronize", "run", "synchronize"]

    class Model:
        """Of so many launches that the queue holds no two of its calls."""

        launches = 2

        def __call__(self):
            gpu.run()

    gpu.log.clear()
    assert timing.host(Model(), 2, gpu.device) == 2
    assert gpu.log == [*["synchronize", "run"] * 2, "synchronize"]


def test_a_graph_holds_several_calls(gpu):
    """Captured after each was called once, and timed as so many."""
    replay = timing.Replay([gpu.run, gpu.run])
    assert gpu.log == [
        *("wait", "run", "run", "run", "synchronize"),
        *("begin", "run", "run", "end", "wait"),
    ]
    gpu.log.clear()
    replay()
    assert gpu.log == ["replay"]

    def clock(run, repeats, device):
        return 6.0 * repeats

    stats = interleaved({"a": replay}, gpu.device, 0.0, sample=clock)
    assert stats["a"].median == 3.0


def test_operands_rotate_beyond_the_cache(gpu):
    """In all more than three times the L2 cache, of which no call finds its own operands there."""

    class Layer:
        def __init__(self, size):
            self.size, self.twins = size, 0

        def operand_bytes(self):
            return self.size

        def twin(self):
            self.twins += 1
            return gpu.run

        def __call__(self):
            gpu.run()

    for size in (1, 1 << 19, 1 << 20, (1 << 20) + 1, 1 << 24):
        layer = Layer(size)
        calls = timing.rotated(layer, gpu.device).calls
        sets = layer.twins + 1
        assert calls == (timing.CALLS if sets == timing.FEW_SETS else sets)
        if size == 1:  # it is in the cache anyhow
            assert sets == timing.FEW_SETS
        else:
            assert (sets - 1) * size <= 3 * gpu.L2 < sets * size


def test_a_twin_has_operands_of_its_own():
    (case, *_) = TINY
    run = case.competitors(CPU, full=False)["ours"]()
    twin = run.twin()
    mine, its = ({t.data_ptr() for t in (*r.leaves, r.dy)} for r in (run, twin))
    assert len(mine) == len(its) == len(run.leaves) + 1
    assert not mine & its
    twin.check()
    sizes = (t.numel() * t.element_size() for t in (run.x, run.dy, *run.module.parameters()))
    assert run.operand_bytes() == sum(sizes)


def test_ceilings_are_of_random_numbers_in_each_dtype(monkeypatch):
    """Of ones and zeros a GPU multiplies faster than of what a layer has."""
    seen = []
    mm = torch.mm

    def watched(a, b, out):
        seen.append((a.dtype, a.unique().numel(), b.unique().numel()))
        return mm(a, b, out=out)

    monkeypatch.setattr(timing.torch, "mm", watched)
    for dtype in (torch.float32, torch.bfloat16):
        assert timing.product_rate(CPU, dtype) > 0
        found, first, second = seen[-1]
        assert found == dtype
        assert min(first, second) > 1000
