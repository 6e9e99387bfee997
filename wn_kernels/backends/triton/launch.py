"""What every launcher shares: the launch itself, index widths and layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference import takes_tf32
from ..shapes import reduced_dims
from . import configs


class Launch(NamedTuple):
    """One kernel launch: what `recording` hands out in its place."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches made inside the block instead of making them.

    The launchers run as they are, on tensors that need no memory behind them, so what is recorded
    is what a GPU would be given: `bench/codegen.py` compiles it.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any, grid: tuple[int, ...], *, num_warps: int, num_stages: int, **arguments: Any
) -> None:
    """Launches `kernel`, unless the grid is empty."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, num_warps, num_stages))
    elif math.prod(grid):
        device = next(t for t in arguments.values() if isinstance(t, Tensor)).get_device()
        with on_device(device):
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


def on_device(device: int) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, on whose current stream Triton launches; nothing for -1."""
    if device < 0 or device == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether an element of these tensors lies beyond what a 32-bit offset reaches.

    It is the strides that count: a small view of a large storage can reach as far.
    """
    for t in tensors:
        if t is not None and t.numel():
            reach = sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True))
            if reach >= 2**31:
                return True
    return False


def is_describable(t: Tensor) -> bool:
    """Whether hardware can copy tiles of a matrix: rows that start at multiples of 16 bytes."""
    rows, columns = t.stride()
    return (
        columns == 1
        and rows > 0
        and rows * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        and t.numel() > 0
        and max(t.shape) < 2**31
    )


def described(t: Tensor, tile: tuple[int, int]) -> TensorDescriptor:
    """What hardware copies tiles of a matrix by; what lies outside it loads as zero."""
    return TensorDescriptor(t, [*t.shape], [*t.stride()], [*tile])


class Slices(NamedTuple):
    """Tensors of one shape seen as `n` slices over at most three nested reduced loops.

    `loops` are their sizes, outermost first, and `strides[i]` the strides of tensor `i` along the
    slices and along each loop.
    """

    n: int
    loops: tuple[int, int, int]
    strides: list[tuple[int, int, int, int]]


def as_slices(tensors: Sequence[Tensor], dim: int | None) -> Slices | None:
    """The common `Slices` of the tensors, or `None` where their layouts differ too much for one.

    A norm does not care in which order its elements come, so the reduced dimensions are sorted by
    stride and merged wherever every tensor allows it.
    """
    first = tensors[0]
    dims = [d for d in reduced_dims(first.ndim, dim) if first.shape[d] != 1]
    dims.sort(key=lambda d: (first.stride(d), -d), reverse=True)
    groups: list[tuple[int, tuple[int, ...]]] = []  # (size, stride in each tensor)
    for d in dims:
        size, strides = first.shape[d], tuple(t.stride(d) for t in tensors)
        if groups and all(
            outer == size * inner for outer, inner in zip(groups[-1][1], strides, strict=True)
        ):
            size *= groups.pop()[0]
        groups.append((size, strides))
    if len(groups) > 3:
        return None
    none = (0,) * len(tensors)
    (outer, a), (middle, b), (inner, c) = [(1, none)] * (3 - len(groups)) + groups
    n = 1 if dim is None else first.shape[dim]
    along = none if dim is None else tuple(t.stride(dim) for t in tensors)
    return Slices(n, (outer, middle, inner), list(zip(along, a, b, c, strict=True)))


# Programs a launch should have for every multiprocessor before slices are left unsplit.
PROGRAMS_PER_SM = 2


class Walk:
    """How programs share the slices: the grid, and what the kernels of slices take of it."""

    def __init__(
        self,
        slices: Slices,
        tensors: list[Tensor],
        config: configs.SliceConfig | None,
        splits: int | None,
    ) -> None:
        self.slices = slices
        n, r = slices.n, math.prod(slices.loops)
        self.config = config or configs.slices(n, r, n_is_fast=slices.strides[0][0] == 1)
        blocks_n = cdiv(n, self.config.BLOCK_N)
        blocks_r = cdiv(r, self.config.BLOCK_R)
        if splits is None:
            target = configs.target(tensors[0].get_device())
            wanted = PROGRAMS_PER_SM * target.multiprocessors
            splits = max(1, min(blocks_r // 4, wanted // max(1, blocks_n)))
        steps = cdiv(blocks_r, splits)
        self.splits = max(1, cdiv(blocks_r, max(1, steps)))
        self.grid = (blocks_n, self.splits)
        self.arguments = {
            "N": n,
            "R": r,
            "loops": slices.loops,
            "steps": steps,
            "NESTED": sum(size > 1 for size in slices.loops[:2]),
            "WIDE": is_wide(*tensors) or r + self.config.BLOCK_R >= 2**31,
            "ACC": acc_type(tensors[-1]),
            **self.config._asdict(),
        }

    def strides(self, **names: int) -> dict[str, Any]:
        """Stride arguments: `strides(v=0)` is `stride_v`, those of tensor 0."""
        return {f"stride_{name}": self.slices.strides[i] for name, i in names.items()}


def acc_type(v: Tensor) -> tl.dtype:
    """The accumulator that goes with `scale_dtype`."""
    return tl.float64 if v.dtype == torch.float64 else tl.float32


def product_types(x: Tensor, op: str = "matmul") -> dict[str, Any]:
    """The accumulator and the precision of a product of `x`'s dtype, as PyTorch is set for the op,
    `"matmul"` or `"conv"`."""
    return {"ACC": acc_type(x), "PRECISION": "tf32" if takes_tf32(x.dtype, op) else "ieee"}
