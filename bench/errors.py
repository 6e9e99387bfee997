"""Compares the errors of weight-normed layers against float64, ours beside PyTorch's.

`python -m bench errors` prints two tables, and with `--write` puts them into `docs/numerics.md`.
An error is `‖result − reference‖ / ‖reference‖`. The reference is the definition in float64, of the
same rounded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import wn_kernels.functional as WF
from bench.cases import Case
from bench.providers import PROVIDERS
from bench.report.page import markdown, replaced
from bench.runner import Runner
from wn_kernels.backends import reference

PAGE = Path("docs/numerics.md")
MARKS = "<!-- errors: written by python -m bench errors --write -->", "<!-- errors: end -->"

DTYPES = ("float32", "bfloat16", "float16")
CASES = [
    Case("linear, 64 rows, 1024→1024", "Linear", (1024, 1024), (64, 1024), "train"),
    Case(
        *("convolution, 256→256, kernel 3", "Conv1d", (256, 256, 3)),
        *((1, 256, 256), "train", {"padding": 1}),
    ),
]


Weight = Callable[[Tensor, Tensor], Tensor]
WEIGHTS: dict[str, Weight] = {
    "PyTorch": lambda v, g: torch._weight_norm(v, g, 0),
    "ours": lambda v, g: WF.weight_norm(v, g),
}


def error(result: Tensor, expected: Tensor) -> float:
    """Returns the relative error of a result. Where it is not finite, the error is not either.

    Raises:
        ValueError: the reference is zero, so that a relative error has no meaning.
    """
    size = expected.norm()
    if size == 0:
        raise ValueError("the reference is zero")
    return ((result.double() - expected).norm() / size).item()


def errors_of(case: Case, name: str) -> dict[str, float]:
    """Returns the errors of the output and of every gradient of a provider's training step. The
    gradient of `V` comes before that of `g`."""
    runner = Runner(case, name, PROVIDERS[name], torch.device("cpu"))
    leaves = runner._leaves()
    y = runner.module(runner.x)
    found = [y, *torch.autograd.grad(y, list(leaves.values()), runner.dy)]
    expected = runner._reference().values()
    names = ("y", "dX", "db", "dV", "dg")
    return {n: error(*pair) for n, *pair in zip(names, found, expected, strict=True)}


def layer_rows(cases: list[Case]) -> list[list[str]]:
    """Returns a row for each layer and dtype, the header first. A cell has PyTorch's error and
    ours."""
    rows: list[list[str]] = []
    for case in cases:
        for dtype in DTYPES:
            narrow = replace(case, dtype=dtype)
            theirs, ours = errors_of(narrow, "eager"), errors_of(narrow, "ours")
            rows = rows or [["layer", "dtype", *(f"`{what}`" for what in theirs)]]
            cells = [f"{theirs[what]:.1e} / {ours[what]:.1e}" for what in theirs]
            rows.append([case.label, dtype, *cells])
    return rows


def weights() -> Iterator[tuple[str, Tensor]]:
    """Yields weights of (8, 256) whose norms are hard to compute, with a description."""
    v = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    yield "elements of size 1", v
    yield "elements of size 1e-30, whose squares underflow", v * 1e-30
    yield "elements of size 1e30, whose squares overflow", v * 1e30
    zero = v.clone()
    zero[3] = 0
    yield "one row is zero", zero
    yield "float16, elements of size 300, whose squares overflow", (v * 300).half()


def weight_rows() -> list[list[str]]:
    """Returns a row for each of `weights`, the header first."""
    rows = [["weight `V` of shape (8, 256)", *WEIGHTS]]
    for what, v in weights():
        g = torch.linspace(0.5, 2, 8, dtype=v.dtype).view(8, 1)
        expected = reference.weight_norm(v.double(), g.double(), 0, 0.0)
        found = (error(compute(v, g), expected) for compute in WEIGHTS.values())
        rows.append([what, *("NaN" if x != x else f"{x:.1e}" for x in found)])
    return rows


def main(write: bool, page: Path = PAGE) -> int:
    """Prints the tables, or writes them between the marks of the page. Returns 1 if the page has
    no marks."""
    where = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, on a CPU."
    intro = f"Relative errors of training steps, PyTorch's / ours: {where}"
    second = "Relative errors of `W`:"
    text = "\n\n".join([intro, markdown(layer_rows(CASES)), second, markdown(weight_rows())])
    if write:
        return replaced(page, MARKS, text)
    Console().print(text, markup=False, soft_wrap=True)
    return 0
