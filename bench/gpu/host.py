"""Microseconds of the processor for a call: layers so small that the GPU waits for it."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench import overhead
from bench.cases import Case, Runner
from bench.gpu.context import Context, named
from bench.gpu.layers import paths
from bench.providers import PROVIDERS
from wn_kernels.plan import costs, devices

NAMES = ("plain", "eager", "legacy", "ours")


def main(context: Context) -> None:
    for case in context.cases(overhead.CASES, named):
        with context.attempt(named(case)):
            device = context.device
            runs = context.checked(
                {name: partial(Runner, case, name, PROVIDERS[name], device) for name in NAMES}
            )
            stats = context.clock.host(runs, context.seconds())
            context.result(case.record(), stats, _predicted(case, runs["ours"]))


def _predicted(case: Case, run: Any) -> dict[str, float]:
    """The cost model's overhead for every launch."""
    train = case.mode == "train"
    launches = {"plain": 3 if train else 1}
    launches["eager"] = launches["plain"] + (2 if train else 1)
    found = paths(case, run.module, run.x)
    if found is not None:
        candidates = costs.costs(found.call, "triton")
        launches["ours"] = len(candidates.forward[found.choice.forward])
        if train:
            launches["ours"] += len(candidates.backward[found.choice.backward])
    return {name: count * devices.gpu().overhead for name, count in launches.items()}
