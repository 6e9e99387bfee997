"""Norms of slices along any dimension: `n_j = max(‖V_j‖₂, eps)`, `+inf` for zero.

A slice is a row of `R` elements in up to three nested loops (`launch.Slices`), and `Σ A_j B_j` over
it is what norms (A = B) and the gradient's dots have in common. One program owns `BLOCK_N` slices.
Where the slices are too few to fill the machine, the sum is split: each program leaves a partial
sum, and a second stage adds them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ...call import kept_shape, scale_dtype
from . import configs
from .common import as_norm, dot_coefficient, offsets
from .configs import Target
from .launch import (
    Launcher,
    Walk,
    acc_type,
    as_slices,
    remembered,
    target_of,
    unallocated,
)
from .passes import Pass

# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def slice_offsets(offs_n, offs_r, loops, stride, NESTED: tl.constexpr):
    """Offsets of a `(BLOCK_N, BLOCK_R)` tile. NESTED counts the loops around the innermost."""
    if NESTED == 0:
        along = offs_r * stride[3]
    elif NESTED == 1:
        along = (offs_r // loops[2]) * stride[2] + (offs_r % loops[2]) * stride[3]
    else:
        outer = offs_r // loops[2]
        along = (outer // loops[1]) * stride[1] + (outer % loops[1]) * stride[2]
        along += (offs_r % loops[2]) * stride[3]
    return offs_n[:, None] * stride[0] + along[None, :]


@triton.jit
def load_sum(at, mask, PARTS, stride_part, ACC: tl.constexpr):
    """The sum of the PARTS that a tensor was left in, in order."""
    total = tl.load(at, mask=mask, other=0.0).to(ACC)
    for _ in range(1, PARTS):
        at += stride_part
        total += tl.load(at, mask=mask, other=0.0).to(ACC)
    return total


@triton.jit
def slice_sums(
    A,
    B,
    offs_n,
    N,
    R,
    loops,
    stride_a,
    stride_b,
    PARTS,
    stride_part,
    first,
    steps,
    SQUARE: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`⟨A_j, B_j⟩` over the `steps` blocks that follow block `first`; `A` alone if SQUARE. `A` is
    the sum of PARTS.

    The sum across lanes comes once, after the loop.
    """
    sums = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    for step in range(steps):
        offs_r = offsets(first + step, BLOCK_R, WIDE)
        mask = (offs_n < N)[:, None] & (offs_r < R)[None, :]
        at = A + slice_offsets(offs_n, offs_r, loops, stride_a, NESTED)
        a = load_sum(at, mask, PARTS, stride_part, ACC)
        if SQUARE:
            sums += a * a
        else:
            at = B + slice_offsets(offs_n, offs_r, loops, stride_b, NESTED)
            sums += a * tl.load(at, mask=mask, other=0.0).to(ACC)
    return tl.sum(sums, axis=1)


@triton.jit
def slice_sum_kernel(
    A,
    B,
    OUT,
    N,
    R,
    loops,
    steps,
    stride_a,
    stride_b,
    PARTS,
    stride_part,
    SQUARE: tl.constexpr,
    AS_NORM: tl.constexpr,
    EPS: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """OUT[split, j] = Σ A_j B_j over this split; with AS_NORM (one split) the norm of it."""
    offs_n = offsets(tl.program_id(0), BLOCK_N, WIDE)
    split = tl.program_id(1)
    sums = slice_sums(
        A,
        B,
        offs_n,
        N,
        R,
        loops,
        stride_a,
        stride_b,
        PARTS,
        stride_part,
        split * steps,
        steps,
        SQUARE,
        NESTED,
        WIDE,
        ACC,
        BLOCK_N,
        BLOCK_R,
    )
    if AS_NORM:
        sums = as_norm(sums, EPS)
    tl.store(OUT + split * N + offs_n, sums, mask=offs_n < N)


@triton.jit
def finish_kernel(
    PARTIAL,
    G,
    NORM,
    DG,
    COEF,
    N,
    SPLITS,
    GRAD: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Adds the partial sums in order. NORM from squares, or with GRAD: DG and COEF from dots."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    sums = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    for start in range(0, SPLITS, BLOCK_R):
        offs_s = start + tl.arange(0, BLOCK_R)
        mask = mask_n[:, None] & (offs_s < SPLITS)[None, :]
        at = offs_s.to(tl.int64)[None, :] * N + offs_n[:, None]
        sums += tl.load(PARTIAL + at, mask=mask, other=0.0)
    total = tl.sum(sums, axis=1)
    if GRAD:
        n = tl.load(NORM + offs_n, mask=mask_n, other=1.0)
        g = tl.load(G + offs_n, mask=mask_n, other=0.0).to(ACC)
        dg = total / n
        tl.store(DG + offs_n, dg, mask=mask_n)
        tl.store(COEF + offs_n, dot_coefficient(g, n, dg, EPS), mask=mask_n)
    else:
        tl.store(NORM + offs_n, as_norm(total, EPS), mask=mask_n)


# --- launchers ---------------------------------------------------------------------------------


def slice_norms(
    v: Tensor,
    dim: int | None,
    eps: float,
    *,
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
) -> Tensor:
    """`n` for every slice, in the kept shape."""
    (n,) = remembered_slice_norms(target_of(v), (v,), dim, eps, config, splits)(v)
    return n


def prepare_slice_norms(
    target: Target,
    v: Tensor,
    dim: int | None,
    eps: float,
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
) -> Callable[[Tensor], tuple[Tensor]]:
    """`run(v)` returns the norms."""
    slices = as_slices([v], dim)
    if slices is None:
        run_dense = prepare_slice_norms(target, v.contiguous(), dim, eps, config, splits)
        return lambda v: run_dense(v.contiguous())
    walk = Walk(slices, [v], target, config, splits)
    split = walk.splits > 1
    norm = unallocated(kept_shape(v.shape, dim), scale_dtype(v))
    launch = Launcher(
        slice_sum_kernel,
        target,
        walk.grid,
        PARTS=1,
        stride_part=0,
        EPS=eps,
        SQUARE=True,
        AS_NORM=not split,
        **walk.strides(a=0, b=0),
        **walk.arguments,
    )
    run = Pass("v")
    run.new(norm=norm)
    if split:
        partial = unallocated((walk.splits, slices.n), norm.dtype)
        finish = prepare_finish(target, partial, eps, grad=False)
        run.new(partial=partial)
        run.call(launch, "v", "v", "partial")
        run.call(finish, "partial", "norm", "norm", "norm", "norm")
    else:
        run.call(launch, "v", "v", "norm")
    return run.returning("norm")


remembered_slice_norms = remembered(prepare_slice_norms)


def prepare_finish(target: Target, partial: Tensor, eps: float, *, grad: bool) -> Launcher:
    """The second stage over `partial` of shape (splits, N): norms, or with `grad` `dg` and `c`.
    Called as `finish(partial, g, norm, dg, coef)`."""
    splits, n = partial.shape
    config = configs.finish(partial.element_size())
    return Launcher(
        finish_kernel,
        target,
        (triton.cdiv(n, config.BLOCK_N),),
        N=n,
        SPLITS=splits,
        EPS=eps,
        GRAD=grad,
        ACC=acc_type(partial),
        **config._asdict(),
    )
