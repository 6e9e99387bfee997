"""This section times a whole network, HiFi-GAN's vocoder, by the clock and replayed from a CUDA
graph, in float32 and in TF32. The network runs folded, as PyTorch has it, fused, and fused with the
weights of all layers in one launch. In inference it also runs with weights that are computed once,
by the clock alone, because a graph holds no weight that was computed before it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from bench.gpu import predict
from bench.gpu.context import Context, named
from bench.layer import MODES
from bench.measure import precision
from bench.models import ModelCase, ModelRunner
from bench.suite import medians
from wn_kernels import plan, tuning

CASES = [ModelCase("hifigan", mode) for mode in MODES]


def main(context: Context) -> None:
    for case in context.cases(CASES, label=named):
        with context.attempt(named(case)):
            _measure(context, case)


def _measure(context: Context, case: ModelCase) -> None:
    runs = context.checked(
        {name: partial(ModelRunner, case, name, context.device) for name in case.names()}
    )
    seconds = context.seconds()
    # A model is checked in float32, and the same model is then timed in TF32.
    sessions: dict[str, AbstractContextManager[Any]]
    sessions = {"own": nullcontext(), "tf32": precision.tf32()}
    for kind, session in sessions.items():
        with session:
            wall = context.clock.wall(runs, seconds)
            captured = _capturable(context, runs)
            graphs = context.clock.graphs(captured, seconds)
            infers = case.mode == "infer" and "ours" in runs
            predicted = _predicted(runs["ours"]) if infers else {}
        conditions = {"CUDA graph": medians(graphs)}
        record = case.record() | {"precision": kind}
        context.result(record, wall, predicted, conditions=conditions)


def _capturable(context: Context, runs: dict[str, Any]) -> dict[str, list[Any]]:
    """Returns the models that a graph captures. What a capture raises is written down."""
    found = {}
    for name, run in runs.items():
        if name != "frozen":
            with context.attempt(f"{name} in a graph"):
                context.clock.graphs({name: [run]}, 0.0)
                found[name] = [run]
    return found


def _predicted(run: Any) -> dict[str, float]:
    """Returns the sums over the layers that have weight norm, of their paths and of their
    products."""
    with torch.no_grad():
        calls = tuning.calls_of(run.model, (run.x,))
    found = [call for call, backend in calls if backend == "triton"]
    ours = sum(predict.ours(call, plan.by_cost(call, "triton"), "infer") for call in found)
    return {"ours": ours, "plain": sum(map(predict.product, found))}
