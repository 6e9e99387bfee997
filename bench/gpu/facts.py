"""This section measures what the device does at best: bandwidths, products of random numbers, and
launches."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.context import Context
from bench.gpu.results import COPY, PRODUCT, READ
from bench.measure import precision, timing
from wn_kernels.plan import devices

# What is read of the device, and never set.
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"


def main(context: Context) -> None:
    device, model = context.device, devices.gpu()
    facts: list[tuple[str, Callable[[], Any], float | None]] = [
        ("device", _properties, None),
        ("clocks before", _clocks, None),
        (COPY, lambda: timing.bandwidths(device)["copy"], model.bandwidth),
        (READ, lambda: timing.bandwidths(device)["read"], model.bandwidth),
        *(
            (name + PRODUCT, _product(dtype, tf32, device), model.rate(size, tf32))
            for name, dtype, size, tf32 in (
                ("bfloat16", torch.bfloat16, 2, False),
                ("float16", torch.float16, 2, False),
                ("TF32", torch.float32, 4, True),
                ("float32", torch.float32, 4, False),
            )
        ),
        ("launch, seconds", lambda: _launch(device), model.overhead),
        ("launch in a graph, seconds", lambda: _launch(device, graph=True), model.overhead),
        ("clocks after", _clocks, None),
    ]
    for name, measure, predicted in context.cases(facts, label=lambda fact: fact[0]):
        with context.attempt(name):
            value = None if context.dry else measure()
            context.add("result", fact=name, value=value, predicted=predicted)


def _properties() -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": [found.major, found.minor],
        "multiprocessors": found.multi_processor_count,
        "memory": found.total_memory,
        "L2 cache": found.L2_cache_size,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
    }


def _clocks() -> dict[str, str]:
    """Returns what the driver's tool says of the clocks, or nothing if there is no such tool."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().splitlines()[0].split(", ")
    return dict(zip(QUERY.split(","), values, strict=False))


def _product(dtype: torch.dtype, tf32: bool, device: torch.device) -> Callable[[], float]:
    def rate() -> float:
        if not tf32:
            return timing.product_rate(device, dtype)
        with precision.tf32():
            return timing.product_rate(device, dtype)

    return rate


def _launch(device: torch.device, graph: bool = False) -> float:
    """Returns the seconds from one launch of an operator that does next to nothing to the next."""
    x = torch.zeros(32, device=device)
    run: Callable[[], Any] = x.zero_
    calls = 200
    if graph:
        run, calls = timing.Replay([x.zero_] * calls), calls
        return min(timing.warm(run, 5, device) for _ in range(5)) / 5 / calls
    timing.warm(run, calls, device)
    return min(timing.warm(run, calls, device) for _ in range(5)) / calls
