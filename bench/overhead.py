"""Layers so small that only the calls count, and where the time of a call goes."""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import wn_kernels
from bench.cases import Case
from bench.layer import MODES

CASES = [
    Case(label, kind, arguments, x_shape, mode, options)
    for label, kind, arguments, x_shape, options in (
        ("linear 1, 16, 16", "Linear", (16, 16), (1, 16), {}),
        ("1d 16→16 k3, 16", "Conv1d", (16, 16, 3), (1, 16, 16), {"padding": 1}),
        ("2d 16→16 3×3, 8²", "Conv2d", (16, 16, 3), (1, 16, 8, 8), {"padding": 1}),
        ("up 16→16 k4 s2, 16", "ConvTranspose1d", (16, 16, 4, 2), (1, 16, 16), {}),
    )
    for mode in MODES
]

CALLS = 500
PACKAGE = Path(wn_kernels.__file__).parent


def _place(file: str, function: str) -> str:
    """Where a profiled function belongs: a file of this package, a backend, or what lies around."""
    path = Path(file)
    if PACKAGE in path.parents:
        inner = path.relative_to(PACKAGE).parts
        return inner[inner[0] == "backends"].removesuffix(".py")
    if "triton" in path.parts or "cuda_utils" in function:
        return "Triton"
    if file == "~":  # built in
        return "ATen and autograd"
    return "torch's Python" if "torch" in path.parts else "the benchmark"


def shares(run: Callable[[], None], calls: int) -> dict[str, float]:
    """The share of each place in the time of a call, the largest first, by cProfile: it slows
    Python down and leaves operators as they are, so Python's share is an upper bound."""
    for _ in range(calls):
        run()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        run()
    profiler.disable()
    seconds: Counter[str] = Counter()
    stats: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    for (file, _, function), (_, _, own, _, _) in stats.items():
        seconds[_place(file, function)] += own
    total = sum(seconds.values())
    return {place: own / total for place, own in seconds.most_common()}


def add_profile(case: Case, result: dict[str, Any], device: torch.device) -> None:
    """Adds to a result the microseconds that each place takes of a call."""
    builds = case.competitors(device, False)
    result["microseconds"] = {
        name: {
            place: share * result["seconds"][name]["median"] * 1e6
            for place, share in shares(builds[name](), CALLS).items()
        }
        for name in ("plain", "eager", "ours")
    }


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """A table's rows, the header first: µs a call, by place."""
    found = [
        (r["case"], name, places) for r in results for name, places in r["microseconds"].items()
    ]
    order: Counter[str] = Counter()
    for _, _, places in found:
        order.update(places)
    columns = [name for name, _ in order.most_common()]
    lines = [["case", "mode", "provider", *columns]]
    for case, name, places in found:
        cells = (f"{places[column]:.1f}" if column in places else "" for column in columns)
        lines.append([case["label"], case["mode"], name, *cells])
    return lines
