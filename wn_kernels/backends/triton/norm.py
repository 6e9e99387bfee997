"""Norms of slices along any dimension: `n_j = max(‖V_j‖₂, eps)`, `+inf` for zero.

A slice has its elements in up to three nested loops (`launch.Slices`), and `Σ A_j B_j` over it is
what norms (A = B) and the gradient's dots have in common. A program walks `BLOCK_N` slices in tiles
of three axes: a block of the middle loop, the slices, a block of the innermost loop. With an axis
for each loop, the compiler finds the axis along which each tensor is contiguous. It loads every
tensor wide along its own, and turns the tile where two of them differ.

Where the slices are too few to fill the machine, the sum is split: each program leaves a partial
sum, and whoever reads the sums adds the parts in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ...call import kept_shape, scale_dtype
from . import configs
from .common import as_norm, offsets
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
def tile_offsets(
    step,
    offs_n,
    N,
    loops,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The place of tile `step` in the loops: `(outer, offs_p, offs_r, mask)`. NESTED counts the
    loops around the innermost."""
    outer = 0
    block_p = 0
    block_r = step
    if NESTED > 0:
        blocks_r = tl.cdiv(loops[2], BLOCK_R)
        block_p = step // blocks_r
        block_r = step % blocks_r
        if NESTED > 1:
            blocks_p = tl.cdiv(loops[1], BLOCK_P)
            outer = block_p // blocks_p
            block_p = block_p % blocks_p
    offs_p = offsets(block_p, BLOCK_P, WIDE)
    offs_r = offsets(block_r, BLOCK_R, WIDE)
    mask_p = (offs_p < loops[1]) & (outer < loops[0])
    mask_r = offs_r < loops[2]
    mask = mask_p[:, None, None] & (offs_n < N)[None, :, None] & mask_r[None, None, :]
    return outer, offs_p, offs_r, mask


@triton.jit
def tile_addresses(T, stride, outer, offs_p, offs_n, offs_r, WIDE: tl.constexpr):
    """Of a tile's elements in `T`."""
    if WIDE:
        outer = tl.cast(outer, tl.int64)
    T += outer * stride[1]
    at_p = (offs_p * stride[2])[:, None, None]
    at_n = (offs_n * stride[0])[None, :, None]
    return T + at_p + at_n + (offs_r * stride[3])[None, None, :]


@triton.jit
def over_slices(tile):
    """The sum of a tile's elements for each of its slices."""
    return tl.sum(tl.sum(tile, axis=2), axis=0)


@triton.jit
def slice_sums(
    A,
    B,
    offs_n,
    N,
    loops,
    stride_a,
    stride_b,
    first,
    steps,
    SQUARE: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`⟨A_j, B_j⟩` over the `steps` tiles from the `first`; `A` alone if SQUARE.

    The sum across lanes comes once, after the loop.
    """
    sums = tl.zeros((BLOCK_P, BLOCK_N, BLOCK_R), ACC)
    for step in range(steps):
        outer, offs_p, offs_r, mask = tile_offsets(
            first + step, offs_n, N, loops, NESTED, WIDE, BLOCK_P, BLOCK_R
        )
        a_at = tile_addresses(A, stride_a, outer, offs_p, offs_n, offs_r, WIDE)
        a = tl.load(a_at, mask=mask, other=0.0).to(ACC)
        if SQUARE:
            sums += a * a
        else:
            b_at = tile_addresses(B, stride_b, outer, offs_p, offs_n, offs_r, WIDE)
            sums += a * tl.load(b_at, mask=mask, other=0.0).to(ACC)
    return over_slices(sums)


@triton.jit
def partial_sums(
    PARTIAL,
    offs_n,
    N,
    SPLITS,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The sums of slices whose SPLITS partial sums lie in PARTIAL, of shape (SPLITS, N)."""
    sums = tl.zeros((BLOCK_S, BLOCK_N), ACC)
    for start in range(0, SPLITS, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < SPLITS)[:, None] & (offs_n < N)[None, :]
        at = offs_s.to(tl.int64)[:, None] * N + offs_n[None, :]
        sums += tl.load(PARTIAL + at, mask=mask, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def slice_sum_kernel(
    A,
    B,
    OUT,
    N,
    loops,
    steps,
    stride_a,
    stride_b,
    SQUARE: tl.constexpr,
    AS_NORM: tl.constexpr,
    EPS: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
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
        loops,
        stride_a,
        stride_b,
        split * steps,
        steps,
        SQUARE,
        NESTED,
        WIDE,
        ACC,
        BLOCK_N,
        BLOCK_P,
        BLOCK_R,
    )
    if AS_NORM:
        sums = as_norm(sums, EPS)
    tl.store(OUT + split * N + offs_n, sums, mask=offs_n < N)


@triton.jit
def finish_kernel(
    PARTIAL,
    OUT,
    N,
    SPLITS,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """OUT[j] = the norm whose square is the sum of the partial sums."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = partial_sums(PARTIAL, offs_n, N, SPLITS, ACC, BLOCK_N, BLOCK_S)
    tl.store(OUT + offs_n, as_norm(sums, EPS), mask=offs_n < N)


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
    norm = unallocated(kept_shape(v.shape, dim), scale_dtype(v))
    sums = prepare_sums(walk, target, eps, 0, 0)
    run = Pass("v")
    run.new(norm=norm)
    if walk.splits == 1:
        run.call(sums, "v", "v", "norm")
    else:
        partial = unallocated((walk.splits, slices.n), norm.dtype)
        run.new(partial=partial)
        run.call(sums, "v", "v", "partial")
        run.call(_prepare_finish(target, partial, eps), "partial", "norm")
    return run.returning("norm")


remembered_slice_norms = remembered(prepare_slice_norms)


def prepare_sums(walk: Walk, target: Target, eps: float, a: int, b: int) -> Launcher:
    """`sums(A, B, out)` of the tensors `a` and `b` of the walk: partial sums, or norms where `A` is
    `B` and the walk is not split."""
    return Launcher(
        slice_sum_kernel,
        target,
        walk.grid,
        SQUARE=a == b,
        AS_NORM=a == b and walk.splits == 1,
        EPS=eps,
        **walk.strides(a=a, b=b),
        **walk.arguments,
    )


def _prepare_finish(target: Target, partial: Tensor, eps: float) -> Launcher:
    """`finish(partial, norms)` adds up partial sums of squares of shape (splits, N)."""
    splits, n = partial.shape
    config = configs.finish(partial.element_size())
    return Launcher(
        finish_kernel,
        target,
        (triton.cdiv(n, config.BLOCK_N),),
        N=n,
        SPLITS=splits,
        EPS=eps,
        ACC=acc_type(partial),
        **config._asdict(),
    )
