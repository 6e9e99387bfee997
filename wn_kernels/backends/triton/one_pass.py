"""The forward of a linear layer that takes the norms in the loop of its product:

    y = (Σ_k x V) / ‖V_n‖ · g + b

`V` is read once. Where the sums are long and the tiles few, programs share the sums of a tile, and
a pass adds what they leave.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call import Norm, scale_dtype
from .. import tiles
from . import configs
from .common import (
    as_norm,
    cast,
    dot,
    finished,
    merged,
    merged_along,
    merged_ties,
    multiple,
    offsets,
    partial_of,
    tied,
    ties_along,
)
from .configs import Target
from .launch import Launcher, is_wide, kept_product, product_types, sizes, unallocated
from .passes import Pass

# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def _store_scaled(
    product,
    partial,
    ties,
    G,
    NORMS,
    BIAS,
    Y,
    P,
    at,
    offs_o,
    mask,
    mask_o,
    stores_norms,
    O,
    stride_bias,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Stores a tile of Y, and with KEEP that of the product, by the slices' partials."""
    if KEEP:
        if NORM == "linf":
            tl.store(P + offs_o, ties, mask=mask_o & stores_norms)
            P += O
        tl.store(P + at, product, mask=mask)
    n = as_norm(partial, EPS, NORM)
    tl.store(NORMS + offs_o, n, mask=mask_o & stores_norms)
    g = tl.load(G + offs_o, mask=mask_o, other=0.0).to(n.dtype)
    y = product * (g / n).to(product.dtype)[None, :]
    if HAS_BIAS:
        bias = tl.load(BIAS + offs_o * stride_bias, mask=mask_o, other=0.0)
        y += bias.to(product.dtype)[None, :]
    tl.store(Y + at, y, mask=mask)


