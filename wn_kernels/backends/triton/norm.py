"""Norms, scaled weights and their gradients, for slices along any dimension.

    n_j = max(‖V_j‖₂, eps)          W = s ⊙ V,   s_j = g_j / n_j
    a_j = ⟨dW_j, V_j⟩               dg_j = a_j / n_j
    c_j = s_j dg_j / n_j            dV = s ⊙ dW - c ⊙ V

A slice is a row of `R = outer · inner` elements (`launch.Slices`). One program owns `BLOCK_N`
slices and walks them once for the sum and once more, out of cache, for the result. Where the
slices are too few to fill the machine, the sum is split: each program leaves a partial sum, a
second stage adds them in a fixed order, and an element-wise stage follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import scale_dtype
from ..shapes import kept_shape
from . import configs
from .common import as_norm, dot_coefficient, offsets
from .launch import Slices, as_slices, is_wide, launch, sm_count

# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def _slice_offsets(
    offs_n, offs_r, inner, stride_n, stride_outer, stride_inner, NESTED: tl.constexpr
):
    """Offsets of a `(BLOCK_N, BLOCK_R)` tile."""
    if NESTED:
        along = (offs_r // inner) * stride_outer + (offs_r % inner) * stride_inner
    else:
        along = offs_r * stride_inner
    return offs_n[:, None] * stride_n + along[None, :]


@triton.jit
def _slice_sums(
    A,
    B,
    offs_n,
    N,
    R,
    inner,
    stride_an,
    stride_ao,
    stride_ai,
    stride_bn,
    stride_bo,
    stride_bi,
    first,
    steps,
    SQUARE: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`⟨A_j, B_j⟩` over the `steps` blocks that follow block `first`; `A` alone if SQUARE.

    The sum across lanes comes once, after the loop.
    """
    sums = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    for step in range(steps):
        offs_r = offsets(first + step, BLOCK_R, WIDE)
        mask = (offs_n < N)[:, None] & (offs_r < R)[None, :]
        at = _slice_offsets(offs_n, offs_r, inner, stride_an, stride_ao, stride_ai, NESTED)
        a = tl.load(A + at, mask=mask, other=0.0).to(ACC)
        if SQUARE:
            sums += a * a
        else:
            at = _slice_offsets(offs_n, offs_r, inner, stride_bn, stride_bo, stride_bi, NESTED)
            sums += a * tl.load(B + at, mask=mask, other=0.0).to(ACC)
    return tl.sum(sums, axis=1)


