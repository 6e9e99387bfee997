"""Interleaved timing: every provider once a round, in rotating order, so that drift of the machine
falls on all alike and ratios can be taken round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from pytest_benchmark.stats import Stats


def interleaved(
    runners: dict[str, Callable[[], None]], device: torch.device, seconds: float
) -> dict[str, Stats]:
    """Seconds per call of each runner, round by round, within about `seconds` in all.

    A sample is as many calls in a row as the fastest runner makes in five milliseconds, the same
    number for all: the first call after another runner finds cold caches, and that share must not
    depend on a runner's speed.
    """
    for run in runners.values():
        for _ in range(3):  # warm-up: caches, allocator, Triton's compiler
            run()
    repeats = max(1, int(5e-3 / min(_sample(run, 1, device) for run in runners.values())))
    stats = {name: Stats() for name in runners}
    order = list(runners)
    start = time.perf_counter()
    rounds = 0
    while rounds < 5 or time.perf_counter() - start < seconds:
        for name in order:
            stats[name].update(_sample(runners[name], repeats, device) / repeats)
        order = order[1:] + order[:1]
        rounds += 1
    return stats


def _sample(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def paired_ratio(ours: Stats, other: Stats) -> dict[str, float]:
    """The median of the ratios of each round, and the quartiles around it."""
    ratios = [a / b for a, b in zip(ours.data, other.data, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"median": median, "q1": low, "q3": high}