@triton.jit
def one_pass_kernel(
    X,
    V,
    G,
    NORMS,
    BIAS,
    Y,
    P,
    M,
    O,
    R,
    steps,
    stride_xm,
    stride_xr,
    stride_vo,
    stride_vr,
    stride_bias,
    stride_ym,
    stride_yo,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WAITS: tl.constexpr,
    UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Y = X Wᵀ + bias and the norms, for a tile of the rows of X and of those of V. The programs of
    all tiles of X compute the norms, and those of the first one store them.

    PARTS: programs share the r of a tile, `steps` tiles of it each. They leave the product of their
    share in Y, (shares, M, O), and its partial of each norm in NORMS, (shares, O).
    SPLIT > 1: so many products of a share of a tile's r each, one to a warp. SPLIT = 0: each r of a
    tile has sums of its own until the loop is over, which takes multiplications and additions of
    registers alone (`tl.dot` without tensor cores is bound by its loads from shared memory).
    KEEP: P, which lies as Y does, is X Vᵀ. For linf, a row with the ties of each slice comes before
    it; of PARTS these ties follow the partials of all shares.
    """
    R = multiple(R, UNIT)
    stride_xm = multiple(stride_xm, UNIT)
    stride_vo = multiple(stride_vo, UNIT)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * tl.cdiv(O, BLOCK_O)
    share = tl.program_id(0) // tiles
    tile_m = tl.program_id(0) % tiles_m
    offs_m = offsets(tile_m, BLOCK_M, WIDE)
    offs_o = offsets(tl.program_id(0) % tiles // tiles_m, BLOCK_O, WIDE)
    mask_m = offs_m < M
    mask_o = offs_o < O
    norm_type = NORMS.dtype.element_ty
    if SPLIT == 0:
        acc = tl.zeros((BLOCK_M, BLOCK_O, BLOCK_R), ACC)
    elif SPLIT == 1:
        acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    else:
        acc = tl.zeros((SPLIT, BLOCK_M, BLOCK_O), ACC)
    # Partials of the norms stay inside a thread until the loop is over: no shuffles in it.
    RUN: tl.constexpr = 8 if SPLIT > 0 else 1
    partials = tl.zeros((BLOCK_O, BLOCK_R // RUN), norm_type)
    ties = tl.zeros((BLOCK_O, BLOCK_R // RUN), norm_type)

    first, end = 0, R
    if PARTS:
        first = share * steps * BLOCK_R
        end = tl.minimum(R, first + steps * BLOCK_R)
    for start in tl.range(first, end, BLOCK_R, num_stages=STAGES):
        offs_r = offsets(start // BLOCK_R, BLOCK_R, WIDE)
        x_at = X + offs_m[:, None] * stride_xm + offs_r[None, :] * stride_xr
        v_at = V + offs_o[:, None] * stride_vo + offs_r[None, :] * stride_vr
        if EVEN_R:
            x = tl.load(x_at, mask=mask_m[:, None], other=0.0)
            v = tl.load(v_at, mask=mask_o[:, None], other=0.0)
        else:
            mask_r = offs_r < R
            x = tl.load(x_at, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            v = tl.load(v_at, mask=mask_o[:, None] & mask_r[None, :], other=0.0)
        factor = cast(v, x.dtype)
        if SPLIT == 0:
            acc += x[:, None, :] * factor[None, :, :]
        elif SPLIT == 1:
            acc = dot(x, tl.trans(factor), acc, PRECISION)
        else:
            factor = tl.reshape(factor, (BLOCK_O, SPLIT, BLOCK_R // SPLIT))
            x = tl.permute(tl.reshape(x, (BLOCK_M, SPLIT, BLOCK_R // SPLIT)), (1, 0, 2))
            acc = dot(x, tl.permute(factor, (1, 2, 0)), acc, PRECISION)
        run, ties_of_run = partial_of(v.to(norm_type), NORM), 1.0
        if RUN > 1:
            single = tl.reshape(run, (BLOCK_O, BLOCK_R // RUN, RUN))
            run = merged_along(single, 2, NORM)
            if KEEP and NORM == "linf":
                ties_of_run = tl.sum(tied(single, run[:, :, None]), axis=2)
        if KEEP and NORM == "linf":
            ties = merged_ties(partials, ties, run, ties_of_run)
        partials = merged(partials, run, NORM)
        if SPLIT > 0:
            acc = finished(acc, first, end, WAITS)
    if SPLIT == 0:
        acc = tl.sum(acc, axis=2)
    elif SPLIT > 1:
        acc = tl.sum(acc, axis=0)

    partial = merged_along(partials, 1, NORM)
    if KEEP and NORM == "linf":
        ties = ties_along(partials, ties, 1)
    mask = mask_m[:, None] & mask_o[None, :]
    if PARTS:
        tl.store(Y + (share * M + offs_m)[:, None] * O + offs_o[None, :], acc, mask=mask)
        tl.store(NORMS + share * O + offs_o, partial, mask=mask_o & (tile_m == 0))
        if KEEP and NORM == "linf":
            at = (tl.num_programs(0) // tiles + share) * O + offs_o
            tl.store(NORMS + at, ties, mask=mask_o & (tile_m == 0))
    else:
        at = offs_m[:, None] * stride_ym + offs_o[None, :] * stride_yo
        _store_scaled(
            product=acc,
            partial=partial,
            ties=ties,
            G=G,
            NORMS=NORMS,
            BIAS=BIAS,
            Y=Y,
            P=P,
            at=at,
            offs_o=offs_o,
            mask=mask,
            mask_o=mask_o,
            stores_norms=tile_m == 0,
            O=O,
            stride_bias=stride_bias,
            EPS=EPS,
            NORM=NORM,
            HAS_BIAS=HAS_BIAS,
            KEEP=KEEP,
        )


@triton.jit
def add_parts_kernel(
    PARTS,
    PARTIALS,
    G,
    NORMS,
    BIAS,
    Y,
    P,
    M,
    O,
    shares,
    stride_bias,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Y, the norms and P of `one_pass_kernel` from what its programs left of their shares of r, by
    a tile of the dense Y. They are added in order."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    offs_m = offsets(tile_m, BLOCK_M, WIDE)
    offs_o = offsets(tl.program_id(0) // tiles_m, BLOCK_C, WIDE)
    mask_o = offs_o < O
    mask = (offs_m < M)[:, None] & mask_o[None, :]
    at = offs_m[:, None] * O + offs_o[None, :]
    product = tl.load(PARTS + at, mask=mask, other=0.0)
    partial = tl.load(PARTIALS + offs_o, mask=mask_o, other=0.0)
    ties = partial
    if KEEP and NORM == "linf":
        ties = tl.load(PARTIALS + shares * O + offs_o, mask=mask_o, other=0.0)
    for share in range(1, shares):
        offs_m += M
        part = PARTS + offs_m[:, None] * O + offs_o[None, :]
        product += tl.load(part, mask=mask, other=0.0)
        other = tl.load(PARTIALS + share * O + offs_o, mask=mask_o, other=0.0)
        if KEEP and NORM == "linf":
            more = tl.load(PARTIALS + (shares + share) * O + offs_o, mask=mask_o, other=0.0)
            ties = merged_ties(partial, ties, other, more)
        partial = merged(partial, other, NORM)
    _store_scaled(
        product=product,
        partial=partial,
        ties=ties,
        G=G,
        NORMS=NORMS,
        BIAS=BIAS,
        Y=Y,
        P=P,
        at=at,
        offs_o=offs_o,
        mask=mask,
        mask_o=mask_o,
        stores_norms=tile_m == 0,
        O=O,
        stride_bias=stride_bias,
        EPS=EPS,
        NORM=NORM,
        HAS_BIAS=HAS_BIAS,
        KEEP=KEEP,
    )


# --- launcher ----------------------------------------------------------------------------------


def prepare_one_pass(
    target: Target,
    x: Tensor,
    v: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: Norm,
    tf32: bool,
    keep: bool,
    config: configs.SplitConfig | None,
) -> Pass:
    """`run(x, v, g, bias)` returns `(y, n)` and, with `keep`, the `kept_product`."""
    counts = keep and norm == "linf"
    (m, r), o = x.shape, len(v)
    y = unallocated((m, o), x.dtype)
    ieee = x.element_size() >= 4 and not tf32
    if config is None:  # V's tile is held in its own dtype
        size = max(x.element_size(), v.element_size())
        config = configs.one_pass(m, o, r, size, ieee, target)
    split = configs.split(config, x.element_size(), ieee, target)
    tiles_r = triton.cdiv(r, config.BLOCK_R)
    shares = tiles.sharing(tiles_r, config.splits)
    steps = triton.cdiv(tiles_r, shares)
    n, types = unallocated((o, 1), scale_dtype(v)), product_types(x, tf32)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = unallocated((shares, m, o), acc)
    options: dict[str, Any] = {"EPS": eps, "NORM": norm, "HAS_BIAS": bias is not None, "KEEP": keep}
    options["stride_bias"] = 0 if bias is None else bias.stride(0)
    launch = Launcher(
        one_pass_kernel,
        target,
        (triton.cdiv(m, config.BLOCK_M) * triton.cdiv(o, config.BLOCK_O) * shares,),
        steps=steps,
        **sizes(x, v),
        stride_ym=y.stride(0),
        stride_yo=y.stride(1),
        PARTS=shares > 1,
        EVEN_R=r % config.BLOCK_R == 0,
        WIDE=is_wide(x, v, parts),
        WAITS=target.is_hopper,
        SPLIT=split,
        STAGES=None if split else config.num_stages,  # Triton has stages of its own around `tl.dot`
        **types,
        **(options if shares == 1 else options | {"HAS_BIAS": False, "KEEP": counts}),
        **config.of_kernel(),
    )
    run = Pass("x", "v", "g", "bias")
    run.new(y=y, n=n)
    if keep:
        run.new(p=kept_product(x, v, norm))
    results = ("g", "n", "y" if bias is None else "bias", "y", "p" if keep else "y")
    if shares == 1:
        run.call(launch, "x", "v", *results)
    else:
        run.new(parts=parts, partials=unallocated((1 + counts, shares, o), n.dtype))
        run.call(launch, "x", "v", "g", "partials", "parts", "parts", "parts")
        tile = configs.added(m)
        add = Launcher(
            add_parts_kernel,
            target,
            (triton.cdiv(m, tile.BLOCK_M) * triton.cdiv(o, tile.BLOCK_C),),
            M=m,
            O=o,
            shares=shares,
            WIDE=is_wide(parts),
            **options,
            **tile._asdict(),
        )
        run.call(add, "parts", "partials", *results)
    return run.returning("y", "n", *["p"] * keep)
