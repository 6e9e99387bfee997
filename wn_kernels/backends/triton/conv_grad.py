"""The gradient of a convolution's weight, before weight norm's own backward:

    dW[k, c, t] = Σ_{b,y} P[b, y, k] · Q[b, y · stride - padding + t · dilation, c]

with P on the smaller side and Q on the larger: P = dY and Q = x for a convolution, P = x and
Q = dY for a transposed one. A product over pixels, `Pᵀ Q`, with Q's columns along taps and
channels. Channels are often few and pixels many, so the sum is split over programs: each leaves
its part of dW and of db, and `sum_kernel` adds the parts in order. No atomics. dW is packed, as `W`
is: neighbours along its channels are computed by one thread, and stored together.

`db = Σ P` rides along for a convolution; a transposed one sums dY, not all of which Q visits.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...call import Geometry, scale_dtype
from ..tiles import parts as split_over
from . import configs, weight
from .common import dot, finished, multiple, offsets
from .configs import Target
from .launch import Launcher, is_wide, product_types, unallocated, unit
from .parts import prepare_sum
from .passes import Pass
from .pixels import (
    activation_strides,
    activation_unit,
    as_columns,
    as_rows,
    block_of_taps,
    gathered,
    in_units,
    pixel_offset,
    split_pixels,
    split_taps,
    tap_offset,
    three,
    weight_in_units,
    weight_strides,
)

# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def conv_grad_kernel(
    P,
    Q,
    DW,
    DB,
    M,
    O,
    R,
    steps,
    tiles_r,
    sizes_p,
    sizes_q,
    taps,
    stride,
    padding,
    dilation,
    stride_p,
    stride_q,
    stride_w,
    stride_part,
    first_bias,
    FLAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WAITS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """DW[part], a tile of O rows by R channels under one tap, over this part of the M pixels.

    FLAT as in `block_of_taps`. DB[part], from its element `first_bias`, is the column sum of P.
    UNITS are those of the strides of P and of Q, of O and of R (`common.multiple`).
    """
    stride_p = in_units(stride_p, UNITS[0])
    stride_q = in_units(stride_q, UNITS[1])
    O = multiple(O, UNITS[2])
    R = multiple(R, UNITS[3])
    stride_w = weight_in_units(stride_w, UNITS[3], PHASED=False)
    part = tl.program_id(1)
    group = tl.program_id(2)
    offs_o = offsets(tl.program_id(0) // tiles_r, BLOCK_O, WIDE)
    mask_o = offs_o < O
    tile_r = tl.program_id(0) % tiles_r
    j, offs_r, mask_r = block_of_taps(tile_r, taps, R, FLAT, WIDE, BLOCK_R)
    if FLAT:
        j = as_columns(j)
    base = (-padding[0], -padding[1], -padding[2])
    P += group.to(tl.int64) * O * stride_p[1]
    Q += group.to(tl.int64) * R * stride_q[1]

    acc = tl.zeros((BLOCK_O, BLOCK_R), ACC)
    bias = tl.zeros((BLOCK_O,), ACC)
    for i in range(steps):
        offs_m = offsets(part * steps + i, BLOCK_M, WIDE)
        mask_m = (offs_m < M)[:, None]
        b, y = split_pixels(offs_m, sizes_p)
        rows = as_rows(y)
        p_at = b[:, None] * stride_p[0] + pixel_offset(rows, stride_p)
        p_at += offs_o[None, :] * stride_p[1]
        p = tl.load(P + p_at, mask=mask_m & mask_o[None, :], other=0.0)
        pixels, inside = gathered(rows, j, stride, base, dilation, sizes_q, stride_q)
        q_at = b[:, None] * stride_q[0] + pixels + offs_r[None, :] * stride_q[1]
        q = tl.load(Q + q_at, mask=mask_m & inside & mask_r[None, :], other=0.0)
        acc = dot(tl.trans(p), q, acc, PRECISION)
        if HAS_BIAS:  # a second use of P
            bias += tl.sum(p.to(ACC), axis=0)
            acc = finished(acc, 0, steps, WAITS)

    DW += part.to(tl.int64) * stride_part + group.to(tl.int64) * stride_w[0]
    at = offs_o[:, None] * stride_w[1] + offs_r[None, :] * stride_w[2]
    at += tap_offset(j, stride_w)
    tl.store(DW + at, acc, mask=mask_o[:, None] & mask_r[None, :])
    if HAS_BIAS:
        DB += part.to(tl.int64) * stride_part + first_bias + group * O
        tl.store(DB + offs_o, bias, mask=mask_o & (tile_r == 0))


@triton.jit
def direct_grad_kernel(
    P,
    Q,
    DW,
    DB,
    M,
    GROUPS,
    O,
    R,
    steps,
    sizes_p,
    sizes_q,
    taps,
    stride,
    padding,
    dilation,
    stride_p,
    stride_q,
    stride_w,
    stride_part,
    first_bias,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """As `conv_grad_kernel`, for O and R of a few channels: a program takes one input channel and
    one tap of the outputs of many groups."""
    part = tl.program_id(1)
    r = tl.program_id(2) % R
    j = split_taps(tl.program_id(2) // R, taps)
    offs_o = offsets(tl.program_id(0), BLOCK_O, WIDE)
    mask_o = offs_o < GROUPS * O
    group = offs_o // O
    base = (-padding[0], -padding[1], -padding[2])

    acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    bias = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    for i in range(steps):
        offs_m = offsets(part * steps + i, BLOCK_M, WIDE)
        mask = (offs_m < M)[:, None] & mask_o[None, :]
        b, y = split_pixels(offs_m, sizes_p)
        rows = as_rows(y)
        p_at = b[:, None] * stride_p[0] + pixel_offset(rows, stride_p)
        p_at += offs_o[None, :] * stride_p[1]
        p = tl.load(P + p_at, mask=mask, other=0.0).to(ACC)
        pixels, inside = gathered(rows, j, stride, base, dilation, sizes_q, stride_q)
        q_at = b[:, None] * stride_q[0] + pixels + (group * R + r)[None, :] * stride_q[1]
        acc += p * tl.load(Q + q_at, mask=mask & inside, other=0.0).to(ACC)
        if HAS_BIAS:
            bias += p

    at = group * stride_w[0] + (offs_o % O) * stride_w[1] + r * stride_w[2]
    at += tap_offset(j, stride_w)
    first = part.to(tl.int64) * stride_part
    tl.store(DW + first + at, tl.sum(acc, axis=0), mask=mask_o)
    if HAS_BIAS:
        mask = mask_o & (tl.program_id(2) == 0)
        tl.store(DB + first + first_bias + offs_o, tl.sum(bias, axis=0), mask=mask)


# --- launcher ----------------------------------------------------------------------------------


def prepare_weight_grad(
    target: Target,
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    conv: Geometry,
    needs_bias: bool,
    tf32: bool,
    config: configs.GradConfig | configs.DirectConfig | None = None,
) -> tuple[Pass, Tensor]:
    """`run(dy, x)` returns `(dW, db)`, and `None` for a `db` that is not needed or does not ride
    along, of activations with their channels contiguous. `dW` is packed and in the dtype of the
    norms; its layout is returned beside `run`."""
    transposed = conv.transposed
    p, q = (x, dy) if transposed else (dy, x)
    groups, (first, r, *taps) = conv.groups, v.shape
    o = first // groups
    sizes, count = three(p.shape[2:]), three(taps)
    m = len(p) * math.prod(sizes)
    has_bias = needs_bias and not transposed
    types = product_types(x, tf32)
    direct = conv.has_small_groups(v.shape)
    if config is None:
        size = x.element_size()
        config = configs.direct(size) if direct else configs.conv_grad(o, r, size, target)
    flat = not direct and r < 16
    if direct:
        tiles = triton.cdiv(first, config.BLOCK_O)
        rest = math.prod(count) * r
    else:
        assert isinstance(config, configs.GradConfig)
        tiles_r = math.prod(count) * triton.cdiv(r, config.BLOCK_R)
        if flat:
            tiles_r = triton.cdiv(math.prod(count) * r, config.BLOCK_R)
        tiles = triton.cdiv(o, config.BLOCK_O) * tiles_r
        rest = groups
    blocks_m = triton.cdiv(m, config.BLOCK_M)
    parts = split_over(blocks_m, tiles * rest, target.multiprocessors, direct)
    steps = triton.cdiv(blocks_m, parts)
    dw = weight.packed(v, scale_dtype(v))
    db = unallocated((first if has_bias else 0,), dy.dtype)
    size = dw.numel() + db.numel()
    constants: dict[str, Any] = {
        "M": m,
        "O": o,
        "R": r,
        "steps": steps,
        "sizes_p": sizes,
        "sizes_q": three(q.shape[2:]),
        "taps": count,
        "stride": three(conv.stride),
        "padding": three(conv.padding, 0),
        "dilation": three(conv.dilation),
        "stride_p": activation_strides(p),
        "stride_q": activation_strides(q),
        "stride_w": weight_strides(dw, o),
        "stride_part": size,
        "first_bias": dw.numel() if parts > 1 else 0,
        "HAS_BIAS": has_bias,
        "WIDE": is_wide(p, q, dw),
        "ACC": types["ACC"],
        **config._asdict(),
    }
    grid = tiles, parts, rest
    if direct:
        launch = Launcher(direct_grad_kernel, target, grid, GROUPS=groups, **constants)
    else:
        constants |= {"tiles_r": tiles_r, "FLAT": flat, "PRECISION": types["PRECISION"]}
        constants["WAITS"] = target.is_hopper
        constants["UNITS"] = activation_unit(p), activation_unit(q), unit(o), unit(r)
        launch = Launcher(conv_grad_kernel, target, grid, **constants)

    run = Pass("dy", "x")
    given = ("x", "dy") if transposed else ("dy", "x")
    run.new(dw=dw, db=db)
    if parts == 1:
        run.call(launch, *given, "dw", "db")
    else:
        stacked = unallocated((parts, size), dw.dtype)
        run.new(parts=stacked)
        run.call(launch, *given, "parts", "parts")
        run.call(prepare_sum(target, stacked, dw, rest=db), "parts", "dw", "dw", "db")
    return run.returning("dw", "db" if has_bias else None), dw
