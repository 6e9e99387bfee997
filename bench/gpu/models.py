"""A whole network, HiFi-GAN's vocoder: folded, as PyTorch runs it, and fused; by the clock, and
replayed from a CUDA graph; in float32 and in TF32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from bench import precision
from bench.cases import MODES
from bench.gpu import predict
from bench.gpu.context import Context, named
from bench.models import ModelCase, ModelRunner
from bench.suite import medians
from wn_kernels import plan, tuning

NAMES = ("plain", "eager", "ours")


@dataclass(frozen=True)
class Case:
    """A model in one mode."""

    label: str
    mode: str
    precision: str

    def session(self) -> AbstractContextManager[Any]:
        """What it runs inside of."""
        return precision.tf32() if self.precision == "tf32" else nullcontext()


CASES = [Case("hifigan", mode, kind) for kind in ("own", "tf32") for mode in MODES]


def main(context: Context) -> None:
    for case in context.cases(CASES, named):
        with context.attempt(named(case)):
            _measure(context, case)


def _measure(context: Context, case: Case) -> None:
    plain = ModelCase(case.label, case.mode)
    runs = context.checked(
        {name: partial(ModelRunner, plain, name, context.device) for name in NAMES}
    )
    with case.session():
        seconds = context.seconds()
        wall = context.clock.wall(runs, seconds)
        graphs = context.clock.graphs({name: [run] for name, run in runs.items()}, seconds)
        predicted = _predicted(runs["ours"]) if case.mode == "infer" and "ours" in runs else {}
    record = plain.record() | asdict(case)
    context.result(record, wall, predicted, conditions={"CUDA graph": medians(graphs)})


def _predicted(run: Any) -> dict[str, float]:
    """The sum over the layers that have weight norm, of their paths and of their products."""
    with torch.no_grad():
        calls = tuning.calls_of(run.model, (run.x,))
    found = [call for call, backend in calls if backend == "triton"]
    ours = sum(predict.ours(call, plan.by_cost(call, "triton"), "infer") for call in found)
    return {"ours": ours, "plain": sum(map(predict.product, found))}