@triton.jit
def slice_sum_kernel(
    A,
    B,
    OUT,
    N,
    R,
    inner,
    steps,
    stride_an,
    stride_ao,
    stride_ai,
    stride_bn,
    stride_bo,
    stride_bi,
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
    sums = _slice_sums(
        A,
        B,
        offs_n,
        N,
        R,
        inner,
        stride_an,
        stride_ao,
        stride_ai,
        stride_bn,
        stride_bo,
        stride_bi,
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


@triton.jit
def weight_kernel(
    V,
    G,
    NORM,
    W,
    N,
    R,
    inner,
    steps,
    stride_vn,
    stride_vo,
    stride_vi,
    stride_wn,
    stride_wo,
    stride_wi,
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
        squares = _slice_sums(
            V,
            V,
            offs_n,
            N,
            R,
            inner,
            stride_vn,
            stride_vo,
            stride_vi,
            stride_vn,
            stride_vo,
            stride_vi,
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
        at = _slice_offsets(offs_n, offs_r, inner, stride_vn, stride_vo, stride_vi, NESTED)
        v = tl.load(V + at, mask=mask, other=0.0).to(ACC)
        at = _slice_offsets(offs_n, offs_r, inner, stride_wn, stride_wo, stride_wi, NESTED)
        tl.store(W + at, v * scale[:, None], mask=mask)


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
    inner,
    steps,
    stride_wn,
    stride_wo,
    stride_wi,
    stride_vn,
    stride_vo,
    stride_vi,
    stride_dn,
    stride_do,
    stride_di,
    FUSED: tl.constexpr,
    EPS: tl.constexpr,
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """DV = g / n ⊙ DW - c ⊙ V; DV may be DW. FUSED takes the dots itself and stores DG;
    otherwise COEF is ready."""
    offs_n = offsets(tl.program_id(0), BLOCK_N, WIDE)
    first = tl.program_id(1) * steps
    mask_n = offs_n < N
    n = tl.load(NORM + offs_n, mask=mask_n, other=1.0)
    g = tl.load(G + offs_n, mask=mask_n, other=0.0).to(ACC)
    if FUSED:
        dots = _slice_sums(
            DW,
            V,
            offs_n,
            N,
            R,
            inner,
            stride_wn,
            stride_wo,
            stride_wi,
            stride_vn,
            stride_vo,
            stride_vi,
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
        at = _slice_offsets(offs_n, offs_r, inner, stride_wn, stride_wo, stride_wi, NESTED)
        dw = tl.load(DW + at, mask=mask, other=0.0).to(ACC)
        at = _slice_offsets(offs_n, offs_r, inner, stride_vn, stride_vo, stride_vi, NESTED)
        v = tl.load(V + at, mask=mask, other=0.0).to(ACC)
        at = _slice_offsets(offs_n, offs_r, inner, stride_dn, stride_do, stride_di, NESTED)
        tl.store(DV + at, scale[:, None] * dw - coef[:, None] * v, mask=mask)


# --- launchers ---------------------------------------------------------------------------------

# Programs a launch should have for every multiprocessor before slices are left unsplit.
PROGRAMS_PER_SM = 2


class _Walk:
    """How programs share the slices: the grid, and what every kernel above takes of it."""

    def __init__(
        self,
        slices: Slices,
        tensors: list[Tensor],
        config: configs.SliceConfig | None,
        splits: int | None,
    ) -> None:
        self.slices = slices
        n, r = slices.n, slices.outer * slices.inner
        self.config = config or configs.slices(n, n_is_fast=slices.strides[0][0] == 1)
        blocks_n = triton.cdiv(n, self.config.BLOCK_N)
        blocks_r = triton.cdiv(r, self.config.BLOCK_R)
        if splits is None:
            wanted = PROGRAMS_PER_SM * sm_count(tensors[0].device)
            splits = max(1, min(blocks_r // 4, wanted // max(1, blocks_n)))
        steps = triton.cdiv(blocks_r, splits)
        self.splits = max(1, triton.cdiv(blocks_r, max(1, steps)))
        self.grid = (blocks_n, self.splits)
        self.arguments = {
            "N": n,
            "R": r,
            "inner": slices.inner,
            "steps": steps,
            "NESTED": slices.outer > 1,
            "WIDE": is_wide(*tensors) or r + self.config.BLOCK_R >= 2**31,
            "ACC": acc_type(tensors[-1]),
            **self.config._asdict(),
        }

    def strides(self, **names: int) -> dict[str, int]:
        """Stride arguments: `strides(a=0)` are `stride_an`, `_ao` and `_ai`, those of tensor 0."""
        return {
            f"stride_{name}{axis}": stride
            for name, i in names.items()
            for axis, stride in zip("noi", self.slices.strides[i], strict=True)
        }


def acc_type(v: Tensor) -> tl.dtype:
    """The accumulator that goes with `scale_dtype`."""
    return tl.float64 if v.dtype == torch.float64 else tl.float32


def slice_norms(
    v: Tensor,
    dim: int | None,
    eps: float,
    *,
    config: configs.SliceConfig | None = None,
    splits: int | None = None,
) -> Tensor:
    """`n` for every slice, in the kept shape."""
    slices = as_slices([v], dim)
    if slices is None:
        return slice_norms(v.contiguous(), dim, eps, config=config, splits=splits)
    walk = _Walk(slices, [v], config, splits)
    norm = torch.empty(kept_shape(v.shape, dim), dtype=scale_dtype(v), device=v.device)
    split = walk.splits > 1
    out = norm.new_empty(walk.splits, walk.slices.n) if split else norm
    launch(
        slice_sum_kernel,
        walk.grid,
        A=v,
        B=v,
        OUT=out,
        EPS=eps,
        SQUARE=True,
        AS_NORM=not split,
        **walk.strides(a=0, b=0),
        **walk.arguments,
    )
    if split:
        finish(out, norm, norm, norm, norm, eps, grad=False)
    return norm


def finish(
    partial: Tensor, g: Tensor, norm: Tensor, dg: Tensor, coef: Tensor, eps: float, *, grad: bool
) -> None:
    """The second stage over `partial` of shape (splits, N): norms, or `dg` and `c`."""
    splits, n = partial.shape
    config = configs.finish(partial.element_size())
    launch(
        finish_kernel,
        (triton.cdiv(n, config.BLOCK_N),),
        PARTIAL=partial,
        G=g,
        NORM=norm,
        DG=dg,
        COEF=coef,
        N=n,
        SPLITS=splits,
        EPS=eps,
        GRAD=grad,
        ACC=acc_type(partial),
        **config._asdict(),
    )


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
    w = torch.empty_like(v, dtype=dtype)
    slices = as_slices([w, v], dim)
    if slices is None:
        dense, norm = weight_norm(v.contiguous(), g, dim, eps, dtype, config=config, splits=splits)
        return w.copy_(dense), norm
    walk = _Walk(slices, [w, v], config, splits)
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
    """`(dV, dg)` from `dW`."""
    g = g.contiguous()
    dv = torch.empty_like(v)
    slices = as_slices([dv, dw, v], dim)
    if slices is None:
        dense, dg = weight_norm_backward(
            dw.contiguous(), v.contiguous(), g, norm, dim, eps, config=config, splits=splits
        )
        return dv.copy_(dense), dg
    walk = _Walk(slices, [dv, dw, v], config, splits)
    if walk.splits == 1:
        dg = torch.empty_like(g)
        _launch_weight_grad(walk, dw, v, g, norm, dg, norm, dv, eps, fused=True)
        return dv, dg
    partial = norm.new_empty(walk.splits, walk.slices.n)
    launch(
        slice_sum_kernel,
        walk.grid,
        A=dw,
        B=v,
        OUT=partial,
        SQUARE=False,
        AS_NORM=False,
        EPS=eps,
        **walk.strides(a=1, b=2),
        **walk.arguments,
    )
    return dv, _finish_weight_grad(walk, partial, dw, v, g, norm, dv, eps)


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
    walk = _Walk(slices, [dw, dw, v], None, None)
    return _finish_weight_grad(walk, partial, dw, v, g, norm, dw, eps)


def _finish_weight_grad(
    walk: _Walk,
    partial: Tensor,
    dw: Tensor,
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
    _launch_weight_grad(walk, dw, v, g, norm, dg, coef, dv, eps, fused=False)
    return dg


def _launch_weight_grad(
    walk: _Walk,
    dw: Tensor,
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
        DW=dw,
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
