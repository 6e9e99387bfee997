"""A first GPU: `make gpu` tests, tunes and times everything on it, and says what failed.

Each step runs in a process of its own and is given up after its time, so that one that hangs does
not keep the others from being seen.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import wn_kernels


class Step(NamedTuple):
    """A command of this Python, and the seconds it may take: 15 minutes in all."""

    name: str
    arguments: tuple[str, ...]
    limit: float


RESULTS = ("linear", "linear-bf16", "conv-bf16", "memory")
FILES = tuple(f"results/{name}.json" for name in RESULTS)
BF16 = ("--dtype", "bfloat16")

STEPS = [
    Step("tests", ("-m", "pytest", "--quiet", "tests"), 390),
    Step("tune", ("-m", "wn_kernels", "tune", "bench.gpu:layers", "--seconds", "0.3"), 60),
    Step(
        "linear layers, every provider",
        ("-m", "bench", "linear", "--full", "--seconds", "1", "--json", FILES[0]),
        210,
    ),
    Step(
        "linear layers, bfloat16",
        ("-m", "bench", "linear", *BF16, "--seconds", "1", "--json", FILES[1]),
        60,
    ),
    Step(
        "convolutions, bfloat16",
        ("-m", "bench", "conv", *BF16, "--seconds", "1", "--json", FILES[2]),
        100,
    ),
    Step("memory", ("-m", "bench", "memory", "--json", FILES[3]), 50),
    Step("report", ("-m", "bench", "report", *FILES), 30),
]


def layers() -> tuple[torch.nn.Module, torch.Tensor]:
    """What is tuned: the linear layers of the benchmark, in half precision."""
    sizes = (1024, 4096, 4096, 1024)
    options = {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": torch.bfloat16}
    stack = [wn_kernels.WNLinear(k, n, **options) for k, n in itertools.pairwise(sizes)]
    return torch.nn.Sequential(*stack), torch.randn(16, sizes[0], **options)


def outcome(step: Step) -> tuple[str, float]:
    """What became of a step, and its seconds."""
    start = time.perf_counter()
    try:
        code = subprocess.run([sys.executable, *step.arguments], timeout=step.limit).returncode
        found = "passed" if code == 0 else f"FAILED, exit code {code}"
    except subprocess.TimeoutExpired:
        found = f"FAILED: not done after {step.limit:.0f} s"
    return found, time.perf_counter() - start


def main() -> int:
    """Runs every step; 1 where one failed, or there is no GPU."""
    console = Console()
    if not torch.cuda.is_available():
        console.print("there is no GPU here, or this torch is built without support for one")
        return 1
    shown = Table(title=torch.cuda.get_device_name())
    for name in ("step", "outcome", "seconds", "command"):
        shown.add_column(name)
    failed = 0
    for step in STEPS:
        console.rule(step.name)
        found, seconds = outcome(step)
        failed += found != "passed"
        style = "" if found == "passed" else "red"
        command = "python " + " ".join(step.arguments)
        shown.add_row(step.name, found, f"{seconds:.0f}", command, style=style)
    console.print(shown)
    return 1 if failed else 0
