"""Scaled weights and their gradients, for slices along any dimension.

    W = s ⊙ V,   s_j = g_j / n_j
    a_j = ⟨dW_j, V_j⟩,   dg_j = a_j / n_j,   c_j = s_j dg_j / n_j,   dV = s ⊙ dW - c ⊙ V

A program walks its slices once for the sum and once more, out of cache, for the result. Where the
sum is split (`norm.py`), it is taken beforehand and an element-wise pass follows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call import kept_shape, scale_dtype
from . import configs
from .common import as_norm, cast, dot_coefficient, offsets
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
    load_sum,
    prepare_finish,
    remembered_slice_norms,
    slice_offsets,
    slice_sum_kernel,
    slice_sums,
)
from .passes import Pass
from .pixels import with_channels_last

# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def weight_kernel(
    V,
    G,
    NORM,
    W,
    N,
    R,
    loops,
    steps,
    stride_v,
    stride_w,
    FUSED: tl.constexpr,
    EPS: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """W = g / n ⊙ V. FUSED takes the norms itself and stores them; otherwise they are ready."""
    offs_n = offsets(tl.program_id(0), BLOCK_N, WIDE)
    first = tl.program_id(1) * steps
    mask_n = offs_n < N
    if FUSED:
        squares = slice_sums(
            V,
            V,
            offs_n,
            N,
            R,
            loops,
            stride_v,
            stride_v,
            1,
            0,
            first,
            steps,
            True,
            NESTED,
            WIDE,
            ACC,
            BLOCK_N,
            BLOCK_R,
        )
        n = as_norm(squares, EPS)
        tl.store(NORM + offs_n, n, mask=mask_n)
    else:
        n = tl.load(NORM + offs_n, mask=mask_n, other=1.0)
    scale = tl.load(G + offs_n, mask=mask_n, other=0.0).to(ACC) / n
    for step in range(steps):
        offs_r = offsets(first + step, BLOCK_R, WIDE)
        mask = mask_n[:, None] & (offs_r < R)[None, :]
        at = V + slice_offsets(offs_n, offs_r, loops, stride_v, NESTED)
        v = tl.load(at, mask=mask, other=0.0).to(ACC)
        at = W + slice_offsets(offs_n, offs_r, loops, stride_w, NESTED)
        tl.store(at, cast(v * scale[:, None], W.dtype.element_ty), mask=mask)


@triton.jit
def weight_grad_kernel(
    DW,
    V,
    G,
    NORM,
    DG,
    COEF,
    DV,
    N,
    R,
    loops,
    steps,
    stride_w,
    stride_v,
    stride_d,
    PARTS,
    stride_part,
    FUSED: tl.constexpr,
    EPS: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """DV = g / n ⊙ DW - c ⊙ V; DV may be DW, which is the sum of PARTS. FUSED takes the dots
    itself and stores DG; otherwise COEF is ready."""
    offs_n = offsets(tl.program_id(0), BLOCK_N, WIDE)
    first = tl.program_id(1) * steps
    mask_n = offs_n < N
    n = tl.load(NORM + offs_n, mask=mask_n, other=1.0)
    g = tl.load(G + offs_n, mask=mask_n, other=0.0).to(ACC)
    if FUSED:
        dots = slice_sums(
            DW,
            V,
            offs_n,
            N,
            R,
            loops,
            stride_w,
            stride_v,
            PARTS,
            stride_part,
            first,
            steps,
            False,
            NESTED,
            WIDE,
            ACC,
            BLOCK_N,
            BLOCK_R,
        )
        dg = dots / n
        coef = dot_coefficient(g, n, dg, EPS)
        tl.store(DG + offs_n, dg, mask=mask_n)
    else:
        coef = tl.load(COEF + offs_n, mask=mask_n, other=0.0)
    scale = g / n
    for step in range(steps):
        offs_r = offsets(first + step, BLOCK_R, WIDE)
        mask = mask_n[:, None] & (offs_r < R)[None, :]
        at = DW + slice_offsets(offs_n, offs_r, loops, stride_w, NESTED)
        dw = load_sum(at, mask, PARTS, stride_part, ACC)
        at = V + slice_offsets(offs_n, offs_r, loops, stride_v, NESTED)
        v = tl.load(at, mask=mask, other=0.0).to(ACC)
        at = DV + slice_offsets(offs_n, offs_r, loops, stride_d, NESTED)
        tl.store(at, scale[:, None] * dw - coef[:, None] * v, mask=mask)


# --- launchers ---------------------------------------------------------------------------------


def weight_norm(
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float,
    dtype: torch.dtype,
    *,
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`(W, n)`, `W` in `dtype` and in `V`'s memory layout."""
    g = g.contiguous()
    run = remembered_weight_norm(target_of(v), (v, g), dim, eps, dtype, config, splits)
    return run(v, g)


