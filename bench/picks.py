"""Counts how often the cost model picks well: every plan of a call is timed beside its pick.

The calls are those of the benchmark's layers and of random ones, each without gradients and in a
training step. The plans of a call are timed in turn. A plan's time is the lower quartile of its
rounds, since another process can only add to a time. On one thread of a CPU, it is the time that
the thread has run, which leaves out what other processes take. The least of many times is too low
by chance, so a pick that seems slow is timed once more beside the fastest plan alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from bench.cases import SUITES, Case
from bench.layer import MODES
from bench.measure import precision
from bench.measure.timing import interleaved, sampler
from bench.providers import PROVIDERS
from bench.report.tables import printed
from wn_kernels import plan, prepare, tuning
from wn_kernels.call import Call
from wn_kernels.plan import Plan

# A pick is a good one within this factor of the fastest.
CLOSE = 1.05
# So many of the picks have to be good.
SHARE = 0.95
# A random layer has at most this many operations.
MOST_OPERATIONS = 4e8


@dataclass(frozen=True)
class Pick:
    """Holds a call's pick.

    Attributes:
        label: the call.
        mode: `"infer"` or `"train"`.
        picked, fastest: the plans, in words.
        loss: the time of the picked plan over that of the fastest.
    """

    label: str
    mode: str
    picked: str
    fastest: str
    loss: float


class Candidate:
    """Computes a call by one plan. Call it to run it once, inside its `session`."""

    def __init__(self, call: Call, mode: str, choice: Plan, operands: list[Any], dy: Any) -> None:
        self.call, self.mode, self.choice = call, mode, choice
        self.operands, self.dy = operands, dy

    def session(self) -> AbstractContextManager[Any]:
        return prepare.fixed(self.call, self.choice)

    def __call__(self) -> None:
        if self.mode == "infer":
            with torch.no_grad():
                tuning.run_call(self.call, self.operands)
        else:
            torch.autograd.grad(tuning.run_call(self.call, self.operands), self.operands, self.dy)


def _log_uniform(draw: random.Random, low: int, high: int) -> int:
    return round(low * (high / low) ** draw.random())


def random_cases(count: int, seed: int = 0) -> Iterator[Case]:
    """Yields random layers, as a network might have them: linear ones, convolutions of one and two
    dimensions, transposed and depthwise ones."""
    draw = random.Random(seed)
    while count:
        kind = draw.choice(["Linear", "Conv1d", "Conv1d", "ConvTranspose1d", "Conv2d"])
        inputs, outputs = (_log_uniform(draw, 8, 1024) for _ in range(2))
        batch, options, arguments, x_shape = draw.choice([1, 1, 2, 8]), {}, (), ()
        if kind == "Linear":
            arguments, x_shape = (inputs, outputs), (_log_uniform(draw, 1, 512), inputs)
        elif kind == "Conv1d":
            taps, dilation = draw.choice([1, 3, 5, 7, 11]), draw.choice([1, 1, 1, 3, 9])
            if draw.random() < 0.15:
                outputs, options = inputs, {"groups": inputs}
            arguments, x_shape = (
                (inputs, outputs, taps),
                (batch, inputs, _log_uniform(draw, 8, 2048)),
            )
            options |= {"dilation": dilation, "padding": dilation * (taps // 2)}
        elif kind == "ConvTranspose1d":
            stride = draw.choice([2, 4, 8])
            arguments = (inputs, outputs, 2 * stride, stride)
            x_shape, options = (batch, inputs, _log_uniform(draw, 8, 512)), {"padding": stride // 2}
        else:
            side, taps = _log_uniform(draw, 4, 64), draw.choice([1, 3, 5])
            arguments, x_shape = (inputs, outputs, taps), (batch, inputs, side, side)
            options = {"padding": taps // 2, "stride": draw.choice([1, 1, 2])}
        label = f"{kind} {arguments}, {x_shape}"
        case = Case(label, kind, arguments, x_shape, "infer", options)
        if case.work()[0] <= MOST_OPERATIONS:
            count -= 1
            yield case


def picks_of(case: Case, seconds: float) -> Iterator[Pick]:
    """Times every plan of each call of a case, each of them for `seconds`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer = PROVIDERS["ours"].make(case, case.layer(device))
    x = torch.randn(case.x_shape, dtype=case.torch_dtype, device=device)
    with case.session(device):
        calls = tuning.calls_of(layer, (x,))
    for call, backend in dict.fromkeys(calls):
        operands = tuning.operands_of(call, device)
        with torch.no_grad():
            dy = torch.randn_like(tuning.run_call(call, operands))
        choices = plan.choices(call, backend)
        for mode in MODES:
            named: dict[str, Callable[[], None]] = {}
            for choice in choices:  # the pick comes first
                name = choice.forward if mode == "infer" else str(choice)
                named.setdefault(name, Candidate(call, mode, choice, operands, dy))
            picked = next(iter(named))
            times = _times(named, device, seconds)
            fastest = min(times, key=times.__getitem__)
            if times[picked] > CLOSE * times[fastest]:
                two = {name: named[name] for name in (picked, fastest)}
                times = _times(two, device, 2 * seconds)
            loss = max(1.0, times[picked] / times[fastest])
            yield Pick(case.label, mode, picked, fastest, loss)


def _times(
    runs: dict[str, Callable[[], None]], device: torch.device, seconds: float
) -> dict[str, float]:
    if len(runs) == 1:
        return dict.fromkeys(runs, 1.0)
    sample = sampler(device)
    stats = interleaved(runs, device, seconds * len(runs), sample=sample, span=2e-3)
    return {name: quantiles(found.data)[0] for name, found in stats.items()}


def _all(found: dict[str, list[Pick]]) -> list[Pick]:
    return [pick for picks in found.values() for pick in picks]


def _store(path: str, found: dict[str, list[Pick]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps([vars(pick) for pick in _all(found)], indent=1) + "\n")


def main(path: str, seconds: float, count: int, seed: int = 0) -> int:
    """Prints the picks that are not good, and how many are good. Returns 1 if fewer than 95 % are
    good."""
    precision.set_tf32(False)
    console = Console()
    cases = {case.label: case for suite in SUITES.values() for case in suite}
    found: dict[str, list[Pick]] = {"benchmark": [], "random": []}
    sets = {"benchmark": list(cases.values()), "random": list(random_cases(count, seed))}
    for name, chosen in sets.items():
        measure = partial(picks_of, seconds=seconds)
        for case in track(chosen, name, console=console, transient=True):
            found[name] += measure(case)
            _store(path, found)
    rows = [["call", "mode", "picked", "fastest", "picked over fastest"]]
    everything = _all(found)
    for pick in sorted(everything, key=lambda pick: -pick.loss):
        if pick.loss > CLOSE:
            rows.append([pick.label, pick.mode, pick.picked, pick.fastest, f"{pick.loss:.2f}"])
    title = "picks that take more than 5 % longer than the fastest plan"
    shown = printed(title, rows, numbers=slice(4, None))
    (console if console.is_terminal else Console(width=160)).print(shown)
    for name, picks in found.items():
        good = sum(pick.loss <= CLOSE for pick in picks)
        if picks:
            console.print(f"{name}: {good} of {len(picks)} picks are within 5 % of the fastest")
    good = sum(pick.loss <= CLOSE for pick in everything)
    return 0 if good >= SHARE * len(everything) else 1
