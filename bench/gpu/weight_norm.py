"""This section times the operator alone, forward and backward, beside PyTorch's and beside the
floor: a copy of `V`, and a sum of `dW` and `V`. PyTorch has a kernel for the norm l2 alone. The
other norms are compared with its operations, and with ours of l2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import wn_kernels.functional as WF
from bench.gpu import predict
from bench.gpu.context import Context, named
from bench.providers import NORM_L2, composed, slice_norms
from bench.runner import check_close
from wn_kernels.backends import reference
from wn_kernels.call import Norm, kept_shape, reduced_dims

MODES = ("forward", "backward")
OPS = torch.ops.wn_kernels

# Elements above which a few slices are compared for all.
LARGE = 1 << 26


@dataclass(frozen=True)
class Weight:
    """A weight, the dimension whose slices are normalised, the direction, and the norm."""

    v_shape: tuple[int, ...]
    dim: int
    dtype: str
    mode: str
    norm: Norm = "l2"

    @property
    def label(self) -> str:
        return f"{'×'.join(map(str, self.v_shape))}, dim={self.dim}, {self.dtype}"

    def names(self) -> tuple[str, ...]:
        """Returns the names of the providers."""
        names = ("plain", "eager", "ours")
        return names if self.norm == "l2" else (*names, NORM_L2)

    @property
    def bytes(self) -> int:
        """Returns the bytes of the weight."""
        return math.prod(self.v_shape) * getattr(torch, self.dtype).itemsize


SHAPES = [
    ((4096, 4096), 0, "bfloat16"),
    ((64, 512, 512), 0, "float16"),
    ((64, 64), 0, "bfloat16"),
    ((768, 48, 128), 2, "float32"),
    ((1024, 1024), 0, "float32"),
    ((4096, 4096), 1, "bfloat16"),
    ((512, 256, 16), 0, "float32"),
    ((1024, 1024, 1024), 0, "float32"),
]
CASES = [Weight(*shape, mode) for shape in SHAPES for mode in MODES]
OTHER_NORMS = [
    Weight(*shape, mode, norm)
    for shape in (SHAPES[0], SHAPES[5], SHAPES[4])
    for norm in ("l1", "linf")
    for mode in MODES
]


class Operands(NamedTuple):
    """`V`, `g` and `dW`, which the providers share: the largest `V` takes 4 GB."""

    v: Tensor
    g: Tensor
    dw: Tensor

    @staticmethod
    def of(case: Weight, device: torch.device) -> Operands:
        """Returns random operands."""
        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)
        v = torch.randn(case.v_shape, device=device, dtype=dtype)
        g = (torch.rand(kept_shape(case.v_shape, case.dim), device=device) + 0.5).to(dtype)
        if case.mode == "forward":
            return Operands(v, g, v)
        return Operands(v, g, torch.randn_like(v).add_(v))  # no ⟨dW, V⟩ is small by chance


class NormRunner:
    """One provider set up for one weight and direction: call it to run it once."""

    def __init__(self, case: Weight, name: str, operands: Operands) -> None:
        self.case, self.name = case, name
        self.norm = "l2" if name == NORM_L2 else case.norm
        self.v, self.g, self.dw = operands
        self.n = self._kept()

    def _kept(self) -> Tensor | None:
        """Returns the norms that the forward keeps for the backward."""
        v, g, dim = self.v, self.g, self.case.dim
        if self.case.mode == "forward" or self.name == "plain":
            return None
        if self.name == "eager":
            if self.norm == "l2":
                return torch._weight_norm_interface(v, g, dim)[1]
            return slice_norms(v, dim, self.norm)
        return OPS.layer(None, v, g, None, [], dim, 0.0, self.norm, v.dtype, "")[1]

    def operand_bytes(self) -> int:
        """Returns the bytes that a call reads."""
        return self.case.bytes * (1 if self.case.mode == "forward" else 2)

    def twin(self) -> NormRunner:
        """Returns the same provider with operands of its own."""
        return NormRunner(self.case, self.name, Operands.of(self.case, self.v.device))

    @torch.no_grad()
    def __call__(self) -> Any:
        return self._forward() if self.case.mode == "forward" else self._backward()

    def _forward(self) -> Tensor:
        """Returns `W`, or a copy of `V`."""
        v, g, dim = self.v, self.g, self.case.dim
        if self.name == "plain":
            return v.clone()
        if self.name != "eager":
            return WF.weight_norm(v, g, dim=dim, norm=self.norm)
        return (
            torch._weight_norm(v, g, dim) if self.norm == "l2" else composed(v, g, dim, self.norm)
        )

    def _backward(self) -> Any:
        """Returns `(dV, dg)`, or the sum of `dW` and `V`."""
        dw, v, g, n, dim = self.dw, self.v, self.g, self.n, self.case.dim
        if self.name == "plain":
            return dw + v
        if self.name != "eager":
            options = [], dim, 0.0, self.norm, "", [False, True, True, False]
            return OPS.layer_backward(dw, None, v, g, n, *options)[1:3]
        if self.norm == "l2":
            return torch.ops.aten._weight_norm_interface_backward(dw, v, g, n, dim)
        return composed_grads(dw, v, g, n, dim, self.norm)

    def check(self) -> None:
        """Compares with the definition in float64, of a large weight a few slices.

        Raises:
            AssertionError: the provider is wrong; it must not be timed.
        """
        if self.name == "plain":
            return
        dim = self.case.dim
        slices = self.v.shape[dim] if self.v.numel() <= LARGE else 8

        def some(t: Tensor) -> Tensor:
            return t.narrow(dim, 0, slices).double()

        v, g = some(self.v).requires_grad_(), some(self.g).requires_grad_()
        w = reference.weight_norm(v, g, dim, 0.0, self.norm)
        length = self.v.numel() // max(1, self.g.numel())
        what = f"{self.name} is wrong for {self.case}"
        if self.case.mode == "forward":
            found = self()
            check_close(f"{what}: output", _some_of(found, dim, slices), w, length)
            return
        right = torch.autograd.grad(w, (v, g), some(self.dw))
        for name, grad, expected in zip("vg", self(), right, strict=True):
            check_close(
                f"{what}: gradient of {name}", _some_of(grad, dim, slices), expected, length
            )


def composed_grads(
    dw: Tensor, v: Tensor, g: Tensor, n: Tensor, dim: int, norm: Norm
) -> tuple[Tensor, Tensor]:
    """Returns `(dV, dg)` of `composed` by as few operations as the formula of
    `wn_kernels/backends/reference.py` takes. Autograd takes more, and runs on the stream of the
    forward, which no graph captures."""
    dims = reduced_dims(v.ndim, dim)
    s, dg = g / n, (dw * v).sum(dims, keepdim=True) / n
    slope = v.sign()
    if norm == "l1":
        return s * dw - (s * dg) * slope, dg
    slope *= v.abs() == n
    return s * dw - (s * dg / slope.abs().sum(dims, keepdim=True)) * slope, dg


def _some_of(t: Tensor, dim: int, slices: int) -> Tensor:
    return t.narrow(dim, 0, slices)


def main(context: Context) -> None:
    for case in context.cases(CASES, OTHER_NORMS, label=named):
        with context.attempt(named(case)):
            operands = Operands.of(case, context.device)
            builds: dict[str, Callable[[], Any]] = {
                name: partial(NormRunner, case, name, operands) for name in case.names()
            }
            runners = context.checked(builds)
            sets = {name: context.clock.sets(run) for name, run in runners.items()}
            stats = context.clock.graphs(sets, context.seconds())
            record = asdict(case) | {"label": case.label, "is_large": True}
            record["bytes"] = case.bytes * (2 if case.mode == "forward" else 3)
            record["parameters"] = math.prod(case.v_shape)
            predicted = predict.passes(case.bytes, case.mode == "forward")
            if case.norm != "l2":
                del predicted["eager"]  # it is no kernel
            context.result(record, stats, predicted)
