"""How good the cost model's choices are: every layer of the benchmark tuned, beside its default.

The table goes to `results/tuned.json`, not to the user's.
"""

from __future__ import annotations

import os

import torch
from rich.console import Console
from rich.progress import track

import wn_kernels
from bench.cases import SUITES
from bench.measure import precision
from bench.providers import PROVIDERS
from bench.report.tables import printed
from wn_kernels.plan import Plan, table
from wn_kernels.tuning import Tuned

# A default that takes longer than the fastest by more than this is a poor one.
CLOSE = 1.10


def loss(line: Tuned) -> float:
    """What the default takes over the fastest of those that were timed in a training step."""
    steps = {key: t for key, t in line.seconds.items() if isinstance(key, Plan)}
    if line.default not in steps or steps[line.default] != steps[line.default]:
        return 1.0  # there was nothing to choose from
    return steps[line.default] / min(t for t in steps.values())


def main(seconds: float) -> int:
    """Prints a line for each call; 1 where fewer than 95 % of the defaults are close."""
    precision.set_tf32(False)
    os.environ[table.VARIABLE] = "results/tuned.json"
    console = Console()
    cases = [case for suite in SUITES.values() for case in suite if case.mode == "train"]
    rows = [["case", "default", "fastest", "default over fastest"]]
    losses = []
    for case in track(cases, "tuning", console=console, transient=True):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        layer = PROVIDERS["ours"].make(case, case.layer(device))
        x = torch.randn(case.x_shape, dtype=case.torch_dtype, device=device)
        with case.session(device):
            lines = wn_kernels.tune(layer, x, seconds=seconds)
        for line in lines:
            losses.append(loss(line))
            names = str(line.default), str(line.choice)
            rows.append([case.label, *names, f"{losses[-1]:.2f}"])
    styles = ["yellow" if each > CLOSE else "" for each in losses]
    title = "training steps: the cost model's choice beside the fastest"
    shown = printed(title, rows, styles, slice(3, None))
    (console if console.is_terminal else Console(width=140)).print(shown)
    close = sum(x <= CLOSE for x in losses)
    console.print(f"{close} of {len(losses)} defaults are within 10 % of the fastest")
    return 0 if close >= 0.95 * len(losses) else 1
