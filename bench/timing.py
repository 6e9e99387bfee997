"""Interleaved timing: every provider once a round, in rotating order, so that drift of the machine
falls on all alike and ratios can be taken round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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


def cold(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    """The same on a GPU whose L2 cache holds nothing of the call's before each."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    other = torch.empty(2 * l2, dtype=torch.uint8, device=device)
    total = 0.0
    for _ in range(repeats):
        other.zero_()
        total += warm(run, 1, device)
    return total


def replayed(run: Callable[[], None]) -> Callable[[], None]:
    """A run captured in a CUDA graph: without the CPU's part."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is set up once must not be captured
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def interleaved(
    runners: dict[str, Callable[[], None]],
    device: torch.device,
    seconds: float,
    stats: dict[str, Stats] | None = None,
    sample: Sample = warm,
) -> dict[str, Stats]:
    """Seconds per call of each runner, round by round, within about `seconds` in all; added to
    `stats`, where there are some already.

    A sample is as many calls in a row as the fastest runner makes in five milliseconds, the same
    number for all: the first call after another runner finds cold caches, and that share must not
    depend on a runner's speed. A runner that has a `session` runs inside of one. Where any has, all
    are called once more before each sample: what a session changes, they may have to find anew.
    """
    plain = all(session_of(run) is nullcontext for run in runners.values())

    def timed(run: Callable[[], None], repeats: int) -> float:
        with session_of(run)():
            if not plain:
                run()
            return sample(run, repeats, device)

    for run in runners.values():
        timed(run, 3)  # warm-up: caches, allocator, compilers
    repeats = max(1, int(5e-3 / min(timed(run, 1) for run in runners.values())))
    stats = stats or {name: Stats() for name in runners}
    order = list(runners)
    start = time.perf_counter()
    rounds = 0
    while rounds < 5 or time.perf_counter() - start < seconds:
        for name in order:
            stats[name].update(timed(runners[name], repeats) / repeats)
        order = order[1:] + order[:1]
        rounds += 1
    return stats


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device does at best: bytes per second of a copy, and float32 operations per second
    of a matmul as PyTorch is set."""
    elements, n = (1 << 28, 8192) if device.type == "cuda" else (1 << 24, 1024)
    x, y, m = (torch.ones(s, device=device) for s in (elements, elements, n * n))
    a = m.view(n, n)
    b = a.clone()
    best = {
        name: min(warm(run, 1, device) for _ in range(7))
        for name, run in {
            "copy": lambda: y.copy_(x),
            "matmul": lambda: torch.mm(a, a, out=b),
        }.items()
    }
    return {"bandwidth": 8 * elements / best["copy"], "rate": 2.0 * n**3 / best["matmul"]}


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
