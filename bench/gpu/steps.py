"""This section times whole steps by the clock, call after call: recurrent layers and cells,
training steps whose loss contains a gradient, and the last layer of a DINO head, whose magnitudes
are not trained. The processor's part of a call is timed as well.

They are not captured in graphs, because a capture refuses the backward of PyTorch's recurrent
layers.
"""

from __future__ import annotations

from dataclasses import replace

from bench import recurrent, second_order
from bench.cases import LINEAR
from bench.gpu.context import Context, named
from bench.measure.timing import QUEUE
from bench.suite import medians

# The share of a case's timing that is by the clock; the rest is of the processor alone.
CLOCK = 0.6

LAYERS = [case for case in recurrent.CASES if "Cell" not in case.label]
CELLS = [case for case in recurrent.CASES if "Cell" in case.label]
HEADS = [
    replace(case, label=f"DINO head {case.label}", dtype=dtype)
    for dtype in ("float32", "bfloat16")
    for case in LINEAR
    if case.frozen_g
]


def main(context: Context) -> None:
    for case in context.cases(LAYERS, second_order.CASES, HEADS, CELLS, label=named):
        with context.attempt(named(case)):
            runs = context.checked(case.competitors(context.device, full=False))
            for run in runs.values():
                run.launches = QUEUE  # as many as may be: the GPU is waited for after each call
            seconds = context.seconds()
            wall = context.clock.wall(runs, CLOCK * seconds)
            host = context.clock.host(runs, (1 - CLOCK) * seconds)
            context.result(case.record(), wall, {}, conditions={"processor": medians(host)})
