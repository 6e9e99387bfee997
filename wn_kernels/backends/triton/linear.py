"""The linear layer: `y = x Wᵀ + b` and its gradients, with `W = s ⊙ V`, `s = g / n`.

Both products with `V` are one matmul, `C[m, o] = Σ_r A[m, r] · W[o, r]`:

    forward   C = y    A = x    o = n (outputs)   r = k
    dX        C = dX   A = dY   o = k (inputs)    r = n

and the scale enters where its axis lies:

    one_pass    s along o, taken in the loop: C = (Σ_r A V) / ‖V_o‖ · g, V read once, one launch
    epilogue    s along o (or a scalar), norms ready: scaled in the float32 accumulator
    prologue_r  s along r: V's tile is scaled, and is W's tile from then on
    prologue_o  s along o, but V would leave the range of the product's dtype unscaled

The weight gradient `dW[o, r] = Σ_m P[m, o] Q[m, r]` gives each program the slices `o` it owns:

    dim=0   o = n, P = dY, Q = x          dim=1   o = k, P = x, Q = dY

    a_o = Σ_r dW V,   dg = a / n,   dV = s ⊙ dW - c ⊙ V,   c = s · dg / n

`grad_one_pass_kernel` walks r twice and recomputes the tile of dW instead of storing it.
`grad_kernel` stores dW and partial dots; `weight.py` finishes in place. `db = Σ_m dY` rides along.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..reference import narrows_range, scale_dtype
from . import configs, weight
from .common import as_norm, cast, dot, dot_coefficient, offsets
from .launch import described, is_describable, is_wide, launch, product_types
from .norm import slice_norms

# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def matmul_kernel(
    A,
    V,
    G,
    NORM,
    BIAS,
    C,
    M,
    O,
    R,
    stride_am,
    stride_ar,
    stride_vo,
    stride_vr,
    stride_s,
    stride_bias,
    stride_cm,
    stride_co,
    FORM: tl.constexpr,
    EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    LOADS: tl.constexpr,
    TURNED: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """C = A Wᵀ + bias. `stride_s` is 0 for a scalar scale. one_pass stores the norms.

    LOADS other than "pointers": A and V are tensor descriptors, V's of its transpose where it lies
    so (TURNED). "specialized": loads and products have warps of their own. SPLIT > 1: so many
    products of a share of r each, one to a warp.
    """
    # Programs in groups of GROUP row tiles, so that tiles of V are reused while in cache.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_o = tl.cdiv(O, BLOCK_O)
    group = pid // (GROUP * tiles_o)
    group_size = min(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (pid % (GROUP * tiles_o)) % group_size
    tile_o = (pid % (GROUP * tiles_o)) // group_size

    offs_m = offsets(tile_m, BLOCK_M, WIDE)
    offs_o = offsets(tile_o, BLOCK_O, WIDE)
    mask_m = offs_m < M
    mask_o = offs_o < O
    norm_type = NORM.dtype.element_ty
    if SPLIT == 1:
        acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    else:
        acc = tl.zeros((SPLIT, BLOCK_M, BLOCK_O), ACC)
    # Squares stay inside a thread until the loop is over: no shuffles in it.
    squares = tl.zeros((BLOCK_O, BLOCK_R // 8), norm_type)
    if FORM == "prologue_o":
        n = tl.load(NORM + offs_o * stride_s, mask=mask_o, other=1.0)
        scale_o = tl.load(G + offs_o * stride_s, mask=mask_o, other=0.0).to(norm_type) / n

    for start in tl.range(0, R, BLOCK_R, warp_specialize=LOADS == "specialized"):
        offs_r = offsets(start // BLOCK_R, BLOCK_R, WIDE)
        if LOADS != "pointers":
            a = A.load([tile_m * BLOCK_M, start])
            if TURNED:
                v = tl.trans(V.load([start, tile_o * BLOCK_O]))
            else:
                v = V.load([tile_o * BLOCK_O, start])
        else:
            a_at = A + offs_m[:, None] * stride_am + offs_r[None, :] * stride_ar
            v_at = V + offs_o[:, None] * stride_vo + offs_r[None, :] * stride_vr
            if EVEN_R:
                a = tl.load(a_at, mask=mask_m[:, None], other=0.0)
                v = tl.load(v_at, mask=mask_o[:, None], other=0.0)
            else:
                mask_r = offs_r < R
                a = tl.load(a_at, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
                v = tl.load(v_at, mask=mask_o[:, None] & mask_r[None, :], other=0.0)
        if FORM == "one_pass":
            wide = v.to(norm_type)
            squares += tl.sum(tl.reshape(wide * wide, (BLOCK_O, BLOCK_R // 8, 8)), axis=2)
        if FORM == "prologue_o":
            v = v.to(norm_type) * scale_o[:, None]
        if FORM == "prologue_r":
            n = tl.load(NORM + offs_r, mask=offs_r < R, other=1.0)
            g = tl.load(G + offs_r, mask=offs_r < R, other=0.0).to(norm_type)
            v = v.to(norm_type) * (g / n)[None, :]
        v = cast(v, a.dtype)
        if SPLIT == 1:
            acc = dot(a, tl.trans(v), acc, PRECISION)
        else:
            v = tl.permute(tl.reshape(v, (BLOCK_O, SPLIT, BLOCK_R // SPLIT)), (1, 2, 0))
            a = tl.permute(tl.reshape(a, (BLOCK_M, SPLIT, BLOCK_R // SPLIT)), (1, 0, 2))
            acc = dot(a, v, acc, PRECISION)
    if SPLIT > 1:
        acc = tl.sum(acc, axis=0)

    if FORM == "one_pass":
        n = as_norm(tl.sum(squares, axis=1), EPS)
        tl.store(NORM + offs_o, n, mask=mask_o & (tile_m == 0))
        g = tl.load(G + offs_o, mask=mask_o, other=0.0).to(norm_type)
        acc *= (g / n).to(ACC)[None, :]
    # A large tile in halves: scales, bias and addresses of all columns would not fit the registers.
    PARTS: tl.constexpr = 1 if LOADS == "pointers" else 2
    PART: tl.constexpr = BLOCK_O // PARTS
    parts = (acc,)
    if PARTS == 2:
        parts = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, PART)), (0, 2, 1)))
    for i in tl.static_range(PARTS):
        c = parts[i]
        offs_o = offsets(tile_o * PARTS + i, PART, WIDE)
        mask_o = offs_o < O
        if FORM == "epilogue":
            n = tl.load(NORM + offs_o * stride_s, mask=mask_o, other=1.0)
            g = tl.load(G + offs_o * stride_s, mask=mask_o, other=0.0).to(norm_type)
            c *= (g / n).to(ACC)[None, :]
        if HAS_BIAS:
            c += tl.load(BIAS + offs_o * stride_bias, mask=mask_o, other=0.0).to(ACC)[None, :]
        c_at = C + offs_m[:, None] * stride_cm + offs_o[None, :] * stride_co
        tl.store(c_at, c, mask=mask_m[:, None] & mask_o[None, :])


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


@triton.jit
def grad_kernel(
    P,
    Q,
    V,
    DW,
    PARTIAL,
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
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of DW and its share PARTIAL[tile_r, o] of the dots ⟨dW_o, V_o⟩.

    DB is the column sum of P (BIAS "owned") or of Q ("walked"), by the first tiles along the
    other axis.
    """
    tile_o = tl.program_id(0)
    tile_r = tl.program_id(1)
    offs_o = offsets(tile_o, BLOCK_O, WIDE)
    offs_r = offsets(tile_r, BLOCK_R, WIDE)
    acc = tl.zeros((BLOCK_O, BLOCK_R), ACC)
    bias_o = tl.zeros((BLOCK_O,), ACC)
    bias_r = tl.zeros((BLOCK_R,), ACC)
    for start in range(0, M, BLOCK_M):
        offs_m = offsets(start // BLOCK_M, BLOCK_M, WIDE)
        p = _load_tile(P, offs_m, offs_o, M, O, stride_pm, stride_po)
        q = _load_tile(Q, offs_m, offs_r, M, R, stride_qm, stride_qr)
        acc = dot(tl.trans(p), q, acc, PRECISION)
        if BIAS == "owned":
            bias_o += tl.sum(p.to(ACC), axis=0)
        if BIAS == "walked":
            bias_r += tl.sum(q.to(ACC), axis=0)
    if BIAS == "owned":
        tl.store(DB + offs_o, bias_o, mask=(offs_o < O) & (tile_r == 0))
    if BIAS == "walked":
        tl.store(DB + offs_r, bias_r, mask=(offs_r < R) & (tile_o == 0))

    partial_type = PARTIAL.dtype.element_ty
    v = _load_tile(V, offs_o, offs_r, O, R, stride_vo, stride_vr)
    dots = tl.sum(acc.to(partial_type) * v.to(partial_type), axis=1)
    tl.store(PARTIAL + tile_r.to(tl.int64) * O + offs_o, dots, mask=offs_o < O)
    at = DW + offs_o[:, None] * stride_do + offs_r[None, :] * stride_dr
    tl.store(at, acc, mask=(offs_o < O)[:, None] & (offs_r < R)[None, :])


# --- launchers ---------------------------------------------------------------------------------


def _matmul(
    a: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    bias: Tensor | None,
    form: str,
    eps: float,
    config: configs.MatmulConfig | None,
) -> Tensor:
    """`C = A Wᵀ + bias` for `a` of shape `(M, R)` and `v` of shape `(O, R)`."""
    (m, r), o = a.shape, v.shape[0]
    types = product_types(a)
    target = configs.target(a.get_device())
    c = a.new_empty(m, o)
    turned = v.stride(1) != 1
    lying = v.t() if turned else v
    size = max(a.element_size(), v.element_size())  # V's tile is held in its own dtype
    copies = configs.may_copy(m, size, target) and is_describable(a) and is_describable(lying)
    if config is None and form == "one_pass":
        config = configs.one_pass(m, o, size, target)
    elif config is None:
        ieee = a.dtype == torch.float32 and types["PRECISION"] == "ieee"
        prologue = form.startswith("prologue")
        config = configs.matmul(m, o, size, prologue, ieee, copies, target)
    loads = configs.loads(config, form, target) if copies else "pointers"
    tiles: tuple[Any, Any] = a, v
    if loads != "pointers":
        block_m, block_o, block_r = config[:3]
        v_tile = (block_r, block_o) if turned else (block_o, block_r)
        tiles = described(a, (block_m, block_r)), described(lying, v_tile)
    launch(
        matmul_kernel,
        (triton.cdiv(m, config.BLOCK_M) * triton.cdiv(o, config.BLOCK_O),),
        A=tiles[0],
        V=tiles[1],
        G=g,
        NORM=n,
        BIAS=c if bias is None else bias,
        C=c,
        M=m,
        O=o,
        R=r,
        EPS=eps,
        stride_am=a.stride(0),
        stride_ar=a.stride(1),
        stride_vo=v.stride(0),
        stride_vr=v.stride(1),
        stride_s=0 if n.ndim == 0 else 1,
        stride_bias=0 if bias is None else bias.stride(0),
        stride_cm=c.stride(0),
        stride_co=c.stride(1),
        FORM=form,
        HAS_BIAS=bias is not None,
        EVEN_R=r % config.BLOCK_R == 0,
        WIDE=is_wide(a, v, c),
        LOADS=loads,
        TURNED=turned and loads != "pointers",
        SPLIT=configs.split(config, a.element_size()),
        GROUP=8,
        **types,
        **config._asdict(),
    )
    return c


def linear(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dim: int | None,
    eps: float,
    variant: str,
    *,
    config: configs.MatmulConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`(y, n)` for `x` of shape `(M, K)`; variants as in `costs.triton_linear`."""
    g = g.contiguous()
    if variant == "materialize":
        w, n = weight.weight_norm(v, g, dim, eps, x.dtype)
        return F.linear(x, w, None if bias is None else bias.to(x.dtype)), n
    if variant == "one_pass":
        if dim != 0:
            raise ValueError(f"one_pass needs dim=0, got dim={dim}")
        n = torch.empty(v.shape[0], 1, dtype=scale_dtype(v), device=v.device)
        if x.shape[0] == 0:  # no program would run
            n = slice_norms(v, dim, eps)
        form = "one_pass"
    else:
        n = slice_norms(v, dim, eps)
        if dim == 1:
            form = "prologue_r"
        elif narrows_range(x.dtype, v.dtype):
            form = "prologue_o"
        else:
            form = "epilogue"
    return _matmul(x, v, g, n, bias, form, eps, config), n


def linear_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    dim: int | None,
    eps: float,
    variant: str,
    needs: tuple[bool, bool, bool, bool],
    *,
    matmul_config: configs.MatmulConfig | None = None,
    grad_config: configs.GradConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`(dX, dV, dg, db)`, `None` where `needs` says so and no other output brings it along."""
    g = g.contiguous()
    needs_x, needs_v, needs_g, needs_bias = needs
    dx = dv = dg = db = None
    if variant == "materialize":
        if needs_x:
            dx = torch.mm(dy, weight.weight_norm(v, g, dim, eps, x.dtype)[0])
        if needs_v or needs_g:
            dv, dg = weight.weight_norm_backward(torch.mm(dy.t(), x), v, g, n, dim, eps)
        if needs_bias:
            db = dy.sum(0)
        return dx, dv, dg, db
    if needs_x:
        if dim == 0:
            form = "prologue_r"
        elif narrows_range(x.dtype, v.dtype):
            form = "prologue_o"
        else:
            form = "epilogue"
        dx = _matmul(dy, v.t(), g, n, None, form, eps, matmul_config)
    if needs_v or needs_g:
        one_pass = variant == "one_pass"
        dv, dg, db = _weight_grad(dy, x, v, g, n, dim, eps, one_pass, needs_bias, grad_config)
    elif needs_bias:
        db = dy.sum(0)
    return dx, dv, dg, db


def _weight_grad(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    dim: int | None,
    eps: float,
    one_pass: bool,
    needs_bias: bool,
    config: configs.GradConfig | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(dV, dg, db)`."""
    if one_pass and dim is None:
        raise ValueError("one_pass needs slices that a program can own, got dim=None")
    # Owned slices along the first axis: V, dV and the factors of dW change places for dim=1.
    dv = torch.empty_like(v)
    db = dy.new_empty(dy.shape[1]) if needs_bias else None
    p, q, v_own, dv_own = (x, dy, v.t(), dv.t()) if dim == 1 else (dy, x, v, dv)
    (m, o), r = p.shape, q.shape[1]
    if config is None:
        size = max(x.element_size(), v.element_size())
        target = configs.target(x.get_device())
        config = configs.grad_one_pass(m, size, target) if one_pass else configs.grad(size, target)
    common = {
        "P": p,
        "Q": q,
        "V": v_own,
        "DB": dv if db is None else db,
        "M": m,
        "O": o,
        "R": r,
        "stride_pm": p.stride(0),
        "stride_po": p.stride(1),
        "stride_qm": q.stride(0),
        "stride_qr": q.stride(1),
        "stride_vo": v_own.stride(0),
        "stride_vr": v_own.stride(1),
        "stride_do": dv_own.stride(0),
        "stride_dr": dv_own.stride(1),
        "BIAS": "" if db is None else ("walked" if dim == 1 else "owned"),
        "WIDE": is_wide(p, q, v, dv),
        **product_types(x),
        **config._asdict(),
    }
    if one_pass and m > config.BLOCK_M:
        raise ValueError(f"one_pass holds {config.BLOCK_M} rows in its tile, got {m}")
    tiles_o, tiles_r = triton.cdiv(o, config.BLOCK_O), triton.cdiv(r, config.BLOCK_R)
    if o == 0 or r == 0:  # no tile would run
        return dv, torch.zeros_like(g), None if db is None else dy.sum(0)
    if one_pass:
        dg = torch.empty_like(g)
        launch(
            grad_one_pass_kernel,
            (tiles_o,),
            G=g,
            NORM=n,
            DV=dv_own,
            DG=dg,
            EPS=eps,
            STAGES=config.num_stages,
            **common,
        )
        return dv, dg, db
    partial = n.new_empty(tiles_r, o)
    launch(grad_kernel, (tiles_o, tiles_r), DW=dv_own, PARTIAL=partial, **common)
    dg = weight.finish_weight_grad_(dv, partial, v, g, n, dim, eps)
    return dv, dg, db
