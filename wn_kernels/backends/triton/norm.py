"""Norms of slices along any dimension: `n_j = max(‖V_j‖, eps)`, `+inf` for zero.

A slice has its elements in up to three nested loops (`launch.Slices`). The kernels reduce it to the
partial of its norm (`common.py`), or to the gradient's dot `⟨A_j, B_j⟩`. A program walks `BLOCK_N`
slices in tiles of three axes: a block of the middle loop, the slices, a block of the innermost
loop. With an axis for each loop, the compiler finds the axis along which each tensor is contiguous.
It loads every tensor wide along its own, and turns the tile where two of them differ.

Where the slices are too few to fill the machine, the reduction is split: each program leaves a
partial result, and whoever reads them merges the parts in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ...call import Norm, kept_shape, scale_dtype
from . import configs
from .common import (
    as_norm,
    merged,
    merged_along,
    merged_ties,
    offsets,
    partial_of,
    tied,
    ties_along,
)
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
def over_slices(tile, NORM: tl.constexpr = None):
    """A tile's partials, merged for each of its slices; their sum without a NORM."""
    return merged_along(merged_along(tile, 2, NORM), 0, NORM)


@triton.jit
def slice_partials(
    A,
    B,
    n,
    offs_n,
    N,
    loops,
    stride_a,
    stride_b,
    first,
    steps,
    DOTS: tl.constexpr,
    NORM: tl.constexpr,
    COUNTS: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The partial of A's norm over the `steps` tiles from the `first`, and with COUNTS its ties, of
    linf. With DOTS it is `⟨A_j, B_j⟩`, and for linf the ties of `B_j` with its norm `n`.

    What crosses lanes comes once, after the loop.
    """
    partials = tl.zeros((BLOCK_P, BLOCK_N, BLOCK_R), ACC)
    ties = tl.zeros((BLOCK_P, BLOCK_N, BLOCK_R), ACC)
    for step in range(steps):
        outer, offs_p, offs_r, mask = tile_offsets(
            first + step,
            offs_n,
            N,
            loops,
            NESTED=NESTED,
            WIDE=WIDE,
            BLOCK_P=BLOCK_P,
            BLOCK_R=BLOCK_R,
        )
        a_at = tile_addresses(A, stride_a, outer, offs_p, offs_n, offs_r, WIDE=WIDE)
        a = tl.load(a_at, mask=mask, other=0.0).to(ACC)
        if DOTS:
            b_at = tile_addresses(B, stride_b, outer, offs_p, offs_n, offs_r, WIDE=WIDE)
            b = tl.load(b_at, mask=mask, other=0.0).to(ACC)
            partials += a * b
            if NORM == "linf":
                ties += tied(b, n[None, :, None])
        else:
            single = partial_of(a, NORM)
            if COUNTS:
                ties = merged_ties(partials, ties, single, 1.0)
            partials = merged(partials, single, NORM)
    if COUNTS:
        ties = ties_along(partials, ties, 2)
        ties = ties_along(merged_along(partials, 2, NORM), ties, 0)
    else:
        ties = over_slices(ties)
    return over_slices(partials, None if DOTS else NORM), ties


@triton.jit
def merged_parts(
    PARTIAL,
    offs_n,
    N,
    SPLITS,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The partials of slices whose SPLITS parts lie in PARTIAL, of shape (SPLITS, N). Without a
    NORM they are sums."""
    partials = tl.zeros((BLOCK_S, BLOCK_N), ACC)
    for start in range(0, SPLITS, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < SPLITS)[:, None] & (offs_n < N)[None, :]
        at = offs_s.to(tl.int64)[:, None] * N + offs_n[None, :]
        partials = merged(partials, tl.load(PARTIAL + at, mask=mask, other=0.0), NORM)
    return merged_along(partials, 0, NORM)


@triton.jit
def slice_sum_kernel(
    A,
    B,
    NORMS,
    OUT,
    TIES,
    N,
    loops,
    steps,
    stride_a,
    stride_b,
    DOTS: tl.constexpr,
    NORM: tl.constexpr,
    COUNTS: tl.constexpr,
    AS_NORM: tl.constexpr,
    EPS: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """OUT[split, j] = the partial of A_j's norm over this split; with AS_NORM (one split) the norm.

    DOTS: OUT[split, j] = Σ A_j B_j instead. For linf, the ties of B_j with NORMS[j] follow the
    dots of all splits.
    COUNTS, of linf: the ties of A_j follow the partials of all splits, or are TIES[j] with AS_NORM.
    """
    offs_n = offsets(tl.program_id(0), BLOCK_N, WIDE)
    split = tl.program_id(1)
    n = 0.0
    if DOTS and NORM == "linf":
        n = tl.load(NORMS + offs_n, mask=offs_n < N, other=1.0)
    partials, ties = slice_partials(
        A=A,
        B=B,
        n=n,
        offs_n=offs_n,
        N=N,
        loops=loops,
        stride_a=stride_a,
        stride_b=stride_b,
        first=split * steps,
        steps=steps,
        DOTS=DOTS,
        NORM=NORM,
        COUNTS=COUNTS,
        NESTED=NESTED,
        WIDE=WIDE,
        ACC=ACC,
        BLOCK_N=BLOCK_N,
        BLOCK_P=BLOCK_P,
        BLOCK_R=BLOCK_R,
    )
    if AS_NORM:
        partials = as_norm(partials, EPS, NORM)
    tl.store(OUT + split * N + offs_n, partials, mask=offs_n < N)
    if COUNTS and AS_NORM:
        tl.store(TIES + offs_n, ties, mask=offs_n < N)
    elif COUNTS or (DOTS and NORM == "linf"):
        tl.store(OUT + (tl.num_programs(1) + split) * N + offs_n, ties, mask=offs_n < N)


@triton.jit
def finish_kernel(
    PARTIAL,
    OUT,
    TIES,
    N,
    SPLITS,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    COUNTS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """OUT[j] = the norm of the slice whose parts have these partials. With COUNTS the ties follow
    them, and TIES[j] are those of the slice."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    partials = merged_parts(
        PARTIAL, offs_n, N, SPLITS, NORM=NORM, ACC=ACC, BLOCK_N=BLOCK_N, BLOCK_S=BLOCK_S
    )
    tl.store(OUT + offs_n, as_norm(partials, EPS, NORM), mask=offs_n < N)
    if COUNTS:
        ties = tl.zeros((BLOCK_S, BLOCK_N), ACC)
        for start in range(0, SPLITS, BLOCK_S):
            offs_s = start + tl.arange(0, BLOCK_S)
            mask = (offs_s < SPLITS)[:, None] & (offs_n < N)[None, :]
            at = PARTIAL + offs_s.to(tl.int64)[:, None] * N + offs_n[None, :]
            largest = tl.load(at, mask=mask, other=0.0) == partials[None, :]
            ties += tl.load(at + SPLITS * N, mask=mask & largest, other=0.0)
        tl.store(TIES + offs_n, tl.sum(ties, axis=0), mask=offs_n < N)


# --- launchers ---------------------------------------------------------------------------------


def slice_norms(
    v: Tensor,
    dim: int | None,
    eps: float,
    *,
    norm: Norm = "l2",
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
) -> Tensor:
    """`n` for every slice, in the kept shape."""
    (n,) = remembered_slice_norms(target_of(v), (v,), dim, eps, norm, config, splits)(v)
    return n


def prepare_slice_norms(
    target: Target,
    v: Tensor,
    dim: int | None,
    eps: float,
    norm: Norm,
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
    counts: bool = False,
) -> Callable[..., tuple[Tensor]]:
    """`run(v)` returns the norms. With `counts`, for linf, `run(v, ties)` also writes their ties to
    the first elements of a tensor."""
    slices = as_slices([v], dim)
    if slices is None:
        dense = v.contiguous()
        run_dense = prepare_slice_norms(target, dense, dim, eps, norm, config, splits, counts)
        return lambda v, *ties: run_dense(v.contiguous(), *ties)
    walk = Walk(slices, [v], target, config, splits, 1 + counts)
    n = unallocated(kept_shape(v.shape, dim), scale_dtype(v))
    partials = prepare_partials(walk, target, eps, norm, 0, counts=counts)
    run = Pass("v", *["ties"] * counts)
    run.new(n=n)
    to_ties = "ties" if counts else "n"
    if walk.splits == 1:
        run.call(partials, "v", "v", "n", "n", to_ties)
    else:
        partial = unallocated((1 + counts, walk.splits, slices.n), n.dtype)
        run.new(partial=partial)
        run.call(partials, "v", "v", "partial", "partial", "partial")
        run.call(_prepare_finish(target, partial, eps, norm), "partial", "n", to_ties)
    return run.returning("n")


remembered_slice_norms = remembered(prepare_slice_norms)


def prepare_partials(
    walk: Walk,
    target: Target,
    eps: float,
    norm: Norm,
    a: int,
    b: int | None = None,
    counts: bool = False,
) -> Launcher:
    """`partials(A, B, norms, out, ties)` of the tensors `a` and `b` of the walk: their dots, behind
    which linf has the ties of `B` with its norms. Without `b`, partials of the norms of `A`, or the
    norms where the walk is not split; with `counts` the ties of `A` as well, behind partials or in
    `ties`. Any tensor takes the place of one that is not used."""
    return Launcher(
        slice_sum_kernel,
        target,
        walk.grid,
        DOTS=b is not None,
        NORM=norm,
        COUNTS=counts,
        AS_NORM=b is None and walk.splits == 1,
        EPS=eps,
        **walk.strides(a=a, b=a if b is None else b),
        **walk.arguments,
    )


def _prepare_finish(target: Target, partial: Tensor, eps: float, norm: Norm) -> Launcher:
    """`finish(partial, norms, ties)` merges partials of shape (1, splits, N), or (2, splits, N)
    where their ties follow."""
    kinds, splits, n = partial.shape
    config = configs.finish(partial.element_size())
    return Launcher(
        finish_kernel,
        target,
        (triton.cdiv(n, config.BLOCK_N),),
        N=n,
        SPLITS=splits,
        EPS=eps,
        NORM=norm,
        COUNTS=kinds > 1,
        ACC=acc_type(partial),
        **config._asdict(),
    )
