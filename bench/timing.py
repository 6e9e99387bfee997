"""Interleaved timing: every provider once a round, in rotating order, so that drift of the machine
falls on all alike and ratios can be taken round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from pytest_benchmark.stats import Stats
from scipy.stats import bootstrap

# A ratio is uncertain while its interval is wider than this share of it.
WIDE = 0.1


def interleaved(
    runners: dict[str, Callable[[], None]],
    device: torch.device,
    seconds: float,
    stats: dict[str, Stats] | None = None,
) -> dict[str, Stats]:
    """Seconds per call of each runner, round by round, within about `seconds` in all; added to
    `stats`, where there are some already.

    A sample is as many calls in a row as the fastest runner makes in five milliseconds, the same
    number for all: the first call after another runner finds cold caches, and that share must not
    depend on a runner's speed.
    """
    for run in runners.values():
        for _ in range(3):  # warm-up: caches, allocator, Triton's compiler
            run()
    repeats = max(1, int(5e-3 / min(_sample(run, 1, device) for run in runners.values())))
    stats = stats or {name: Stats() for name in runners}
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
