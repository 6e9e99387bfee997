"""Scaled weights and their gradients, for slices along any dimension.

    W = s ⊙ V,   s_j = g_j / n_j
    a_j = ⟨dW_j, V_j⟩,   dg_j = a_j / n_j,   dV = s ⊙ dW - c ⊙ u,   c_j = s_j dg_j / d_j

Here `u_j / d_j` is the slope of the norm (`common.py`), which is `V_j / n_j` for l2.

There are three forms. "held": the slices of a program are one tile, which stays in registers from
the sum to the result, so that everything is read once. "walked": a program walks its slices once
for the sum, and back for the result. "partial": the sum is split (`norm.py`). A first kernel leaves
partial sums or magnitudes, and each program of the second merges those of its slices.

What is walked a second time is walked in reverse, as the cache has the last of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call import Norm, kept_shape, scale_dtype
from . import configs
from .common import as_norm, cast, offsets, partial_of, slope, slope_coefficient, tied
from .configs import Target
from .launch import (
    Launcher,
    Walk,
    allocator,
    as_slices,
    remembered,
    target_of,
    unallocated,
)
from .norm import (
    merged_parts,
    over_slices,
    prepare_partials,
    slice_partials,
    tile_addresses,
    tile_offsets,
)
from .passes import Pass
from .pixels import with_channels_last

# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def block_of(block_n):
    """The block of slices of a program, and the program's share of it. A block that is given is not
    shared. Where it is `None`, the ids of the program are both, counted from the last."""
    if block_n is None:
        return (
            tl.num_programs(0) - 1 - tl.program_id(0),
            tl.num_programs(1) - 1 - tl.program_id(1),
        )
    else:
        return block_n, 0


@triton.jit
def weight_kernel(
    V,
    G,
    PARTIAL,
    NORMS,
    W,
    block_n,
    N,
    loops,
    steps,
    stride_v,
    stride_w,
    SPLITS,
    FORM: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """W = g / n ⊙ V, and NORMS, where its address is not zero. Only the form "partial" reads
    PARTIAL, the partials of the norms."""
    block_n, split = block_of(block_n)
    offs_n = offsets(block_n, BLOCK_N, WIDE)
    mask_n = offs_n < N
    first = split * steps
    if FORM == "held":
        outer, offs_p, offs_r, mask = tile_offsets(
            first, offs_n, N, loops, NESTED=NESTED, WIDE=WIDE, BLOCK_P=BLOCK_P, BLOCK_R=BLOCK_R
        )
        v_at = tile_addresses(V, stride_v, outer, offs_p, offs_n, offs_r, WIDE=WIDE)
        v = tl.load(v_at, mask=mask, other=0.0).to(ACC)
        partial = over_slices(partial_of(v, NORM), NORM)
    elif FORM == "walked":
        partial, _ = slice_partials(
            A=V,
            B=V,
            n=0.0,
            offs_n=offs_n,
            N=N,
            loops=loops,
            stride_a=stride_v,
            stride_b=stride_v,
            first=first,
            steps=steps,
            DOTS=False,
            NORM=NORM,
            COUNTS=False,
            NESTED=NESTED,
            WIDE=WIDE,
            ACC=ACC,
            BLOCK_N=BLOCK_N,
            BLOCK_P=BLOCK_P,
            BLOCK_R=BLOCK_R,
        )
    else:
        partial = merged_parts(
            PARTIAL, offs_n, N, SPLITS, NORM=NORM, ACC=ACC, BLOCK_N=BLOCK_N, BLOCK_S=BLOCK_S
        )
    n = as_norm(partial, EPS, NORM)
    keeps = NORMS.to(tl.int64) != 0
    tl.store(NORMS + offs_n, n, mask=mask_n & (split == 0) & keeps)
    scale = tl.load(G + offs_n, mask=mask_n, other=0.0).to(ACC) / n
    for step in range(steps):
        outer, offs_p, offs_r, mask = tile_offsets(
            first + steps - 1 - step,
            offs_n,
            N,
            loops,
            NESTED=NESTED,
            WIDE=WIDE,
            BLOCK_P=BLOCK_P,
            BLOCK_R=BLOCK_R,
        )
        if FORM != "held":
            v_at = tile_addresses(V, stride_v, outer, offs_p, offs_n, offs_r, WIDE=WIDE)
            v = tl.load(v_at, mask=mask, other=0.0).to(ACC)
        w = cast(v * scale[None, :, None], W.dtype.element_ty)
        w_at = tile_addresses(W, stride_w, outer, offs_p, offs_n, offs_r, WIDE=WIDE)
        tl.store(w_at, w, mask=mask)


@triton.jit
def weight_grad_kernel(
    DW,
    V,
    G,
    NORMS,
    PARTIAL,
    DG,
    DV,
    block_n,
    N,
    loops,
    steps,
    stride_w,
    stride_v,
    stride_d,
    SPLITS,
    FORM: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """DV = g / n ⊙ DW - c ⊙ u, and DG; DV may be DW. Only the form "partial" reads
    PARTIAL, the dots and, for linf, the ties."""
    block_n, split = block_of(block_n)
    offs_n = offsets(block_n, BLOCK_N, WIDE)
    mask_n = offs_n < N
    first = split * steps
    n = tl.load(NORMS + offs_n, mask=mask_n, other=1.0)
    g = tl.load(G + offs_n, mask=mask_n, other=0.0).to(ACC)
    if FORM == "held":
        outer, offs_p, offs_r, mask = tile_offsets(
            first, offs_n, N, loops, NESTED=NESTED, WIDE=WIDE, BLOCK_P=BLOCK_P, BLOCK_R=BLOCK_R
        )
        dw_at = tile_addresses(DW, stride_w, outer, offs_p, offs_n, offs_r, WIDE=WIDE)
        dw = tl.load(dw_at, mask=mask, other=0.0).to(ACC)
        v_at = tile_addresses(V, stride_v, outer, offs_p, offs_n, offs_r, WIDE=WIDE)
        v = tl.load(v_at, mask=mask, other=0.0).to(ACC)
        dots = over_slices(dw * v)
        ties = over_slices(tied(v, n[None, :, None]))
    elif FORM == "walked":
        dots, ties = slice_partials(
            A=DW,
            B=V,
            n=n,
            offs_n=offs_n,
            N=N,
            loops=loops,
            stride_a=stride_w,
            stride_b=stride_v,
            first=first,
            steps=steps,
            DOTS=True,
            NORM=NORM,
            COUNTS=False,
            NESTED=NESTED,
            WIDE=WIDE,
            ACC=ACC,
            BLOCK_N=BLOCK_N,
            BLOCK_P=BLOCK_P,
            BLOCK_R=BLOCK_R,
        )
    else:
        dots = merged_parts(
            PARTIAL, offs_n, N, SPLITS, NORM=None, ACC=ACC, BLOCK_N=BLOCK_N, BLOCK_S=BLOCK_S
        )
        ties = dots
        if NORM == "linf":
            PARTIAL += SPLITS * N
            ties = merged_parts(
                PARTIAL, offs_n, N, SPLITS, NORM=None, ACC=ACC, BLOCK_N=BLOCK_N, BLOCK_S=BLOCK_S
            )
    dg = dots / n
    tl.store(DG + offs_n, dg, mask=mask_n & (split == 0))
    scale = g / n
    coef = slope_coefficient(g, n, dg, ties, EPS, NORM)
    for step in range(steps):
        outer, offs_p, offs_r, mask = tile_offsets(
            first + steps - 1 - step,
            offs_n,
            N,
            loops,
            NESTED=NESTED,
            WIDE=WIDE,
            BLOCK_P=BLOCK_P,
            BLOCK_R=BLOCK_R,
        )
        if FORM != "held":
            dw_at = tile_addresses(DW, stride_w, outer, offs_p, offs_n, offs_r, WIDE=WIDE)
            dw = tl.load(dw_at, mask=mask, other=0.0).to(ACC)
            v_at = tile_addresses(V, stride_v, outer, offs_p, offs_n, offs_r, WIDE=WIDE)
            v = tl.load(v_at, mask=mask, other=0.0).to(ACC)
        dv_at = tile_addresses(DV, stride_d, outer, offs_p, offs_n, offs_r, WIDE=WIDE)
        u = slope(v, n[None, :, None], NORM)
        tl.store(dv_at, scale[None, :, None] * dw - coef[None, :, None] * u, mask=mask)


# --- launchers ---------------------------------------------------------------------------------


def weight_norm(
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float,
    dtype: torch.dtype,
    *,
    norm: Norm = "l2",
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`(W, n)`, `W` in `dtype` and in `V`'s memory layout."""
    g = g.contiguous()
    run = remembered_weight_norm(target_of(v), (v, g), dim, eps, norm, dtype, config, splits)
    return run(v, g)


