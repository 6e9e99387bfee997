"""Scaled weights and their gradients, for slices along any dimension.

    W = s ⊙ V,   s_j = g_j / n_j
    a_j = ⟨dW_j, V_j⟩,   dg_j = a_j / n_j,   c_j = s_j dg_j / n_j,   dV = s ⊙ dW - c ⊙ V

A program walks its slices once for the sum and once more, out of cache, for the result. Where the
sum is split (`norm.py`), it is taken beforehand and an element-wise pass follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call import kept_shape, scale_dtype
from . import configs
from .common import as_norm, cast, dot_coefficient, offsets
from .launch import Walk, as_slices, launch
from .norm import finish, load_sum, slice_norms, slice_offsets, slice_sum_kernel, slice_sums

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
    out: Tensor | None = None,
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`(W, n)`, `W` in `dtype` and in `V`'s memory layout, or in `out`, which has its own."""
    g = g.contiguous()
    w = torch.empty_like(v, dtype=dtype) if out is None else out
    slices = as_slices([w, v], dim)
    if slices is None:
        dense, norm = weight_norm(v.contiguous(), g, dim, eps, dtype, config=config, splits=splits)
        return w.copy_(dense), norm
    walk = Walk(slices, [w, v], config, splits)
    fused = walk.splits == 1
    if fused:
        norm = torch.empty(kept_shape(v.shape, dim), dtype=scale_dtype(v), device=v.device)
    else:
        norm = slice_norms(v, dim, eps, config=config, splits=splits)
    launch(
        weight_kernel,
        walk.grid,
        V=v,
        G=g,
        NORM=norm,
        W=w,
        EPS=eps,
        FUSED=fused,
        **walk.strides(v=1, w=0),
        **walk.arguments,
    )
    return w, norm


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
    dv = torch.empty_like(v)
    parts = dw if dw.ndim > v.ndim else dw[None]
    slices = as_slices([dv, parts[0], v], dim)
    if slices is None:
        dense, dg = weight_norm_backward(
            parts.sum(0).contiguous(),
            v.contiguous(),
            g,
            norm,
            dim,
            eps,
            config=config,
            splits=splits,
        )
        return dv.copy_(dense), dg
    walk = Walk(slices, [dv, parts, v], config, splits)
    if walk.splits == 1:
        dg = torch.empty_like(g)
        _launch_weight_grad(walk, parts, v, g, norm, dg, norm, dv, eps, fused=True)
        return dv, dg
    partial = norm.new_empty(walk.splits, walk.slices.n)
    launch(
        slice_sum_kernel,
        walk.grid,
        A=parts,
        B=v,
        OUT=partial,
        PARTS=len(parts),
        stride_part=parts.stride(0),
        SQUARE=False,
        AS_NORM=False,
        EPS=eps,
        **walk.strides(a=1, b=2),
        **walk.arguments,
    )
    return dv, _finish_weight_grad(walk, partial, parts, v, g, norm, dv, eps)


def finish_weight_grad_(
    dw: Tensor, partial: Tensor, v: Tensor, g: Tensor, norm: Tensor, dim: int | None, eps: float
) -> Tensor:
    """Turns the matrix `dW`, in place, into `dV`, given partial dots; returns `dg`.

    `partial` is `(splits, N)`; for `dim=None` all of it belongs to the one slice.
    """
    slices = as_slices([dw, dw, v], dim)
    assert slices is not None  # two dimensions always have a common walk
    if dim is None:
        partial = partial.view(-1, 1)
    walk = Walk(slices, [dw, dw, v], None, None)
    return _finish_weight_grad(walk, partial, dw[None], v, g, norm, dw, eps)


def _finish_weight_grad(
    walk: Walk,
    partial: Tensor,
    parts: Tensor,
    v: Tensor,
    g: Tensor,
    norm: Tensor,
    dv: Tensor,
    eps: float,
) -> Tensor:
    """Sums the dots, then writes `dV`; returns `dg`."""
    dg = torch.empty_like(g)
    coef = torch.empty_like(norm)
    finish(partial, g, norm, dg, coef, eps, grad=True)
    _launch_weight_grad(walk, parts, v, g, norm, dg, coef, dv, eps, fused=False)
    return dg


def _launch_weight_grad(
    walk: Walk,
    parts: Tensor,
    v: Tensor,
    g: Tensor,
    norm: Tensor,
    dg: Tensor,
    coef: Tensor,
    dv: Tensor,
    eps: float,
    *,
    fused: bool,
) -> None:
    """The walk is over (dV, dW, V)."""
    launch(
        weight_grad_kernel,
        walk.grid,
        DW=parts,
        PARTS=len(parts),
        stride_part=parts.stride(0),
        V=v,
        G=g,
        NORM=norm,
        DG=dg,
        COEF=coef,
        DV=dv,
        FUSED=fused,
        EPS=eps,
        **walk.strides(w=1, v=2, d=0),
        **walk.arguments,
    )
