"""Layers are timed by every path: each whole call over rotating operands, and each kernel of ours
alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.cases import Case
from bench.gpu import predict
from bench.gpu.context import Context, named
from bench.measure.timing import session_of
from bench.providers import NORM_L2, PROVIDERS, VARIANT
from bench.runner import Runner
from bench.static import shipped
from bench.suite import medians
from wn_kernels import plan, prepare, tuning
from wn_kernels.call import Call

NAMES = ("plain", "eager", "ours")

# The share of a case's timing that is of whole calls; the rest is of kernels alone.
GRAPHS = 0.6


class Paths(NamedTuple):
    """How Triton may serve a case: by the call, the cost model's choice, and every other choice
    that makes a difference in the case's mode, by name."""

    call: Call
    choice: Any
    others: dict[str, Any]


def paths(case: Case, layer: nn.Module, x: torch.Tensor) -> Paths | None:
    """Returns the paths that there are, or `None` if Triton serves no call of the layer's.

    Without gradients the variants of the forward, in a training step those of the backward after
    the forward that is chosen.
    """
    for call, backend in tuning.calls_of(layer, (x,)):
        if backend != "triton":
            continue
        choice = plan.by_cost(call, backend)
        found = {}
        for other in plan.choices(call, backend):
            if case.mode == "infer" and other.forward != choice.forward:
                found.setdefault(other.forward, other)
            elif case.mode == "train" and other.forward == choice.forward:
                found[str(other).partition("/")[2]] = other
        return Paths(call, choice, {key: o for key, o in found.items() if o != choice})
    return None


def measure(context: Context, case: Case, names: Sequence[str] = NAMES) -> None:
    """Times every provider of a case, and writes the result. A norm other than l2 is timed by the
    path that is chosen, with the same layer's l2 beside it."""
    device = context.device
    builds = {name: partial(Runner, case, name, PROVIDERS[name], device) for name in names}
    if case.norm != "l2":
        builds[NORM_L2] = partial(
            Runner, replace(case, norm="l2"), NORM_L2, PROVIDERS["ours"], device
        )
    runners = context.checked(builds)
    sets = {name: context.clock.sets(run) for name, run in runners.items()}
    found = None
    if "ours" in runners:
        ours = runners["ours"]
        with session_of(ours)(), torch.no_grad():
            found = paths(case, ours.module, ours.x)
    if found is not None and case.norm != "l2":
        found = found._replace(others={})
    if found is not None:
        sets |= _by_other_paths(context, sets["ours"], found)
    seconds, size = context.seconds(), max(run.operand_bytes() for run in runners.values())
    stats = context.clock.graphs(sets, GRAPHS * seconds, size)
    more: dict[str, Any] = {
        "operand_bytes": {n: runs[0].operand_bytes() for n, runs in sets.items()}
    }
    more |= {"sets": {name: len(runs) for name, runs in sets.items()}}
    predicted = predict.vendors(case)
    if found is not None:
        choices = {"ours": found.choice} | {VARIANT + k: o for k, o in found.others.items()}
        predicted |= {n: predict.ours(found.call, o, case.mode) for n, o in choices.items()}
        more["chosen"] = str(found.choice)
        more["kernels"] = _kernels(context, case, sets, found.call, choices, (1 - GRAPHS) * seconds)
    context.result(case.record(), stats, predicted, **more)


def _by_other_paths(context: Context, ours: list[Any], found: Paths) -> dict[str, list[Any]]:
    """Returns ours by every other path whose values are right, over the same sets of operands."""
    sets = {}
    for short, choice in found.others.items():
        name, session = VARIANT + short, partial(prepare.fixed, found.call, choice)
        if context.checked({name: partial(ours[0].under, name, session)}):
            sets[name] = [one.under(name, session) for one in ours]
    return sets


class Alone(NamedTuple):
    """A kernel that a path launches, by its launches, one for each set of operands, and by the time
    that the cost model expects of it."""

    launches: list[Any]
    predicted: float | None


def _kernels(
    context: Context,
    case: Case,
    sets: dict[str, list[Any]],
    call: Call,
    choices: dict[str, Any],
    seconds: float,
) -> list[dict[str, Any]]:
    """Times each kernel that the paths launch, alone and once, and once for both modes of a
    case."""
    alone: dict[str, Alone] = {}
    layer = named(replace(case, mode=""))
    for name, choice in choices.items():
        if name not in sets:
            continue
        first = traced(sets[name][0])
        expected = predict.kernels(call, choice, case.mode, len(first))
        titles = [shipped.named(launch, case.dtype, "").title for launch in first]
        keys = [(layer, *of) for of in zip(titles, (launch.grid for launch in first), strict=True)]
        if context.seen.issuperset(keys):
            continue
        launches = [first, *(traced(run) for run in sets[name][1:])]
        for i, (key, title) in enumerate(zip(keys, titles, strict=True)):
            if key not in context.seen:
                context.seen.add(key)
                grid = "x".join(map(str, first[i].grid))
                title = f"{title} grid {grid}" if title in alone else title
                alone[title] = Alone([each[i] for each in launches], expected[i])
    runs = {title: [partial(launch_again, x) for x in one.launches] for title, one in alone.items()}
    size = sets["ours"][0].operand_bytes()
    stats = medians(context.clock.graphs(runs, seconds, size))
    return [{"kernel": k, "seconds": s, "predicted": alone[k].predicted} for k, s in stats.items()]


def traced(run: Any) -> list[Any]:
    """Returns the launches of a call with the operands that they had. Each has been made once after
    the call, so that all operands hold numbers."""
    from wn_kernels.backends.triton.launch import recording

    with session_of(run)(), recording() as launches:
        run()
    for one in launches:
        launch_again(one)
    return launches


def launch_again(one: Any) -> None:
    """Makes a recorded launch."""
    if math.prod(one.grid):
        sizes = {"num_warps": one.num_warps, "num_stages": one.num_stages}
        one.kernel[one.grid](**one.arguments, **sizes)


def each(context: Context, *kinds: Sequence[Case], compiled: Sequence[Case] = ()) -> None:
    """Measures case after case of each kind, as long as there is time, and then those beside which
    PyTorch's layer is `compiled` as well."""
    beside = {id(case): ("plain", "eager", "compiled", "ours") for case in compiled}
    for case in context.cases(*kinds, compiled, label=named):
        with context.attempt(named(case)):
            measure(context, case, beside.get(id(case), NAMES))
