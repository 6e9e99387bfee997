"""The pass over activations of a linear layer that is scaled after its product, or before it.

    OUT = A ⊙ s + b,   s = g / n      along the columns of A

It may bring along the sums of A's columns, and what the backward takes of the kept product `P`:

    dg_j = ⟨A_j, P_j⟩ / n_j,   c_j = s_j dg_j / d_j     d: the divisor of the norm's slope

The divisor of linf has the ties, which a row before `P` holds (`launch.kept_product`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...call import Norm, scale_dtype
from . import configs
from .common import offsets, slope_coefficient
from .configs import Target
from .launch import Launcher, is_wide, unallocated
from .passes import Pass


@triton.jit
def scale_kernel(
    A,
    P,
    G,
    NORMS,
    BIAS,
    OUT,
    SUMS,
    DG,
    COEF,
    M,
    C,
    steps,
    stride_am,
    stride_ac,
    stride_om,
    stride_oc,
    stride_s,
    stride_bias,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr,
    DOTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """OUT = A ⊙ g / n + bias, along columns; OUT may be A. `stride_s` is 0 for a scalar scale.

    SUM: SUMS has the sums of A's columns, of which a program then has every row.
    DOTS, with SUM: DG has the dots of the columns of A and of a dense P over n, and COEF what they
    contribute to dV. For linf, the ties come before P.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    offs_c = offsets(tl.program_id(0) % tiles_c, BLOCK_C, WIDE)
    first = tl.program_id(0) // tiles_c * steps
    mask_c = offs_c < C
    n = tl.load(NORMS + offs_c * stride_s, mask=mask_c, other=1.0)
    g = tl.load(G + offs_c * stride_s, mask=mask_c, other=0.0).to(n.dtype)
    if HAS_BIAS:
        bias = tl.load(BIAS + offs_c * stride_bias, mask=mask_c, other=0.0).to(n.dtype)
    if SUM:
        sums = tl.zeros((BLOCK_M, BLOCK_C), n.dtype)
    if DOTS:
        dots = tl.zeros((BLOCK_M, BLOCK_C), n.dtype)
        ties = 0.0
        if NORM == "linf":
            ties = tl.load(P + offs_c, mask=mask_c, other=1.0).to(n.dtype)
            P += C
    for step in range(steps):
        offs_m = offsets(first + step, BLOCK_M, WIDE)
        mask = (offs_m < M)[:, None] & mask_c[None, :]
        at = A + offs_m[:, None] * stride_am + offs_c[None, :] * stride_ac
        a = tl.load(at, mask=mask, other=0.0).to(n.dtype)
        if SUM:
            sums += a
        if DOTS:
            at = P + offs_m[:, None] * C + offs_c[None, :]
            dots += a * tl.load(at, mask=mask, other=0.0).to(n.dtype)
        a *= (g / n)[None, :]
        if HAS_BIAS:
            a += bias[None, :]
        at = OUT + offs_m[:, None] * stride_om + offs_c[None, :] * stride_oc
        tl.store(at, a, mask=mask)
    if SUM:
        tl.store(SUMS + offs_c, tl.sum(sums, axis=0), mask=mask_c)
    if DOTS:
        dg = tl.sum(dots, axis=0) / n
        tl.store(DG + offs_c, dg, mask=mask_c)
        tl.store(COEF + offs_c, slope_coefficient(g, n, dg, ties, EPS, NORM), mask=mask_c)


# --- launchers ---------------------------------------------------------------------------------


def prepare_scale(
    target: Target,
    a: Tensor,
    dim: int | None,
    bias: Tensor | None = None,
    *,
    sums: bool = False,
    in_place: bool = False,
) -> Pass:
    """`run(a, g, n, bias)` returns `(A ⊙ s + bias, the sums of A's columns or nothing)`."""
    run = Pass("a", "g", "n", "bias")
    if not in_place:
        run.new(out=unallocated(a.shape, a.dtype))
    if sums:
        run.new(sums=unallocated(a.shape[1:], a.dtype))
    scaled = "a" if in_place else "out"
    added, summed = "bias" if bias is not None else scaled, "sums" if sums else None
    launch = _launcher(target, a, dim, bias, sums=sums, in_place=in_place)
    rest = (summed or scaled, scaled, scaled)
    run.call(launch, "a", "a", "g", "n", added, scaled, *rest)
    return run.returning(scaled, summed)


def prepare_dots(target: Target, dy: Tensor, v: Tensor, g: Tensor, eps: float, norm: Norm) -> Pass:
    """`run(dy, p, g, n)` returns `(dY ⊙ s, db, dg, c)`, of the `kept_product`, for dim=0."""
    run = Pass("dy", "p", "g", "n")
    run.new(s=unallocated(dy.shape, dy.dtype), db=unallocated(dy.shape[1:], dy.dtype))
    run.new(dg=g, c=unallocated(g.shape, scale_dtype(v)))
    launch = _launcher(target, dy, 0, None, eps, norm, sums=True, dots=True)
    run.call(launch, "dy", "p", "g", "n", "s", "s", "db", "dg", "c")
    return run.returning("s", "db", "dg", "c")


def _launcher(
    target: Target,
    a: Tensor,
    dim: int | None,
    bias: Tensor | None,
    eps: float = 0.0,
    norm: Norm = "l2",
    *,
    sums: bool,
    dots: bool = False,
    in_place: bool = False,
) -> Launcher:
    """Called as `launch(a, p, g, n, bias, out, sums, dg, c)`; any tensor takes the place of one
    that there is not."""
    m, c = a.shape
    config = configs.scale(m, sums)
    steps = triton.cdiv(m, config.BLOCK_M) if sums else 1
    tiles_m = 1 if sums else triton.cdiv(m, config.BLOCK_M)
    out = a if in_place else unallocated(a.shape, a.dtype)
    return Launcher(
        scale_kernel,
        target,
        (tiles_m * triton.cdiv(c, config.BLOCK_C),),
        M=m,
        C=c,
        steps=steps,
        stride_am=a.stride(0),
        stride_ac=a.stride(1),
        stride_om=out.stride(0),
        stride_oc=out.stride(1),
        stride_s=0 if dim is None else 1,
        stride_bias=0 if bias is None else bias.stride(0),
        EPS=eps,
        NORM=norm,
        HAS_BIAS=bias is not None,
        SUM=sums,
        DOTS=dots,
        WIDE=is_wide(a, out),
        **config._asdict(),
    )
