"""The gradient of a linear layer's weight, `dW[o, r] = Σ_m P[m, o] Q[m, r]`, as `dV` and `dg`, for
a few rows.

Each program has the slices `o` that it owns:

    dim=0   o = n, P = dY, Q = x          dim=1   o = k, P = x, Q = dY

    a_o = Σ_r dW V,   dg = a / n,   dV = s ⊙ dW - c ⊙ V,   c = s · dg / n

The kernel walks r twice and recomputes the tile of dW instead of storing it. `db = Σ_m dY` rides
along.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import dot, dot_coefficient, offsets
from .configs import Target
from .launch import Launcher, allocator, is_wide, product_types, unallocated
from .passes import Pass

# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def _load_tile(X, offs_m, offs_c, M, N_C, stride_m, stride_c):
    """Rows `offs_m` and columns `offs_c` of a factor of dW, zero outside `(M, N_C)`."""
    at = X + offs_m[:, None] * stride_m + offs_c[None, :] * stride_c
    return tl.load(at, mask=(offs_m < M)[:, None] & (offs_c < N_C)[None, :], other=0.0)


@triton.jit
def grad_one_pass_kernel(
    P,
    Q,
    V,
    G,
    NORM,
    DV,
    DG,
    DB,
    M,
    O,
    R,
    stride_pm,
    stride_po,
    stride_qm,
    stride_qr,
    stride_vo,
    stride_vr,
    stride_do,
    stride_dr,
    EPS: tl.constexpr,
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """DV and DG for the slices this program owns; dW is recomputed, never stored. M ≤ BLOCK_M.

    DB is the column sum of P (BIAS "owned") or of Q ("walked", by the first program).
    """
    pid = tl.program_id(0)
    offs_m = offsets(0 * pid, BLOCK_M, WIDE)
    offs_o = offsets(pid, BLOCK_O, WIDE)
    mask_o = offs_o < O
    norm_type = NORM.dtype.element_ty
    n = tl.load(NORM + offs_o, mask=mask_o, other=1.0)
    g = tl.load(G + offs_o, mask=mask_o, other=0.0).to(norm_type)
    p = _load_tile(P, offs_o, offs_m, O, M, stride_po, stride_pm)
    if BIAS == "owned":
        tl.store(DB + offs_o, tl.sum(p.to(ACC), axis=1), mask=mask_o)
    if BIAS == "walked":
        for tile in range(pid, tl.cdiv(R, BLOCK_R), tl.num_programs(0)):
            offs_r = offsets(tile, BLOCK_R, WIDE)
            q = _load_tile(Q, offs_m, offs_r, M, R, stride_qm, stride_qr)
            tl.store(DB + offs_r, tl.sum(q.to(ACC), axis=0), mask=offs_r < R)

    # A number of stages that is the loop's own has V's tiles in flight as well as Q's.
    dots = tl.zeros((BLOCK_O, BLOCK_R), norm_type)
    for start in tl.range(0, R, BLOCK_R, num_stages=STAGES):
        offs_r = offsets(start // BLOCK_R, BLOCK_R, WIDE)
        q = _load_tile(Q, offs_m, offs_r, M, R, stride_qm, stride_qr)
        dw = dot(p, q, tl.zeros((BLOCK_O, BLOCK_R), ACC), PRECISION)
        v = _load_tile(V, offs_o, offs_r, O, R, stride_vo, stride_vr)
        dots += dw.to(norm_type) * v.to(norm_type)
    dg = tl.sum(dots, axis=1) / n
    tl.store(DG + offs_o, dg, mask=mask_o)

    scale = (g / n)[:, None]
    coef = dot_coefficient(g, n, dg, EPS)[:, None]
    for start in tl.range(0, R, BLOCK_R, num_stages=STAGES):
        offs_r = offsets(start // BLOCK_R, BLOCK_R, WIDE)
        q = _load_tile(Q, offs_m, offs_r, M, R, stride_qm, stride_qr)
        dw = dot(p, q, tl.zeros((BLOCK_O, BLOCK_R), ACC), PRECISION)
        v = _load_tile(V, offs_o, offs_r, O, R, stride_vo, stride_vr)
        at = DV + offs_o[:, None] * stride_do + offs_r[None, :] * stride_dr
        mask = mask_o[:, None] & (offs_r < R)[None, :]
        tl.store(at, scale * dw.to(norm_type) - coef * v.to(norm_type), mask=mask)


# --- launcher ----------------------------------------------------------------------------------


def prepare_weight_grad(
    target: Target,
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float,
    needs_bias: bool,
    tf32: bool,
    config: configs.GradConfig | None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]:
    """`run(dy, x, v, g, n)` returns `(dV, dg, db)`."""
    if dim is None:
        raise ValueError("one_pass needs slices that a program can own, got dim=None")
    # Owned slices along the first axis: V, dV and the factors of dW change places for dim=1.
    swaps = dim == 1
    dv = torch.empty_like(v)
    p, q, v_own, dv_own = (x, dy, v.t(), dv.t()) if swaps else (dy, x, v, dv)
    (m, o), r = p.shape, q.shape[1]
    if config is None:
        size = max(x.element_size(), v.element_size())
        config = configs.grad_one_pass(m, o, size, target)
    if m > config.BLOCK_M:
        raise ValueError(f"one_pass holds {config.BLOCK_M} rows in its tile, got {m}")
    if o == 0 or r == 0:  # no tile would run
        new_dv = allocator(dv)
        return lambda dy, x, v, g, n: (
            new_dv(v),
            torch.zeros_like(g),
            dy.sum(0) if needs_bias else None,
        )
    run = Pass("dy", "x", "v", "g", "n")
    run.new(dv=dv, dg=g)
    if needs_bias:
        run.new(db=unallocated(dy.shape[1:], dy.dtype))
    launch = Launcher(
        grad_one_pass_kernel,
        target,
        (triton.cdiv(o, config.BLOCK_O),),
        M=m,
        O=o,
        R=r,
        stride_pm=p.stride(0),
        stride_po=p.stride(1),
        stride_qm=q.stride(0),
        stride_qr=q.stride(1),
        stride_vo=v_own.stride(0),
        stride_vr=v_own.stride(1),
        stride_do=dv_own.stride(0),
        stride_dr=dv_own.stride(1),
        EPS=eps,
        BIAS=("walked" if swaps else "owned") if needs_bias else "",
        WIDE=is_wide(p, q, v, dv),
        STAGES=config.num_stages,
        **product_types(x, tf32),
        **config._asdict(),
    )
    factors = ("x", "dy") if swaps else ("dy", "x")
    run.call(launch, *factors, "v", "g", "n", "dv", "dg", "db" if needs_bias else "dv")
    return run.returning("dv", "dg", "db" if needs_bias else None)
