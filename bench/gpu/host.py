"""This section times the processor alone, in microseconds of a call. The layers are so small that
the GPU waits for it; the operator alone and a network of 78 layers are beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from bench import overhead
from bench.cases import Case
from bench.gpu.context import Context, named
from bench.gpu.layers import paths
from bench.layer import MODES
from bench.measure import timing
from bench.models import MODELS, ModelCase, ModelRunner
from bench.norms import NormCase
from bench.providers import PROVIDERS
from bench.runner import Runner
from wn_kernels.plan import costs, devices

NAMES = ("plain", "eager", "legacy", "ours")
NORMS = [NormCase((64, 64), 0, mode) for mode in MODES]
MODEL = "hifigan"


class Row(NamedTuple):
    """A case with what sets up each provider, and a function that counts the launches which the
    cost model expects."""

    case: Any
    builds: dict[str, Callable[[], Any]]
    launches: Callable[[dict[str, Any]], dict[str, int]]


class Network(ModelRunner):
    """A model over so small an input that the GPU waits for the processor. The queue of launches is
    sure to hold only a single call of it."""

    launches = timing.QUEUE

    def __init__(self, case: ModelCase, name: str, device: torch.device) -> None:
        super().__init__(case, name, device)
        self.x = torch.randn(MODELS[case.label].small).to(self.x)


def layers(device: torch.device) -> list[Row]:
    """Returns a small layer of each kind."""
    return [
        Row(
            case,
            {name: partial(Runner, case, name, PROVIDERS[name], device) for name in NAMES},
            partial(_of_layer, case),
        )
        for case in overhead.CASES
    ]


def operator(device: torch.device) -> list[Row]:
    """Returns the call of the weight alone."""
    return [
        Row(case, case.competitors(device, full=False), partial(_of_operator, case))
        for case in NORMS
    ]


def network(device: torch.device) -> list[Row]:
    """Returns a whole model."""
    cases = [ModelCase(MODEL, mode) for mode in MODES]
    return [
        Row(
            case,
            {name: partial(Network, case, name, device) for name in case.names()},
            lambda runs: {},
        )
        for case in cases
    ]


def main(context: Context) -> None:
    kinds = [rows(context.device) for rows in (layers, operator, network)]
    for row in context.cases(*kinds, label=lambda row: named(row.case)):
        with context.attempt(named(row.case)):
            runs = context.checked(row.builds)
            stats = context.clock.host(runs, context.seconds())
            launches = row.launches(runs)
            predicted = {name: n * devices.gpu().overhead for name, n in launches.items()}
            record = row.case.record()
            if isinstance(row.case, NormCase):
                record["label"] = f"weight_norm {row.case.label}"
            context.result(record, stats, predicted)


def _of_operator(case: NormCase, runs: dict[str, Any]) -> dict[str, int]:
    """Returns the launches of the weight alone: one, and another one for the gradients."""
    return dict.fromkeys(runs, 1 if case.mode == "infer" else 2)


def _of_layer(case: Case, runs: dict[str, Any]) -> dict[str, int]:
    """Returns the launches of a layer as the cost model counts them."""
    train = case.mode == "train"
    launches = {"plain": 3 if train else 1}
    launches["eager"] = launches["plain"] + (2 if train else 1)
    if "ours" in runs and (found := paths(case, runs["ours"].module, runs["ours"].x)):
        candidates = costs.costs(found.call, "triton")
        launches["ours"] = len(candidates.forward[found.choice.forward])
        if train:
            launches["ours"] += len(candidates.backward[found.choice.backward])
    return launches
