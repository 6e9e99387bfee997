"""The cost model's predictions for a GPU that is not there are tables of docs/gpu.md."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.gpu import linear, predict, weight_norm
from bench.report import markdown, replaced
from bench.tables import time_of
from wn_kernels import plan
from wn_kernels.call import Call
from wn_kernels.plan import devices

MARKS = (
    "<!-- predictions: written by python -m bench gpu --predict -->",
    "<!-- predictions: end -->",
)


def _linear() -> list[list[str]]:
    lines = [["M, K, N", "mode", "plain", "eager", "ours", "path", "ours/eager"]]
    for case in linear.BF16:
        m, (k, n) = case.x_shape[0], case.arguments
        call = Call(torch.Size((m, k)), torch.Size((n, k)), torch.bfloat16, torch.bfloat16, 0)
        choice = plan.by_cost(call, "triton")
        vendors, ours = predict.vendors(case), predict.ours(call, choice, case.mode)
        path = choice.forward if case.mode == "infer" else str(choice)
        times = [time_of(seconds) for seconds in (vendors["plain"], vendors["eager"], ours)]
        lines.append([case.label, case.mode, *times, path, f"{ours / vendors['eager']:.2f}"])
    return lines


def _weights() -> list[list[str]]:
    lines = [["weight", *weight_norm.MODES]]
    for shape in weight_norm.SHAPES:
        cases = [weight_norm.Norm(*shape, mode) for mode in weight_norm.MODES]
        times = [time_of(predict.passes(c.bytes, c.mode == "forward")["ours"]) for c in cases]
        lines.append([cases[0].label, *times])
    return lines


def text() -> str:
    """Returns both tables, with the constants that they are made of."""
    device = devices.gpu()
    constants = [
        ["constant", "value", "section that measures it"],
        ["memory bandwidth", f"{device.bandwidth / 1e12:.2f} TB/s", "facts"],
        ["products of 16 bits", f"{device.rates[0] / 1e12:.0f} TFLOP/s", "facts"],
        ["products in TF32", f"{device.tf32_rate / 1e12:.0f} TFLOP/s", "facts"],
        ["products of float32", f"{device.rates[1] / 1e12:.0f} TFLOP/s", "facts"],
        ["a launch", time_of(device.overhead), "facts, host"],
        ["passes over the bandwidth", f"{device.passes:.2f}", "weight_norm"],
        ["what a multiprocessor takes in", f"{device.intake / 1e9:.0f} GB/s", "linear"],
        ["a step of a convolution's loop, µs", f"{1e6 * device.convolution.step:.2f}", "conv"],
    ]
    return "\n\n".join(
        [
            f"### Constants of the {device.name}",
            markdown(constants),
            f"### Linear layers, bfloat16, {device.name}: predicted",
            markdown(_linear()),
            f"### One pass over a weight, {device.name}: predicted",
            markdown(_weights()),
        ]
    )


def write(target: str) -> int:
    """Replaces the tables between the marks of a Markdown file. Returns 1 if it has none."""
    return replaced(Path(target), MARKS, text())