def prepare_weight_norm(
    target: Target,
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float,
    norm: Norm,
    dtype: torch.dtype,
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
    channels_last: bool = False,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`run(v, g)` returns `(W, n)`, `W` in `V`'s memory layout or with its channels contiguous."""
    w = packed(v, dtype) if channels_last else torch.empty_like(v, dtype=dtype)
    slices = as_slices([w, v], dim)
    if slices is None:
        dense = v.contiguous()
        run_dense = prepare_weight_norm(target, dense, g, dim, eps, norm, dtype, config, splits)
        new_w = allocator(w)

        def run_copied(v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            w, n = run_dense(v.contiguous(), g)
            return new_w(v).copy_(w), n

        return run_copied
    walk = Walk(slices, [w, v], target, config, splits)
    launch = Launcher(
        weight_kernel,
        target,
        walk.grid,
        EPS=eps,
        NORM=norm,
        **walk.strides(v=1, w=0),
        **walk.finishing(),
    )
    run = Pass("v", "g")
    run.new(w=w, n=unallocated(kept_shape(v.shape, dim), scale_dtype(v)))
    partial = "n"  # which no other form reads
    if walk.form == "partial":
        partial = "partial"
        run.new(partial=unallocated((walk.splits, slices.n), scale_dtype(v)))
        partials = prepare_partials(walk, target, eps, norm, 1)
        run.call(partials, "v", "v", partial, partial, partial)
    run.call(launch, "v", "g", partial, "n", "w")
    return run.returning("w", "n", spare=("n",))


remembered_weight_norm = remembered(prepare_weight_norm)


def packed(v: Tensor, dtype: torch.dtype) -> Tensor:
    """The layout of a `W` in `dtype` whose channels, its second dimension, are contiguous."""
    return with_channels_last(v.shape[0], v.shape[1], v.shape[2:], dtype)


def weight_norm_backward(
    dw: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    dim: int | None,
    eps: float,
    *,
    norm: Norm = "l2",
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`(dV, dg)` from `dW`."""
    g = g.contiguous()
    tensors = dw, v, g
    run = remembered_weight_norm_backward(target_of(v), tensors, dim, eps, norm, config, splits)
    return run(dw, v, g, n)


def prepare_weight_norm_backward(
    target: Target,
    dw: Tensor,
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float,
    norm: Norm,
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`run(dw, v, g, n)` returns `(dV, dg)`."""
    dv = torch.empty_like(v)
    slices = as_slices([dv, dw, v], dim)
    if slices is None:
        dense = dw.contiguous(), v.contiguous(), g
        run_dense = prepare_weight_norm_backward(target, *dense, dim, eps, norm, config, splits)
        new_dv = allocator(dv)

        def run_copied(dw: Tensor, v: Tensor, g: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
            dv, dg = run_dense(dw.contiguous(), v.contiguous(), g, n)
            return new_dv(v).copy_(dv), dg

        return run_copied
    kinds = 2 if norm == "linf" else 1  # dots, and ties
    walk = Walk(slices, [dv, dw, v], target, config, splits, kinds)
    run = Pass("dw", "v", "g", "n")
    run.new(dv=dv, dg=g)
    partial = "n"  # which no other form reads
    if walk.form == "partial":
        partial = "partial"
        run.new(partial=unallocated((kinds, walk.splits, slices.n), scale_dtype(v)))
        run.call(prepare_partials(walk, target, eps, norm, 1, 2), "dw", "v", "n", partial, partial)
    launch = Launcher(
        weight_grad_kernel,
        target,
        walk.grid,
        EPS=eps,
        NORM=norm,
        **walk.strides(w=1, v=2, d=0),
        **walk.finishing(),
    )
    run.call(launch, "dw", "v", "g", "n", partial, "dg", "dv")
    return run.returning("dv", "dg")


remembered_weight_norm_backward = remembered(prepare_weight_norm_backward)
