"""Interleaved timing: every provider once a round, in rotating order, so that drift of the machine
falls on all alike and ratios can be taken round by round."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from pytest_benchmark.stats import Stats
from scipy.stats import bootstrap

# A ratio is uncertain while its interval is wider than this share of it.
WIDE = 0.1

Sample = Callable[[Callable[[], None], int, torch.device], float]


def session_of(run: Callable[[], None]) -> Callable[[], AbstractContextManager[Any]]:
    """What a run has to be inside of, if anything."""
    return getattr(run, "session", nullcontext)


def warm(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Seconds of so many calls in a row: by the clock, on a GPU by events on its stream."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - begin


def own(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Returns the seconds that this thread itself runs for so many calls in a row."""
    begin = time.thread_time()
    for _ in range(repeats):
        run()
    return time.thread_time() - begin


def sampler(device: torch.device) -> Sample:
    """Returns the function that times calls on a device. On a single thread of a CPU it takes the
    time that the thread itself runs."""
    return own if device.type == "cpu" and torch.get_num_threads() == 1 else warm


# Launches after which the host waits for the GPU: fewer than its queue holds.
QUEUE = 64


def host(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Seconds that the processor takes for so many calls, while the GPU's queue is not full. A
    runner of many `launches` a call, such as a whole model, counts as so many."""
    together = max(1, QUEUE // getattr(run, "launches", 1))
    total = 0.0
    for done in range(0, repeats, together):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(min(together, repeats - done)):
            run()
        total += time.perf_counter() - begin
    torch.cuda.synchronize(device)
    return total


# Sets of operands are together larger than the L2 cache by this factor, where `MOST_SETS` of them
# can be. Smaller ones are read from the cache, whatever is done, so that a few sets are enough.
TIMES_L2 = 3
MOST_SETS = 80
FEW_SETS = 4
# Calls of a graph over so few sets, so that launching the graph does not count.
CALLS = 16


def sets_beyond_cache(size: int, device: torch.device) -> int:
    """How many sets of operands of `size` bytes the calls of a graph rotate over, so that each
    call finds nothing of its own in the L2 cache."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    sets = TIMES_L2 * l2 // max(1, size) + 1
    return sets if sets <= MOST_SETS else FEW_SETS


def rotation(runs: Sequence[Any]) -> list[Any]:
    """The calls of a graph over sets of operands: one for each, and over few sets several."""
    again = CALLS // FEW_SETS if len(runs) == FEW_SETS else 1
    return [*runs] * again


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """What graphs are captured on: one, whose memory each capture finds again."""
    return torch.cuda.Stream()


class Replay:
    """Calls captured one after the other in a CUDA graph: the kernels' time, without the CPU's
    part. Called, it replays them all.

    Attributes:
        calls: how many they are.
    """

    def __init__(self, runs: Sequence[Callable[[], None]]) -> None:
        self.calls = len(runs)
        side = _side_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for run in (runs[0], *runs):  # what is set up once must not be captured
                run()
            side.synchronize()
            # Not torch.cuda.graph, which gives all cached memory back before each capture.
            self.graph = torch.cuda.CUDAGraph()
            self.graph.capture_begin()
            try:
                for run in runs:
                    run()
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)

    def __call__(self) -> None:
        self.graph.replay()


def rotated(run: Any, device: torch.device) -> Replay:
    """Calls of a runner over sets of operands that the L2 cache does not hold."""
    sets = sets_beyond_cache(run.operand_bytes(), device)
    with session_of(run)():
        return Replay(rotation([run, *(run.twin() for _ in range(sets - 1))]))


def replayed(run: Callable[[], None], device: torch.device) -> Replay:
    """One call, which finds its operands in the L2 cache as far as they fit."""
    with session_of(run)():
        return Replay([run])


def interleaved(
    runners: dict[str, Callable[[], None]],
    device: torch.device,
    seconds: float,
    stats: dict[str, Stats] | None = None,
    sample: Sample = warm,
    span: float = 5e-3,
    alike: bool = True,
) -> dict[str, Stats]:
    """Seconds per call of each runner, round by round, within about `seconds` in all; added to
    `stats`, where there are some already.

    A sample is as many calls in a row as the fastest runner makes in `span` seconds, the same
    number for all: the first call after another runner finds cold caches, and that share must not
    depend on a runner's speed. Runners whose every call finds cold caches need not be `alike`: each
    is called as often as fits `span`, after a single call to warm up, and three rounds are enough.
    A runner of several `calls` counts as so many. A runner that has a `session` runs inside of one.
    Where any has, all are called once more before each sample: what a session changes, they may
    have to find anew.
    """
    plain = all(session_of(run) is nullcontext for run in runners.values())

    def timed(run: Callable[[], None], repeats: int) -> float:
        with session_of(run)():
            if not plain:
                run()
            return sample(run, repeats, device)

    for run in runners.values():
        timed(run, 3 if alike else 1)  # warm-up: caches, allocator, compilers
    once = {name: timed(run, 1) for name, run in runners.items()}
    if alike:
        once = dict.fromkeys(once, min(once.values()))
    repeats = {name: max(1, int(span / taken)) for name, taken in once.items()}
    least = 5 if alike else 3
    stats = stats or {name: Stats() for name in runners}
    order = list(runners)
    start = time.perf_counter()
    rounds = 0
    while rounds < least or time.perf_counter() - start < seconds:
        for name in order:
            run = runners[name]
            taken = timed(run, repeats[name]) / repeats[name]
            stats[name].update(taken / getattr(run, "calls", 1))
        order = order[1:] + order[:1]
        rounds += 1
    return stats


def _best(run: Callable[[], None], device: torch.device) -> float:
    return min(warm(run, 2, device) / 2 for _ in range(5))


def bandwidths(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy, counted as read and written, and of a sum, which only reads."""
    elements = 1 << (28 if device.type == "cuda" else 24)
    x = torch.randn(elements, device=device)
    y = torch.empty_like(x)
    copy, read = _best(lambda: y.copy_(x), device), _best(lambda: x.sum(), device)
    return {"copy": 8 * elements / copy, "read": 4 * elements / read}


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matmul of random numbers, as PyTorch is set: of ones or zeros a
    GPU multiplies faster, as fewer of its wires change."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * n**3 / _best(lambda: torch.mm(a, b, out=out), device)


def ceilings(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """What this device does at best: bytes per second of a copy, and operations per second of a
    matmul of that dtype."""
    return {"bandwidth": bandwidths(device)["copy"], "rate": product_rate(device, dtype)}


def paired_ratio(ours: Stats, other: Stats) -> dict[str, float]:
    """The median of the ratios of each round, the quartiles around it, and the 95 % interval of the
    median by bootstrap, `low` to `high`."""
    ratios = [a / b for a, b in zip(ours.data, other.data, strict=True)]
    q1, median, q3 = statistics.quantiles(ratios, n=4)
    drawn = bootstrap(
        (ratios,), np.median, n_resamples=1000, method="percentile", random_state=0
    ).confidence_interval
    return {
        "median": median,
        "q1": q1,
        "q3": q3,
        "low": float(drawn.low),
        "high": float(drawn.high),
    }


def is_wide(ratio: dict[str, float]) -> bool:
    """Whether a ratio is too uncertain to compare."""
    return ratio["high"] - ratio["low"] > WIDE * ratio["median"]
