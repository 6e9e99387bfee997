"""Convolutions as implicit matrix products: the product of an activation with `W = s ⊙ V`.

A convolution relates positions `x` of its larger side (channels c) to positions `y` of its smaller
one (channels k), `x = y · stride - padding + t · dilation` under the tap `t` of `V[k, c, t]`, with
c and k counted within a group. Two products follow,

    gather    Y[b, y, k] = Σ_{t,c} X[b, y · stride - padding + t · dilation, c] · W[k, c, t]
    phases    X[b, x, c] = Σ_{t,k} Y[b, (x + padding - t · dilation) / stride, k] · W[k, c, t]

where the second takes only the taps that divide. `gather` is a convolution's forward and a
transposed convolution's `dX`; `phases` is a transposed convolution's forward and a convolution's
`dX`. Both are C[m, o] = Σ_{t,r} A[at(m, t), r] · W[o, r, t], over pixels m, and one kernel:

    at(q, j) = q · factor + base + j · advance    per spatial dimension

    gather    factor = stride, base = -padding, advance = dilation, every tap
    phases    x = q · stride + phase. With d = gcd(stride, dilation), the taps of a phase are
              t = first + j · stride / d, and factor = 1, advance = -dilation / d:
              a program works on one phase, and no tap is multiplied by nothing

The scale enters where its axis lies, as in `linear.py`: `one_pass` takes the norms in the loop
(every tap of an output channel passes through it), `epilogue` scales the accumulator, `prologue_r`
the tile of `V` along input channels or taps, `prologue_o` along outputs for a `V` that would leave
the product's range; `packed` finds `W` ready, in the product's dtype and with channels last.
`direct_kernel` serves groups of few channels, depthwise convolutions above all, without `tl.dot`.

The contiguous axis of every activation is its channels: other layouts are repacked first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call import Geometry
from . import configs
from .common import as_norm, cast, dot, offsets
from .configs import Target
from .launch import Launcher, allocator, is_wide, product_types
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
    with_channels_last,
)

# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def _phase(index, taps, stride, padding, dilation, common, inverse):
    """`base`, `first` and the number of taps of one phase along one dimension."""
    at = index + padding
    step = stride // common
    # t · dilation ≡ at (mod stride), by the inverse of dilation / common modulo step
    first = (at // common * inverse) % step
    count = tl.where(at % common == 0, (taps - first + step - 1) // step, 0)
    return (at - first * dilation) // stride, first, count


@triton.jit
def walk_of(phase, taps, stride, padding, dilation, common, inverse, PHASED: tl.constexpr):
    """`(phase, factor, base, advance, first, step, count)`, each for three dimensions."""
    if PHASED:
        w = phase % stride[2]
        h = phase // stride[2] % stride[1]
        d = phase // stride[2] // stride[1]
        bd, fd, nd = _phase(d, taps[0], stride[0], padding[0], dilation[0], common[0], inverse[0])
        bh, fh, nh = _phase(h, taps[1], stride[1], padding[1], dilation[1], common[1], inverse[1])
        bw, fw, nw = _phase(w, taps[2], stride[2], padding[2], dilation[2], common[2], inverse[2])
        advance = (
            -(dilation[0] // common[0]),
            -(dilation[1] // common[1]),
            -(dilation[2] // common[2]),
        )
        step = (stride[0] // common[0], stride[1] // common[1], stride[2] // common[2])
        return (d, h, w), (1, 1, 1), (bd, bh, bw), advance, (fd, fh, fw), step, (nd, nh, nw)
    else:
        base = (-padding[0], -padding[1], -padding[2])
        return (0, 0, 0), stride, base, dilation, (0, 0, 0), (1, 1, 1), taps


@triton.jit
def tap_of(j, first, step):
    """The tap that is number `j` of a phase."""
    return (first[0] + j[0] * step[0], first[1] + j[1] * step[1], first[2] + j[2] * step[2])


@triton.jit
def output_offsets(q, phase, stride, sizes, stride_c, PHASED: tl.constexpr):
    """Offsets of the output pixels, and whether they exist: the last of a phase may not."""
    if PHASED:
        d = q[0] * stride[0] + phase[0]
        h = q[1] * stride[1] + phase[1]
        w = q[2] * stride[2] + phase[2]
        exists = (d < sizes[0]) & (h < sizes[1]) & (w < sizes[2])
    else:
        d, h, w = q
        exists = w < sizes[2]
    return pixel_offset((d, h, w), stride_c), exists


@triton.jit
def conv_kernel(
    A,
    V,
    G,
    NORM,
    BIAS,
    C,
    M,
    O,
    R,
    sizes_m,
    sizes_a,
    sizes_c,
    taps,
    stride,
    padding,
    dilation,
    common,
    inverse,
    stride_a,
    stride_c,
    stride_v,
    stride_s,
    FORM: tl.constexpr,
    PHASED: tl.constexpr,
    FLAT: tl.constexpr,
    EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """C = A Wᵀ + bias over the taps of each pixel; M pixels a phase, O and R channels a group.

    `stride_v` and `stride_s` are those of (group, o, r, *taps); FLAT as in `block_of_taps`.
    """
    pid = tl.program_id(0)
    group = tl.program_id(2)
    # Programs in groups of GROUP pixel tiles, so that tiles of V are reused while in cache.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_o = tl.cdiv(O, BLOCK_O)
    block = pid // (GROUP * tiles_o)
    block_size = min(tiles_m - block * GROUP, GROUP)
    tile_m = block * GROUP + (pid % (GROUP * tiles_o)) % block_size
    tile_o = (pid % (GROUP * tiles_o)) // block_size

    phase, factor, base, advance, first, step, count = walk_of(
        tl.program_id(1), taps, stride, padding, dilation, common, inverse, PHASED
    )
    offs_m = offsets(tile_m, BLOCK_M, WIDE)
    offs_o = offsets(tile_o, BLOCK_O, WIDE)
    mask_m = offs_m < M
    mask_o = offs_o < O
    b, q = split_pixels(offs_m, sizes_m)
    q_rows = as_rows(q)
    A += group.to(tl.int64) * R * stride_a[1]
    V += group.to(tl.int64) * stride_v[0]
    s_o = group * stride_s[0] + offs_o * stride_s[1]

    norm_type = NORM.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    squares = tl.zeros((BLOCK_O, BLOCK_R // 8), norm_type)
    if FORM == "prologue_o":
        n = tl.load(NORM + s_o, mask=mask_o, other=1.0)
        scale_o = tl.load(G + s_o, mask=mask_o, other=0.0).to(norm_type) / n

    total = count[0] * count[1] * count[2]
    steps = tl.cdiv(total * R, BLOCK_R) if FLAT else total * tl.cdiv(R, BLOCK_R)
    for i in range(steps):
        j, offs_r, mask_r = block_of_taps(i, count, R, FLAT, WIDE, BLOCK_R)
        t = tap_of(j, first, step)
        pixels, inside = gathered(q_rows, j, factor, base, advance, sizes_a, stride_a)
        a_at = A + b[:, None] * stride_a[0] + pixels + offs_r[None, :] * stride_a[1]
        a = tl.load(a_at, mask=mask_m[:, None] & inside & mask_r[None, :], other=0.0)
        v_at = V + offs_o[:, None] * stride_v[1] + offs_r[None, :] * stride_v[2]
        v_at += tap_offset(t, stride_v)
        v = tl.load(v_at, mask=mask_o[:, None] & mask_r[None, :], other=0.0)
        if FORM == "one_pass":
            wide = v.to(norm_type)
            squares += tl.sum(tl.reshape(wide * wide, (BLOCK_O, BLOCK_R // 8, 8)), axis=2)
        if FORM == "prologue_o":
            v = v.to(norm_type) * scale_o[:, None]
        if FORM == "prologue_r":
            s_at = group * stride_s[0] + offs_r[None, :] * stride_s[2]
            s_at += tap_offset(t, stride_s)
            n = tl.load(NORM + s_at, mask=mask_r[None, :], other=1.0)
            g = tl.load(G + s_at, mask=mask_r[None, :], other=0.0).to(norm_type)
            v = v.to(norm_type) * (g / n)
        acc = dot(a, tl.trans(cast(v, a.dtype)), acc, PRECISION)

    if FORM == "one_pass":
        n = as_norm(tl.sum(squares, axis=1), EPS)
        tl.store(NORM + s_o, n, mask=mask_o & (tile_m == 0))
    if FORM == "epilogue":
        n = tl.load(NORM + s_o, mask=mask_o, other=1.0)
    if FORM == "one_pass" or FORM == "epilogue":
        g = tl.load(G + s_o, mask=mask_o, other=0.0).to(norm_type)
        acc *= (g / n).to(ACC)[None, :]
    if HAS_BIAS:
        acc += tl.load(BIAS + group * O + offs_o, mask=mask_o, other=0.0).to(ACC)[None, :]
    pixels, exists = output_offsets(q, phase, stride, sizes_c, stride_c, PHASED)
    C += group.to(tl.int64) * O * stride_c[1]
    c_at = C + (b * stride_c[0] + pixels)[:, None] + offs_o[None, :] * stride_c[1]
    tl.store(c_at, acc, mask=(mask_m & exists)[:, None] & mask_o[None, :])


@triton.jit
def direct_kernel(
    A,
    V,
    G,
    NORM,
    BIAS,
    C,
    M,
    GROUPS,
    O,
    R,
    sizes_m,
    sizes_a,
    sizes_c,
    taps,
    stride,
    padding,
    dilation,
    common,
    inverse,
    stride_a,
    stride_c,
    stride_v,
    stride_s,
    FORM: tl.constexpr,
    PHASED: tl.constexpr,
    EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """As `conv_kernel`, for O and R of a few channels: a tile spans the outputs of many groups,
    and each takes its R inputs one after the other. FORM is `one_pass`, `scaled` or `packed`."""
    phase, factor, base, advance, first, step, count = walk_of(
        tl.program_id(1), taps, stride, padding, dilation, common, inverse, PHASED
    )
    offs_m = offsets(tl.program_id(0), BLOCK_M, WIDE)
    offs_o = offsets(tl.program_id(2), BLOCK_O, WIDE)
    mask_m = offs_m < M
    mask_o = offs_o < GROUPS * O
    group = offs_o // O
    own = offs_o % O
    b, q = split_pixels(offs_m, sizes_m)
    q_rows = as_rows(q)
    a_at = A + b[:, None] * stride_a[0] + (group * R)[None, :] * stride_a[1]
    v_at = V + group * stride_v[0] + own * stride_v[1]
    s_o = group * stride_s[0] + own * stride_s[1]

    norm_type = NORM.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    squares = tl.zeros((BLOCK_O,), norm_type)
    for i in range(count[0] * count[1] * count[2] * R):
        r = i % R
        j = split_taps(i // R, count)
        t = tap_of(j, first, step)
        pixels, inside = gathered(q_rows, j, factor, base, advance, sizes_a, stride_a)
        mask = mask_m[:, None] & inside & mask_o[None, :]
        a = tl.load(a_at + pixels + r * stride_a[1], mask=mask, other=0.0)
        at = r * stride_v[2] + tap_offset(t, stride_v)
        v = tl.load(v_at + at, mask=mask_o, other=0.0).to(norm_type)
        if FORM == "one_pass":
            squares += v * v
        if FORM == "scaled":
            at = s_o + r * stride_s[2] + tap_offset(t, stride_s)
            n = tl.load(NORM + at, mask=mask_o, other=1.0)
            v *= tl.load(G + at, mask=mask_o, other=0.0).to(norm_type) / n
        acc += a.to(ACC) * v.to(ACC)[None, :]

    if FORM == "one_pass":
        n = as_norm(squares, EPS)
        tl.store(NORM + s_o, n, mask=mask_o & (tl.program_id(0) == 0))
        acc *= (tl.load(G + s_o, mask=mask_o, other=0.0).to(norm_type) / n).to(ACC)[None, :]
    if HAS_BIAS:
        acc += tl.load(BIAS + offs_o, mask=mask_o, other=0.0).to(ACC)[None, :]
    pixels, exists = output_offsets(q, phase, stride, sizes_c, stride_c, PHASED)
    c_at = C + (b * stride_c[0] + pixels)[:, None] + offs_o[None, :] * stride_c[1]
    tl.store(c_at, acc, mask=(mask_m & exists)[:, None] & mask_o[None, :])


# --- launchers ---------------------------------------------------------------------------------


def prepare_product(
    target: Target,
    a: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    conv: Geometry,
    phased: bool,
    dim: int | None,
    form: str,
    eps: float,
    tf32: bool,
    config: configs.MatmulConfig | configs.DirectConfig | None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """`run(a, v, g, n, bias)` returns `C`, of spatial `sizes` and channels last, from `A`, `V` and
    its scale along `dim`."""
    repack = repacker(a)
    a = channels_last(a)
    groups = conv.groups
    k, c = v.shape[0] // groups, v.shape[1]
    o, r = (c, k) if phased else (k, c)
    out = with_channels_last(len(a), groups * o, sizes, a.dtype)
    sizes_m = three(sizes)
    stride = three(conv.stride)
    phases = math.prod(stride) if phased else 1
    if phased:
        sizes_m = tuple(triton.cdiv(n, s) for n, s in zip(sizes_m, stride, strict=True))
    m = len(a) * math.prod(sizes_m)
    dilation = three(conv.dilation)
    common = tuple(math.gcd(s, d) for s, d in zip(stride, dilation, strict=True))
    steps = zip(dilation, stride, common, strict=True)
    constants: dict[str, Any] = {
        "M": m,
        "O": o,
        "R": r,
        "sizes_m": sizes_m,
        "sizes_a": three(a.shape[2:]),
        "sizes_c": three(sizes),
        "taps": three(v.shape[2:]),
        "stride": stride,
        "padding": three(conv.padding, 0),
        "dilation": dilation,
        "common": common,
        "inverse": tuple(pow(d // c, -1, s // c) for d, s, c in steps),
        "stride_a": activation_strides(a),
        "stride_c": activation_strides(out),
        "stride_v": weight_strides(v, k, phased),
        "stride_s": _scale_strides(v, k, phased, dim),
        "PHASED": phased,
        "EPS": eps,
        "HAS_BIAS": bias is not None,
        "WIDE": is_wide(a, v, out),
    }
    types = product_types(a, tf32)
    if is_direct(conv, v.shape):
        if config is None:
            config = configs.direct(a.element_size())
        assert isinstance(config, configs.DirectConfig)
        constants |= {
            "GROUPS": groups,
            "FORM": form if form in ("one_pass", "packed") else "scaled",
            "ACC": types["ACC"],
            **config._asdict(),
        }
        tiles_o = triton.cdiv(groups * o, config.BLOCK_O)
        grid = triton.cdiv(m, config.BLOCK_M), phases, tiles_o
        launch = Launcher(direct_kernel, target, grid, **constants)
    else:
        if config is None:
            size = max(a.element_size(), v.element_size())
            ieee = a.dtype == torch.float32 and not tf32
            config = configs.conv(m, o, r, size, form, ieee, target)
        assert isinstance(config, configs.MatmulConfig)
        constants |= {"FORM": form, "FLAT": r < 16, "GROUP": 8, **types, **config._asdict()}
        tiles = triton.cdiv(m, config.BLOCK_M) * triton.cdiv(o, config.BLOCK_O)
        launch = Launcher(conv_kernel, target, (tiles, phases, groups), **constants)
    new_out = allocator(out)

    def run(a: Tensor, v: Tensor, g: Tensor, n: Tensor, bias: Tensor | None) -> Tensor:
        a = repack(a)
        c = new_out(a)
        launch(a, v, g, n, c if bias is None else bias.contiguous(), c)
        return c

    return run


def is_direct(conv: Geometry, v_shape: Sequence[int]) -> bool:
    """Whether the groups are too small for `tl.dot`, whose sides are 16 at least."""
    return conv.groups > 1 and max(v_shape[0] // conv.groups, v_shape[1]) < 16


def _scale_strides(v: Tensor, k: int, phased: bool, dim: int | None) -> tuple[int, ...]:
    """Of (group, o, r, *taps), of which the scale has one axis: its own."""
    strides = [0] * v.ndim
    if dim is not None:
        strides[dim] = 1
    first, second, *taps = strides
    pair = (second, first) if phased else (first, second)
    return (k * first, *pair, *three(taps, 0))