def prepare_weight_norm(
    target: Target,
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float,
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
        run_dense = prepare_weight_norm(target, dense, g, dim, eps, dtype, config, splits)
        new_w = allocator(w)

        def run_copied(v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            w, norm = run_dense(v.contiguous(), g)
            return new_w(v).copy_(w), norm

        return run_copied
    walk = Walk(slices, [w, v], target, config, splits)
    fused = walk.splits == 1
    launch = Launcher(
        weight_kernel,
        target,
        walk.grid,
        EPS=eps,
        FUSED=fused,
        **walk.strides(v=1, w=0),
        **walk.arguments,
    )

    run = Pass("v", "g")
    run.new(w=w)
    if fused:
        run.new(norm=unallocated(kept_shape(v.shape, dim), scale_dtype(v)))
    else:
        norms = remembered_slice_norms(target, (v,), dim, eps, config, splits)
        run.call(norms, "v", gives=("norm",))
    run.call(launch, "v", "g", "norm", "w")
    return run.returning("w", "norm")


remembered_weight_norm = remembered(prepare_weight_norm)


def packed(v: Tensor, dtype: torch.dtype) -> Tensor:
    """The layout of a `W` in `dtype` whose channels, its second dimension, are contiguous."""
    return with_channels_last(v.shape[0], v.shape[1], v.shape[2:], dtype)


def weight_norm_backward(
    dw: Tensor,
    v: Tensor,
    g: Tensor,
    norm: Tensor,
    dim: int | None,
    eps: float,
    *,
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`(dV, dg)` from `dW`, or from parts of it, stacked, whose sum it is."""
    g = g.contiguous()
    tensors = dw, v, g
    run = remembered_weight_norm_backward(target_of(v), tensors, dim, eps, config, splits)
    return run(dw, v, g, norm)


def prepare_weight_norm_backward(
    target: Target,
    dw: Tensor,
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float,
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`run(dw, v, g, norm)` returns `(dV, dg)`."""
    dv = torch.empty_like(v)
    in_parts = dw.ndim > v.ndim
    parts = dw if in_parts else dw[None]
    slices = as_slices([dv, parts[0], v], dim)
    if slices is None:
        dense = parts[0].contiguous(), v.contiguous(), g
        run_dense = prepare_weight_norm_backward(target, *dense, dim, eps, config, splits)
        new_dv = allocator(dv)

        def run_copied(dw: Tensor, v: Tensor, g: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
            dw = (dw.sum(0) if in_parts else dw).contiguous()
            dv, dg = run_dense(dw, v.contiguous(), g, norm)
            return new_dv(v).copy_(dv), dg

        return run_copied
    walk = Walk(slices, [dv, parts, v], target, config, splits)
    run = Pass("dw", "v", "g", "norm")
    run.new(dv=dv)
    if walk.splits == 1:
        run.new(dg=g)
        launch = _weight_grad_launcher(walk, target, parts, eps, fused=True)
        run.call(launch, "dw", "v", "g", "norm", "dg", "norm", "dv")
        return run.returning("dv", "dg")
    partial = unallocated((walk.splits, walk.slices.n), scale_dtype(v))
    dots = Launcher(
        slice_sum_kernel,
        target,
        walk.grid,
        PARTS=len(parts),
        stride_part=parts.stride(0),
        SQUARE=False,
        AS_NORM=False,
        EPS=eps,
        **walk.strides(a=1, b=2),
        **walk.arguments,
    )
    run.new(partial=partial)
    run.call(dots, "dw", "v", "partial")
    finish = _prepare_finish(walk, target, partial, parts, g, eps)
    run.call(finish, "partial", "dw", "v", "g", "norm", "dv", gives=("dg",))
    return run.returning("dv", "dg")


remembered_weight_norm_backward = remembered(prepare_weight_norm_backward)


def _prepare_finish(
    walk: Walk, target: Target, partial: Tensor, parts: Tensor, g: Tensor, eps: float
) -> Pass:
    """`run(partial, dw, v, g, norm, dv)` sums the dots, then writes `dV`; it returns `(dg,)`."""
    run = Pass("partial", "dw", "v", "g", "norm", "dv")
    run.new(dg=g, coef=unallocated(g.shape, partial.dtype))
    finish = prepare_finish(target, partial, eps, grad=True)
    run.call(finish, "partial", "g", "norm", "dg", "coef")
    launch = _weight_grad_launcher(walk, target, parts, eps, fused=False)
    run.call(launch, "dw", "v", "g", "norm", "dg", "coef", "dv")
    return run.returning("dg")


def _weight_grad_launcher(
    walk: Walk, target: Target, parts: Tensor, eps: float, *, fused: bool
) -> Launcher:
    """The walk is over (dV, dW, V)."""
    return Launcher(
        weight_grad_kernel,
        target,
        walk.grid,
        PARTS=len(parts),
        stride_part=parts.stride(0),
        FUSED=fused,
        EPS=eps,
        **walk.strides(w=1, v=2, d=0),
        **walk.arguments,
    )
