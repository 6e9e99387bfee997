"""Counts how often the cost model picks well: every plan of a call is timed beside its pick.

The calls are those of the benchmark's layers and of random ones, each without gradients and in a
training step. The plans of a call are timed in turn, in stages (`race`). After each stage, those
that are clearly slower than the fastest drop out, so that most of the time goes to those near it.
The pick stays. If it is not the fastest one then, both are timed once more, in pairs (`duel`),
until it is clear whether the pick is within 5 %. The least of many times is too low by chance, so
that the race alone would find too many picks slow.

The C library keeps freed memory, so that no plan pays for the pages that another gave back. On one
thread of a CPU, a time is that which the thread has run, which leaves out what other
processes take.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from pytest_benchmark.stats import Stats
from rich.console import Console
from rich.progress import track

from bench.cases import SUITES, Case
from bench.layer import MODES
from bench.measure import precision
from bench.measure.allocation import settle_heap
from bench.measure.timing import Sample, interleaved, paired_ratio, sampler, session_of
from bench.providers import PROVIDERS
from bench.report.tables import printed
from wn_kernels import plan, prepare, tuning
from wn_kernels.call import Call
from wn_kernels.plan import Plan

# A pick is a good one within this factor of the fastest.
CLOSE = 1.05
# So many of the picks have to be good.
SHARE = 0.95
# A plan takes part in the race if a single call takes at most so many times as long as the fastest.
START = 4.0
# It stays after a stage if it takes at most so many times as long as the fastest.
STAGES = (1.4, 1.15, 1.08)
# A duel has at most so many parts.
PARTS = 6
# A sample has so many seconds of calls.
SPAN = 2e-3
# A random layer has at most this many operations.
MOST_OPERATIONS = 4e8


Runs = Callable[[], None]


@dataclass(frozen=True)
class Pick:
    """Holds a call's pick.

    Attributes:
        label: the call.
        mode: `"infer"` or `"train"`.
        picked, fastest: the plans, in words.
        loss: the time of the picked plan over that of the fastest.
        times: the seconds of each plan, as far as the race has measured it.
        again: the time of the plan that an earlier recording found to be the fastest, over that of
            the fastest, if there is such a recording.
    """

    label: str
    mode: str
    picked: str
    fastest: str
    loss: float
    times: dict[str, float]
    again: float | None = None


# The fastest plans of an earlier recording, by call and mode.
Before = dict[tuple[str, str], str]


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


def random_cases(
    count: int, seed: int = 0, times: int = 1, most: float = MOST_OPERATIONS, grain: int = 1
) -> Iterator[Case]:
    """Yields random layers, as a network might have them: linear ones, convolutions of one and two
    dimensions, transposed and depthwise ones. They have up to `1024 times` channels, which
    are multiples of `grain`, up to `512 times` rows, and at most `most` operations."""
    draw = random.Random(seed)
    while count:
        kind = draw.choice(["Linear", "Conv1d", "Conv1d", "ConvTranspose1d", "Conv2d"])
        drawn = (_log_uniform(draw, 8, 1024 * times) for _ in range(2))
        inputs, outputs = (max(1, round(size / grain)) * grain for size in drawn)
        batch, options, arguments, x_shape = draw.choice([1, 1, 2, 8]), {}, (), ()
        if kind == "Linear":
            arguments, x_shape = (inputs, outputs), (_log_uniform(draw, 1, 512 * times), inputs)
        elif kind == "Conv1d":
            taps, dilation = draw.choice([1, 3, 5, 7, 11]), draw.choice([1, 1, 1, 3, 9])
            if draw.random() < 0.15 and taps > 1:  # a slice of one number has no gradient
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
        if case.work()[0] <= most:
            count -= 1
            yield case


def picks_of(case: Case, seconds: float, before: Before | None = None) -> Iterator[Pick]:
    """Times every plan of each call of a case, each of them for `seconds` in each stage."""
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
            named: dict[str, Runs] = {}
            for choice in choices:  # the pick comes first
                name = choice.forward if mode == "infer" else str(choice)
                named.setdefault(name, Candidate(call, mode, choice, operands, dy))
            earlier = (before or {}).get((case.label, mode))
            yield _measured(case.label, mode, named, earlier, device, seconds)


def _measured(
    label: str,
    mode: str,
    runs: dict[str, Runs],
    earlier: str | None,
    device: torch.device,
    seconds: float,
) -> Pick:
    """Returns the pick, which is the first of the plans. `earlier` is the plan that was the fastest
    before."""
    picked = next(iter(runs))
    looked_at = {name for name in (picked, earlier) if name in runs}
    times = race(runs, looked_at, device, seconds) if len(runs) > 1 else {picked: 1.0}
    fastest = min(times, key=times.__getitem__)
    losses = {fastest: 1.0}
    for name in looked_at - {fastest}:
        losses[name] = max(1.0, duel(runs[name], runs[fastest], device, seconds))
    again = None if earlier is None else losses.get(earlier, math.inf)
    return Pick(label, mode, picked, fastest, losses[picked], times, again)


def race(
    runs: dict[str, Runs], stay: Collection[str], device: torch.device, seconds: float
) -> dict[str, float]:
    """Returns the seconds of each plan, the lower quartiles of their rounds. In each stage, each of
    those that are left is timed for `seconds`. Those in `stay` do not drop out."""
    stats = {name: Stats() for name in runs}
    sample = sampler(device)
    times = {name: _once(run, device, sample) for name, run in runs.items()}
    least = min(times.values())
    left = [name for name in runs if times[name] <= START * least or name in stay]
    for factor in STAGES:
        alike = {name: runs[name] for name in left}
        rounds = {name: stats[name] for name in left}
        # Long calls need no more than one to warm up.
        interleaved(alike, device, seconds * len(left), rounds, sample, SPAN, least < SPAN)
        times |= {name: quantiles(stats[name].data)[0] for name in left}
        limit = factor * min(times[name] for name in left)
        left = [name for name in left if times[name] <= limit or name in stay]
        if len(left) == 1:
            break
    return times


def _once(run: Runs, device: torch.device, sample: Sample) -> float:
    """Returns the seconds of the second call."""
    with session_of(run)():
        run()
        return sample(run, 1, device)


def duel(one: Runs, other: Runs, device: torch.device, seconds: float) -> float:
    """Returns the time of one plan over that of another, the median of the ratios of rounds. Rounds
    are added until the interval of the median lies on one side of `CLOSE`."""
    runs = {"one": one, "other": other}
    stats = {name: Stats() for name in runs}
    for _ in range(PARTS):
        interleaved(runs, device, 2 * seconds, stats, sampler(device), SPAN, False)
        ratio = paired_ratio(stats["one"], stats["other"])
        if ratio["high"] <= CLOSE or ratio["low"] > CLOSE:
            break
    return ratio["median"]


def _all(found: dict[str, list[Pick]]) -> list[Pick]:
    return [pick for picks in found.values() for pick in picks]


def _store(path: str, found: dict[str, list[Pick]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps([vars(pick) for pick in _all(found)], indent=1) + "\n")


def main(
    path: str,
    seconds: float,
    count: int,
    seed: int = 0,
    part: tuple[int, int] = (1, 1),
    before: str | None = None,
) -> int:
    """Prints the picks that are not good, and how many are good. Returns 1 if fewer than 95 % are
    good.

    `part` is `(i, n)` for the i-th of n parts of the layers. `before` is the file of an earlier
    recording, whose fastest plans are compared with those of this one.
    """
    precision.set_tf32(False)
    settle_heap()
    console = Console()
    cases = {case.label: case for suite in SUITES.values() for case in suite}
    found: dict[str, list[Pick]] = {"benchmark": [], "random": []}
    earlier: Before = {}
    if before is not None:
        recorded = json.loads(Path(before).read_text())
        earlier = {(pick["label"], pick["mode"]): pick["fastest"] for pick in recorded}
    sets = {"benchmark": list(cases.values()), "random": list(random_cases(count, seed))}
    for name, chosen in sets.items():
        measure = partial(picks_of, seconds=seconds, before=earlier)
        some = chosen[part[0] - 1 :: part[1]]
        for case in track(some, name, console=console, transient=True):
            found[name] += measure(case)
            _store(path, found)
    rows = [["call", "mode", "picked", "fastest", "fastest takes", "picked over it"]]
    everything = _all(found)
    for pick in sorted(everything, key=lambda pick: -pick.loss):
        if pick.loss > CLOSE:
            takes = f"{min(pick.times.values()) * 1e6:.0f} µs"
            times = takes, f"{pick.loss:.2f}"
            rows.append([pick.label, pick.mode, pick.picked, pick.fastest, *times])
    title = "picks that take more than 5 % longer than the fastest plan"
    shown = printed(title, rows, numbers=slice(4, None))
    (console if console.is_terminal else Console(width=160)).print(shown)
    for name, picks in found.items():
        good = sum(pick.loss <= CLOSE for pick in picks)
        if picks:
            console.print(f"{name}: {good} of {len(picks)} picks are within 5 % of the fastest")
    if before is not None:
        again = [pick.again for pick in everything if pick.again is not None]
        agree = sum(loss <= CLOSE for loss in again)
        console.print(f"{agree} of {len(again)} fastest plans of {before} are within 5 % here")
    good = sum(pick.loss <= CLOSE for pick in everything)
    return 0 if good >= SHARE * len(everything) else 1
