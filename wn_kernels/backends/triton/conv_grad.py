"""The gradient of a convolution's weight, before weight norm's own backward:

    dW[k, c, t] = Σ_{b,y} P[b, y, k] · Q[b, y · stride - padding + t · dilation, c]

with P on the smaller side and Q on the larger: P = dY and Q = x for a convolution, P = x and
Q = dY for a transposed one. A product over pixels, `Pᵀ Q`, with Q's columns along taps and
channels. Channels are often few and pixels many, so the sum is split over programs: each leaves
its part of dW, and whoever reads dW adds the parts in order (`weight.py`). No atomics.

`db = Σ P` rides along for a convolution; a transposed one sums dY, not all of which Q visits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...call import Geometry, scale_dtype
from . import configs
from .common import dot, offsets
from .configs import Target
from .conv_product import is_direct
from .launch import (
    PROGRAMS_PER_SM,
    Launcher,
    allocator,
    is_wide,
    product_types,
    unallocated,
)
from .pixels import (
    activation_strides,
    as_rows,
    block_of_taps,
    channels_last,
    gathered,
    pixel_offset,
    repacker,
    split_pixels,
    split_taps,
    tap_offset,
    three,
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
    FLAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """DW[part], a tile of O rows by R channels under one tap, over this part of the M pixels.

    FLAT as in `block_of_taps`. DB[part] is the column sum of P.
    """
    pid = tl.program_id(0)
    part = tl.program_id(1)
    group = tl.program_id(2)
    tiles_o = tl.cdiv(O, BLOCK_O)
    tile_o = pid % tiles_o
    tile_r = pid // tiles_o
    offs_o = offsets(tile_o, BLOCK_O, WIDE)
    mask_o = offs_o < O
    j, offs_r, mask_r = block_of_taps(tile_r, taps, R, FLAT, WIDE, BLOCK_R)
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
        if HAS_BIAS:
            bias += tl.sum(p.to(ACC), axis=0)

    DW += part.to(tl.int64) * stride_part + group.to(tl.int64) * stride_w[0]
    at = offs_o[:, None] * stride_w[1] + offs_r[None, :] * stride_w[2]
    at += tap_offset(j, stride_w)
    tl.store(DW + at, acc, mask=mask_o[:, None] & mask_r[None, :])
    if HAS_BIAS:
        at = (part * tl.num_programs(2) + group) * O + offs_o
        tl.store(DB + at, bias, mask=mask_o & (tile_r == 0))


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
    tl.store(DW + part.to(tl.int64) * stride_part + at, tl.sum(acc, axis=0), mask=mask_o)
    if HAS_BIAS:
        mask = mask_o & (tl.program_id(2) == 0)
        tl.store(DB + part * GROUPS * O + offs_o, tl.sum(bias, axis=0), mask=mask)


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
) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]], Tensor]:
    """`run(dy, x)` returns `(dW, db)`, and `None` for a `db` that is not needed or does not ride
    along. `dW` is in parts, `(parts, *V.shape)`, in the dtype of the norms. Its layout is returned
    beside `run`."""
    transposed = conv.transposed
    p, q = (x, dy) if transposed else (dy, x)
    repack_p, repack_q = repacker(p), repacker(q)
    p, q = channels_last(p), channels_last(q)
    groups, (first, r, *taps) = conv.groups, v.shape
    o = first // groups
    sizes, count = three(p.shape[2:]), three(taps)
    m = len(p) * sizes[0] * sizes[1] * sizes[2]
    has_bias = needs_bias and not transposed
    types = product_types(x, tf32)
    direct = is_direct(conv, v.shape)
    itemsize = x.element_size()
    if config is None:
        config = configs.direct(itemsize) if direct else configs.conv_grad(o, r, itemsize)
    flat = not direct and r < 16
    all_taps = count[0] * count[1] * count[2]
    if direct:
        tiles = triton.cdiv(first, config.BLOCK_O)
        grid_rest = all_taps * r
    else:
        assert isinstance(config, configs.GradConfig)
        blocks_r = triton.cdiv(all_taps * r if flat else r, config.BLOCK_R)
        tiles = triton.cdiv(o, config.BLOCK_O) * blocks_r * (1 if flat else all_taps)
        grid_rest = groups
    blocks_m = triton.cdiv(m, config.BLOCK_M)
    wanted = PROGRAMS_PER_SM * target.multiprocessors // max(1, tiles * grid_rest)
    steps = triton.cdiv(blocks_m, max(1, min(blocks_m // 4, wanted)))
    parts = max(1, triton.cdiv(blocks_m, max(1, steps)))
    dw = unallocated((parts, first, *taps, r), scale_dtype(v)).movedim(-1, 2)
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
        "stride_w": weight_strides(dw[0], o),
        "stride_part": dw.stride(0),
        "HAS_BIAS": has_bias,
        "WIDE": is_wide(p, q, dw[0]),
        "ACC": types["ACC"],
        **config._asdict(),
    }
    grid = tiles, parts, grid_rest
    if direct:
        launch = Launcher(direct_grad_kernel, target, grid, GROUPS=groups, **constants)
    else:
        constants |= {"FLAT": flat, "PRECISION": types["PRECISION"]}
        launch = Launcher(conv_grad_kernel, target, grid, **constants)
    new_dw, new_db = allocator(dw), allocator(unallocated((parts, first), dw.dtype))

    def run(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        p, q = (x, dy) if transposed else (dy, x)
        dw = new_dw(dy)
        db = new_db(dy) if has_bias else None
        launch(repack_p(p), repack_q(q), dw, dw if db is None else db)
        if db is not None:
            db = (db[0] if parts == 1 else db.sum(0)).to(dy.dtype)
        return dw, db

    return run, dw
