"""Layers by every path: each whole call over rotating operands, and each kernel of ours alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from bench import shipped
from bench.cases import Case, Runner
from bench.gpu import predict
from bench.gpu.context import Context, Run, named
from bench.providers import PROVIDERS, VARIANT, Provider
from bench.suite import medians
from bench.timing import session_of
from wn_kernels import plan, prepare, tuning
from wn_kernels.call import Call


class Paths(NamedTuple):
    """How Triton may serve a case: the call, the cost model's choice, and every other choice that
    makes a difference in the case's mode, by name."""

    call: Call
    choice: Any
    others: dict[str, Any]


def paths(case: Case, layer: nn.Module, x: torch.Tensor) -> Paths | None:
    """What there is to choose from; `None`, where Triton serves no call of the layer's.

    Without gradients the variants of the forward, in a training step those of the backward after
    the forward that is chosen.
    """
    for call, backend in tuning.calls_of(layer, (x,)):
        if backend != "triton":
            continue
        choice = plan.by_cost(call, backend)
        found = {}
        for other in plan.choices(call, backend):
            if case.mode == "infer" and other.backward == choice.backward:
                found[other.forward] = other
            elif case.mode == "train" and other.forward == choice.forward:
                found[str(other).partition("/")[2]] = other
        return Paths(call, choice, {key: o for key, o in found.items() if o != choice})
    return None


def measure(
    context: Context, case: Case, names: Sequence[str] = ("plain", "eager", "ours")
) -> None:
    """Times every provider of a case, and writes the result."""
    device = context.device
    builds = {name: partial(Runner, case, name, PROVIDERS[name], device) for name in names}
    probe = builds["ours"]()
    with session_of(probe)(), torch.no_grad():
        found = paths(case, probe.module, probe.x)
    if found is not None:
        for name, choice in found.others.items():
            session = partial(prepare.fixed, found.call, choice)
            provider = Provider(PROVIDERS["ours"].make, session=session)
            builds[VARIANT + name] = partial(Runner, case, VARIANT + name, provider, device)
    runners = context.checked(builds)
    sets = {name: context.clock.sets(run) for name, run in runners.items()}
    seconds = context.seconds()
    stats = context.clock.graphs(sets, seconds / 2)
    more: dict[str, Any] = {"operand_bytes": {n: r.operand_bytes() for n, r in runners.items()}}
    more |= {"sets": {name: len(runs) for name, runs in sets.items()}}
    predicted = predict.vendors(case)
    if found is not None:
        choices = {"ours": found.choice} | {VARIANT + k: o for k, o in found.others.items()}
        predicted |= {n: predict.ours(found.call, o, case.mode) for n, o in choices.items()}
        more["chosen"] = str(found.choice)
        more["kernels"] = _kernels(context, case, sets, found.call, choices, seconds / 2)
    context.result(case.record(), stats, predicted, **more)


def _kernels(
    context: Context,
    case: Case,
    sets: dict[str, list[Any]],
    call: Call,
    choices: dict[str, Any],
    seconds: float,
) -> list[dict[str, Any]]:
    """Each kernel that the paths launch, alone and once."""
    alone: dict[str, list[Run]] = {}
    predicted: dict[str, float | None] = {}
    for name, choice in choices.items():
        if name not in sets:
            continue
        launches = [traced(run) for run in sets[name]]
        expected = predict.kernels(call, choice, case.mode, len(launches[0]))
        for i, of_model in enumerate(expected):
            key = shipped.named(launches[0][i], case.dtype, "").title
            if key not in alone:
                alone[key] = [partial(launch_again, each[i]) for each in launches]
                predicted[key] = of_model
    stats = medians(context.clock.graphs(alone, seconds)) if alone else {}
    return [{"kernel": k, "seconds": s, "predicted": predicted[k]} for k, s in stats.items()]


def traced(run: Any) -> list[Any]:
    """The launches of a call, with the operands that they had; each was made once after the call,
    so that all of them hold numbers."""
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


def each(context: Context, cases: Sequence[Case], **options: Any) -> None:
    """Measures case after case, as long as there is time."""
    for case in context.cases(cases, named):
        with context.attempt(named(case)):
            measure(context, case, **options)
