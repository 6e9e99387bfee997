"""The gradients of a linear layer that need no `dW` in memory.

The dots `a_o = ⟨dW_o, V_o⟩` are had beforehand if the forward keeps its product `P = x Vᵀ` (dim=0):

    a_o = Σ_m dY P,   dg = a / n,   S = dY ⊙ s,   c = s · dg / d     by a pass (`scale.py`)
    dX = S V,   dV = Sᵀ x - c ⊙ u

For a few rows `grads_kernel` computes both in one walk over `V`. For more rows `dX` is PyTorch's
product, and `weight_product_kernel` computes `dV`, where `c ⊙ u` is subtracted from a product that
has not left the registers.

Here `u / d` is the slope of the norm (`common.py`), which is `V / n` for l2. The divisor of linf
is a count of ties, which the forward keeps with the product.

Without the product, `grad_one_pass_kernel` computes `dV` and `dg` of `dW[o, r] = Σ_m P[m, o]
Q[m, r]`. Each program has the slices `o` that it owns:

    dim=0   o = n, P = dY, Q = x          dim=1   o = k, P = x, Q = dY

    a_o = Σ_r dW V,   dg = a / n,   dV = s ⊙ dW - c ⊙ u,   c = s · dg / d

It walks r twice and recomputes the tile of dW instead of storing it. `db = Σ_m dY` rides along.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call import Norm
from .. import tiles
from . import configs
from .common import cast, dot, finished, multiple, offsets, slope, slope_coefficient, tied
from .configs import Target
from .launch import Launcher, allocator, is_wide, product_types, sizes, unallocated, unit
from .parts import prepare_sum
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
    NORMS,
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
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """DV and DG for the slices this program owns; dW is recomputed, never stored. M ≤ BLOCK_M.

    DB is the column sum of P (BIAS "owned") or of Q ("walked", by the first program).
    """
    R = multiple(R, UNIT)
    stride_qm = multiple(stride_qm, UNIT)
    stride_vo = multiple(stride_vo, UNIT)
    stride_do = multiple(stride_do, UNIT)
    pid = tl.program_id(0)
    offs_m = offsets(0 * pid, BLOCK_M, WIDE)
    offs_o = offsets(pid, BLOCK_O, WIDE)
    mask_o = offs_o < O
    norm_type = NORMS.dtype.element_ty
    n = tl.load(NORMS + offs_o, mask=mask_o, other=1.0)
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
    ties = tl.zeros((BLOCK_O, BLOCK_R), norm_type)
    for start in tl.range(0, R, BLOCK_R, num_stages=STAGES):
        offs_r = offsets(start // BLOCK_R, BLOCK_R, WIDE)
        q = _load_tile(Q, offs_m, offs_r, M, R, stride_qm, stride_qr)
        dw = dot(p, q, tl.zeros((BLOCK_O, BLOCK_R), ACC), PRECISION)
        v = _load_tile(V, offs_o, offs_r, O, R, stride_vo, stride_vr)
        dots += dw.to(norm_type) * v.to(norm_type)
        if NORM == "linf":
            ties += tied(v.to(norm_type), n[:, None])
    dg = tl.sum(dots, axis=1) / n
    tl.store(DG + offs_o, dg, mask=mask_o)

    scale = (g / n)[:, None]
    coef = slope_coefficient(g, n, dg, tl.sum(ties, axis=1), EPS, NORM)[:, None]
    for start in tl.range(0, R, BLOCK_R, num_stages=STAGES):
        offs_r = offsets(start // BLOCK_R, BLOCK_R, WIDE)
        q = _load_tile(Q, offs_m, offs_r, M, R, stride_qm, stride_qr)
        dw = dot(p, q, tl.zeros((BLOCK_O, BLOCK_R), ACC), PRECISION)
        v = _load_tile(V, offs_o, offs_r, O, R, stride_vo, stride_vr)
        at = DV + offs_o[:, None] * stride_do + offs_r[None, :] * stride_dr
        mask = mask_o[:, None] & (offs_r < R)[None, :]
        u = slope(v.to(norm_type), n[:, None], NORM)
        tl.store(at, scale * dw.to(norm_type) - coef * u, mask=mask)


@triton.jit
def grads_kernel(
    S,
    X,
    V,
    COEF,
    NORMS,
    DV,
    DX,
    M,
    O,
    R,
    steps,
    stride_xm,
    stride_xr,
    stride_vo,
    stride_vr,
    stride_do,
    stride_dr,
    NORM: tl.constexpr,
    NEEDS_X: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WAITS: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """DV = Sᵀ X - COEF ⊙ u, and DX = S V. M ≤ BLOCK_M, S is dense.

    A program has BLOCK_R columns of V and walks `steps` tiles of its rows. Programs that share the
    rows of some columns leave a part of DX each, (M, R).
    """
    R = multiple(R, UNIT)
    stride_xm = multiple(stride_xm, UNIT)
    stride_vo = multiple(stride_vo, UNIT)
    stride_do = multiple(stride_do, UNIT)
    tiles_r = tl.cdiv(R, BLOCK_R)
    share = tl.program_id(0) // tiles_r
    offs_m = offsets(0 * share, BLOCK_M, WIDE)
    offs_r = offsets(tl.program_id(0) % tiles_r, BLOCK_R, WIDE)
    x = _load_tile(X, offs_m, offs_r, M, R, stride_xm, stride_xr)
    # Turned, so that its rows are many and fill the tensor cores' tiles however few those of S are.
    dx = tl.zeros((BLOCK_R, BLOCK_M), ACC)
    for step in tl.range(0, steps, num_stages=STAGES):
        offs_o = offsets(share * steps + step, BLOCK_O, WIDE)
        mask_o = offs_o < O
        s = _load_tile(S, offs_o, offs_m, O, M, 1, O)
        v = _load_tile(V, offs_o, offs_r, O, R, stride_vo, stride_vr)
        coef = tl.load(COEF + offs_o, mask=mask_o, other=0.0)
        if NEEDS_X:
            dx = dot(tl.trans(cast(v, s.dtype)), s, dx, PRECISION)
        dw = dot(s, x, tl.zeros((BLOCK_O, BLOCK_R), ACC), PRECISION).to(coef.dtype)
        dx = finished(dx, 0, steps, WAITS)  # dW alone ends no product but its own
        at = DV + offs_o[:, None] * stride_do + offs_r[None, :] * stride_dr
        mask = mask_o[:, None] & (offs_r < R)[None, :]
        n = 0.0
        if NORM == "linf":
            n = tl.load(NORMS + offs_o, mask=mask_o, other=1.0)[:, None]
        u = slope(v.to(coef.dtype), n, NORM)
        tl.store(at, dw - coef[:, None] * u, mask=mask)
    if NEEDS_X:
        at = DX + (share * M + offs_m)[None, :] * R + offs_r[:, None]
        tl.store(at, dx, mask=(offs_m < M)[None, :] & (offs_r < R)[:, None])


@triton.jit
def weight_product_kernel(
    S,
    X,
    V,
    COEF,
    NORMS,
    DV,
    M,
    O,
    R,
    stride_xm,
    stride_xr,
    stride_vo,
    stride_vr,
    stride_do,
    stride_dr,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """DV = Sᵀ X - COEF ⊙ u, a tile of V for each program, by steps of BLOCK_M rows. S is dense."""
    R = multiple(R, UNIT)
    stride_xm = multiple(stride_xm, UNIT)
    stride_vo = multiple(stride_vo, UNIT)
    stride_do = multiple(stride_do, UNIT)
    tiles_r = tl.cdiv(R, BLOCK_R)
    offs_o = offsets(tl.program_id(0) // tiles_r, BLOCK_O, WIDE)
    offs_r = offsets(tl.program_id(0) % tiles_r, BLOCK_R, WIDE)
    mask_o = offs_o < O
    dw = tl.zeros((BLOCK_O, BLOCK_R), ACC)
    if NORM != "l2":  # behind the loop, u would take registers that the sum needs
        coef = tl.load(COEF + offs_o, mask=mask_o, other=0.0)
        n = 0.0
        if NORM == "linf":
            n = tl.load(NORMS + offs_o, mask=mask_o, other=1.0)[:, None]
        v = _load_tile(V, offs_o, offs_r, O, R, stride_vo, stride_vr)
        dw = (-coef[:, None] * slope(v.to(coef.dtype), n, NORM)).to(ACC)
    for start in range(0, M, BLOCK_M):
        offs_m = offsets(start // BLOCK_M, BLOCK_M, WIDE)
        s = _load_tile(S, offs_o, offs_m, O, M, 1, O)
        x = _load_tile(X, offs_m, offs_r, M, R, stride_xm, stride_xr)
        dw = dot(s, x, dw, PRECISION)
    if NORM == "l2":
        coef = tl.load(COEF + offs_o, mask=mask_o, other=0.0)
        v = _load_tile(V, offs_o, offs_r, O, R, stride_vo, stride_vr)
        dw = dw.to(coef.dtype) - coef[:, None] * v.to(coef.dtype)
    at = DV + offs_o[:, None] * stride_do + offs_r[None, :] * stride_dr
    tl.store(at, dw, mask=mask_o[:, None] & (offs_r < R)[None, :])


# --- launchers ---------------------------------------------------------------------------------


def prepare_weight_grad(
    target: Target,
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float,
    norm: Norm,
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
        NORM=norm,
        BIAS=("walked" if swaps else "owned") if needs_bias else "",
        WIDE=is_wide(p, q, v, dv),
        STAGES=config.num_stages,
        UNIT=unit(r, q.stride(0), v_own.stride(0), dv_own.stride(0)),
        **product_types(x, tf32),
        **config._asdict(),
    )
    factors = ("x", "dy") if swaps else ("dy", "x")
    run.call(launch, *factors, "v", "g", "n", "dv", "dg", "db" if needs_bias else "dv")
    return run.returning("dv", "dg", "db" if needs_bias else None)


def prepare_grads(
    target: Target,
    x: Tensor,
    v: Tensor,
    norm: Norm,
    needs_x: bool,
    tf32: bool,
    config: configs.SplitConfig | None,
) -> Pass:
    """`run(s, x, v, c, n)` returns `(dX, dV)`, or nothing in the place of `dX`, for sizes other
    than zero."""
    dv, dx = torch.empty_like(v), unallocated(x.shape, x.dtype)
    (m, r), o = x.shape, len(v)
    if config is None:
        size = max(x.element_size(), v.element_size())
        config = configs.grads(m, o, r, size, x.element_size() >= 4 and not tf32, target)
    if m > config.BLOCK_M:
        raise ValueError(f"the tile has {config.BLOCK_M} rows, got {m}")
    tiles_o = triton.cdiv(o, config.BLOCK_O)
    splits = tiles.sharing(tiles_o, config.splits)
    steps = triton.cdiv(tiles_o, splits)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = unallocated((splits, dx.numel()), acc) if splits > 1 else dx
    launch = Launcher(
        grads_kernel,
        target,
        (triton.cdiv(r, config.BLOCK_R) * splits,),
        steps=steps,
        **sizes(x, v, dv),
        NORM=norm,
        NEEDS_X=needs_x,
        WIDE=is_wide(x, v, dv, parts),
        WAITS=target.is_hopper,
        STAGES=config.num_stages,
        **product_types(x, tf32),
        **config.of_kernel(),
    )
    run = Pass("s", "x", "v", "c", "n")
    run.new(dv=dv)
    if needs_x:
        run.new(dx=dx, parts=parts) if splits > 1 else run.new(dx=dx)
    result = "dv" if not needs_x else "parts" if splits > 1 else "dx"
    run.call(launch, "s", "x", "v", "c", "n", "dv", result)
    if needs_x and splits > 1:
        run.call(prepare_sum(target, parts, dx), "parts", "dx", "dx", "dx")
    return run.returning("dx" if needs_x else None, "dv")


def prepare_weight_product(
    target: Target,
    x: Tensor,
    v: Tensor,
    norm: Norm,
    tf32: bool,
    config: configs.GradConfig | None,
) -> Pass:
    """`run(s, x, v, c, n)` returns `dV`, for sizes other than zero."""
    dv = torch.empty_like(v)
    (m, r), o = x.shape, len(v)
    if config is None:
        config = configs.weight_product(x.element_size(), target)
    launch = Launcher(
        weight_product_kernel,
        target,
        (triton.cdiv(o, config.BLOCK_O) * triton.cdiv(r, config.BLOCK_R),),
        **sizes(x, v, dv),
        NORM=norm,
        WIDE=is_wide(x, v, dv, unallocated((m, o), x.dtype)),
        **product_types(x, tf32),
        **config._asdict(),
    )
    run = Pass("s", "x", "v", "c", "n")
    run.new(dv=dv)
    run.call(launch, "s", "x", "v", "c", "n", "dv")
    return run.returning("dv")
