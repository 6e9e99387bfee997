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

`W` is packed: in the product's dtype, and with channels innermost (`weight.packed`). Where programs
are few, `conv_kernel` splits its reduction over several, each of which leaves its part of `C`, and
`sum_kernel` adds the parts in order. `direct_kernel` serves groups of few channels, depthwise
convolutions above all, without `tl.dot`; it can also take `V` itself, with the norms in its loop.

The contiguous axis of every activation is its channels: other layouts are repacked first.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call import Geometry, Norm, scale_dtype
from . import configs
from .common import as_norm, dot, merged, multiple, offsets, partial_of
from .configs import Target
from .launch import Launcher, acc_type, is_wide, product_types, unallocated, unit
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
def next_block(r, j, blocks, count):
    """The block of channels and the tap after block `r` under tap `j`."""
    r += 1
    d, h, w = j
    w += r == blocks
    r = tl.where(r == blocks, 0, r)
    h += w == count[2]
    w = tl.where(w == count[2], 0, w)
    d += h == count[1]
    h = tl.where(h == count[1], 0, h)
    return r, (d, h, w)


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
    W,
    BIAS,
    C,
    M,
    O,
    R,
    splits,
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
    stride_w,
    stride_part,
    PHASED: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UNITS: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """C = A Wᵀ + bias over the taps of each pixel; M pixels a phase, O and R channels a group.

    C[part] is the sum over one of `splits` parts of the steps. `stride_w` is that of
    (group, o, r, *taps). FLAT walks taps and channels as one axis, for channels too few to fill a
    block. UNITS are those of A's strides, of O and of R (`common.multiple`). LANES: each r of a
    tile has sums of its own until the loop is over, as in `one_pass_kernel`. It is for tiles of W
    whose contiguous axis is r, since others would be turned in shared memory.
    """
    stride_a = in_units(stride_a, UNITS[0])
    O = multiple(O, UNITS[1])
    R = multiple(R, UNITS[2])
    stride_w = weight_in_units(stride_w, UNITS[1] if PHASED else UNITS[2], PHASED=PHASED)
    pid = tl.program_id(0)
    part = tl.program_id(1) % splits
    group = tl.program_id(2)
    # Programs in groups of GROUP pixel tiles, so that tiles of W are reused while in cache.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_o = tl.cdiv(O, BLOCK_O)
    block = pid // (GROUP * tiles_o)
    block_size = min(tiles_m - block * GROUP, GROUP)
    tile_m = block * GROUP + (pid % (GROUP * tiles_o)) % block_size
    tile_o = (pid % (GROUP * tiles_o)) // block_size

    phase, factor, base, advance, first, step, count = walk_of(
        tl.program_id(1) // splits, taps, stride, padding, dilation, common, inverse, PHASED=PHASED
    )
    offs_m = offsets(tile_m, BLOCK_M, WIDE)
    offs_o = offsets(tile_o, BLOCK_O, WIDE)
    offs_r = offsets(0, BLOCK_R, WIDE)
    mask_m = offs_m < M
    mask_o = offs_o < O
    b, q = split_pixels(offs_m, sizes_m)
    q_rows = as_rows(q)
    a_rows = A + group.to(tl.int64) * R * stride_a[1] + b[:, None] * stride_a[0]
    W += group.to(tl.int64) * stride_w[0]

    blocks = tl.cdiv(R, BLOCK_R)
    total = count[0] * count[1] * count[2]
    steps = tl.cdiv(total * R, BLOCK_R) if FLAT else total * blocks
    own = tl.cdiv(steps, splits)
    begin = part * own
    r = begin % blocks
    # A phase may have no taps at all.
    j = split_taps(begin // blocks, (count[0], tl.maximum(count[1], 1), tl.maximum(count[2], 1)))
    acc = tl.zeros((BLOCK_M, BLOCK_O, BLOCK_R) if LANES else (BLOCK_M, BLOCK_O), ACC)
    for i in tl.range(begin, min(begin + own, steps), num_stages=STAGES):
        if FLAT:
            taps_of, at_r, mask_r = block_of_taps(i, count, R, FLAT, WIDE, BLOCK_R)
            a_j = as_columns(taps_of)
            w_j = as_rows(taps_of) if PHASED else a_j
        else:
            at_r = r * BLOCK_R + offs_r
            mask_r = at_r < R
            a_j = j
            w_j = j
        pixels, inside = gathered(q_rows, a_j, factor, base, advance, sizes_a, stride_a)
        a_at = a_rows + pixels + at_r[None, :] * stride_a[1]
        a = tl.load(a_at, mask=mask_m[:, None] & inside & mask_r[None, :], other=0.0)
        # The contiguous axis of a tile of W is its second one: of outputs with phases, else of r.
        w_at = W + tap_offset(tap_of(w_j, first, step), stride_w)
        if PHASED:
            w_at += at_r[:, None] * stride_w[2] + offs_o[None, :] * stride_w[1]
            w = tl.load(w_at, mask=mask_r[:, None] & mask_o[None, :], other=0.0)
        else:
            w_at += offs_o[:, None] * stride_w[1] + at_r[None, :] * stride_w[2]
            w = tl.load(w_at, mask=mask_o[:, None] & mask_r[None, :], other=0.0)
        if LANES:
            acc += a[:, None, :] * w[None, :, :]
        else:
            acc = dot(a, w if PHASED else tl.trans(w), acc, PRECISION)
        if not FLAT:
            # The next block, or the first one under the next tap. Divisions would take longer than
            # the product does.
            r, j = next_block(r, j, blocks, count)
    if LANES:
        acc = tl.sum(acc, axis=2)

    if HAS_BIAS:
        acc += tl.load(BIAS + group * O + offs_o, mask=mask_o, other=0.0).to(ACC)[None, :]
    pixels, exists = output_offsets(q, phase, stride, sizes_c, stride_c, PHASED)
    C += part.to(tl.int64) * stride_part + group.to(tl.int64) * O * stride_c[1]
    c_at = C + (b * stride_c[0] + pixels)[:, None] + offs_o[None, :] * stride_c[1]
    tl.store(c_at, acc, mask=(mask_m & exists)[:, None] & mask_o[None, :])


@triton.jit
def direct_kernel(
    A,
    W,
    G,
    NORMS,
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
    stride_w,
    FORM: tl.constexpr,
    PHASED: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """As `conv_kernel`, for O and R of a few channels: a tile spans the outputs of many groups,
    and each takes its R inputs one after the other. FORM `one_pass` is given `V` as W, takes the
    norms of the output channels in its loop and stores them; `packed` uses neither G nor NORMS."""
    phase, factor, base, advance, first, step, count = walk_of(
        tl.program_id(1), taps, stride, padding, dilation, common, inverse, PHASED=PHASED
    )
    offs_m = offsets(tl.program_id(0), BLOCK_M, WIDE)
    offs_o = offsets(tl.program_id(2), BLOCK_O, WIDE)
    mask_m = offs_m < M
    mask_o = offs_o < GROUPS * O
    group = offs_o // O
    b, q = split_pixels(offs_m, sizes_m)
    q_rows = as_rows(q)
    a_at = A + b[:, None] * stride_a[0] + (group * R)[None, :] * stride_a[1]
    w_at = W + group * stride_w[0] + (offs_o % O) * stride_w[1]

    norm_type = NORMS.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_O), ACC)
    partials = tl.zeros((BLOCK_O,), norm_type)
    for i in range(count[0] * count[1] * count[2] * R):
        r = i % R
        j = split_taps(i // R, count)
        t = tap_of(j, first, step)
        pixels, inside = gathered(q_rows, j, factor, base, advance, sizes_a, stride_a)
        mask = mask_m[:, None] & inside & mask_o[None, :]
        a = tl.load(a_at + pixels + r * stride_a[1], mask=mask, other=0.0)
        w = tl.load(w_at + r * stride_w[2] + tap_offset(t, stride_w), mask=mask_o, other=0.0)
        w = w.to(norm_type)
        if FORM == "one_pass":
            partials = merged(partials, partial_of(w, NORM), NORM)
        acc += a.to(ACC) * w.to(ACC)[None, :]

    if FORM == "one_pass":
        n = as_norm(partials, EPS, NORM)
        tl.store(NORMS + offs_o, n, mask=mask_o & (tl.program_id(0) == 0))
        acc *= (tl.load(G + offs_o, mask=mask_o, other=0.0).to(norm_type) / n).to(ACC)[None, :]
    if HAS_BIAS:
        acc += tl.load(BIAS + offs_o, mask=mask_o, other=0.0).to(ACC)[None, :]
    pixels, exists = output_offsets(q, phase, stride, sizes_c, stride_c, PHASED)
    c_at = C + (b * stride_c[0] + pixels)[:, None] + offs_o[None, :] * stride_c[1]
    tl.store(c_at, acc, mask=(mask_m & exists)[:, None] & mask_o[None, :])


# --- launchers ---------------------------------------------------------------------------------


def prepare_product(
    target: Target,
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    conv: Geometry,
    phased: bool,
    tf32: bool,
    config: configs.SplitConfig | configs.DirectConfig | None = None,
) -> Pass:
    """`run(a, w, bias)` returns `(C,)`, laid out as `out`, from an `A` with its channels contiguous
    and a packed `W`."""
    run = Pass("a", "w", "bias")
    run.new(c=out)
    given_bias = "c" if bias is None else "bias"
    if conv.has_small_groups(w.shape):
        direct = _prepare_direct(target, a, w, bias, out, conv, phased, "packed", config=config)
        run.call(direct, "a", "w", "w", "w", given_bias, "c")
        return run.returning("c")
    m, sizes, phases = _pixels(out, conv, phased)
    o, r = (w.shape[0] // conv.groups, w.shape[1])[:: -1 if phased else 1]
    ieee = a.dtype == torch.float32 and not tf32
    if config is None:
        # Without phases a program walks every tap, with them its share.
        walked = math.prod(w.shape[2:]) / phases
        rest = phases * conv.groups
        config = configs.conv(m, o, r, walked, rest, a.element_size(), ieee, target)
    assert isinstance(config, configs.SplitConfig)
    lanes = not phased and configs.has_lanes(a.element_size(), ieee, target)
    splits = config.splits
    tiles = triton.cdiv(m, config.BLOCK_M) * triton.cdiv(o, config.BLOCK_O)
    types = product_types(a, tf32)
    parts, stride_part = out, 0
    if splits > 1:
        parts = unallocated((splits, out.numel()), scale_dtype(a))
        stride_part = out.numel()
        run.new(parts=parts)
    launch = Launcher(
        conv_kernel,
        target,
        (tiles, phases * splits, conv.groups),
        O=o,
        R=r,
        splits=splits,
        **_geometry(a, w, out, conv, phased, m, sizes),
        stride_part=stride_part,
        FLAT=r < 16 or triton.next_power_of_2(r) < config.BLOCK_R,
        HAS_BIAS=bias is not None and splits == 1,
        WIDE=is_wide(a, w, out),
        UNITS=(activation_unit(a), unit(o), unit(r)),
        LANES=lanes,
        STAGES=config.num_stages if lanes else None,
        GROUP=8,
        **types,
        **config.of_kernel(),
    )
    if splits == 1:
        run.call(launch, "a", "w", given_bias, "c")
        return run.returning("c")
    run.call(launch, "a", "w", "parts", "parts")
    run.call(prepare_sum(target, parts, out, bias), "parts", given_bias, "c", "c")
    return run.returning("c")


def prepare_one_pass(
    target: Target,
    a: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    conv: Geometry,
    eps: float,
    norm: Norm,
    config: configs.DirectConfig | None = None,
) -> Pass:
    """`run(a, v, g, bias)` returns `(C, n)` from `V` itself, for groups of few channels each of
    whose outputs owns a slice."""
    run = Pass("a", "v", "g", "bias")
    run.new(c=out, n=unallocated((v.shape[0], *[1] * (v.ndim - 1)), scale_dtype(v)))
    options = "one_pass", eps, norm, config
    launch = _prepare_direct(target, a, v, bias, out, conv, False, *options)
    run.call(launch, "a", "v", "g", "n", "c" if bias is None else "bias", "c")
    return run.returning("c", "n")


def _prepare_direct(
    target: Target,
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    conv: Geometry,
    phased: bool,
    form: str,
    eps: float = 0.0,
    norm: Norm = "l2",
    config: configs.SplitConfig | configs.DirectConfig | None = None,
) -> Launcher:
    """A launch with `(a, w, g, n, bias, c)`."""
    config = config or configs.direct(a.element_size())
    assert isinstance(config, configs.DirectConfig)
    m, sizes, phases = _pixels(out, conv, phased)
    o, r = (w.shape[0] // conv.groups, w.shape[1])[:: -1 if phased else 1]
    tiles_o = triton.cdiv(conv.groups * o, config.BLOCK_O)
    return Launcher(
        direct_kernel,
        target,
        (triton.cdiv(m, config.BLOCK_M), phases, tiles_o),
        GROUPS=conv.groups,
        O=o,
        R=r,
        **_geometry(a, w, out, conv, phased, m, sizes),
        FORM=form,
        EPS=eps,
        NORM=norm,
        HAS_BIAS=bias is not None,
        WIDE=is_wide(a, w, out),
        ACC=acc_type(a),
        **config._asdict(),
    )


def _pixels(out: Tensor, conv: Geometry, phased: bool) -> tuple[int, tuple[int, ...], int]:
    """The pixels of a phase, the sizes of the grid that they make up, and the number of phases."""
    sizes, stride = three(out.shape[2:]), three(conv.stride)
    if phased:
        sizes = tuple(triton.cdiv(n, s) for n, s in zip(sizes, stride, strict=True))
    return len(out) * math.prod(sizes), sizes, math.prod(stride) if phased else 1


def _geometry(
    a: Tensor, w: Tensor, out: Tensor, conv: Geometry, phased: bool, m: int, sizes_m: tuple
) -> dict[str, Any]:
    """What both kernels take of a geometry, and of the layouts."""
    stride, dilation = three(conv.stride), three(conv.dilation)
    common = tuple(math.gcd(s, d) for s, d in zip(stride, dilation, strict=True))
    steps = zip(dilation, stride, common, strict=True)
    return {
        "M": m,
        "sizes_m": sizes_m,
        "sizes_a": three(a.shape[2:]),
        "sizes_c": three(out.shape[2:]),
        "taps": three(w.shape[2:]),
        "stride": stride,
        "padding": three(conv.padding, 0),
        "dilation": dilation,
        "common": common,
        "inverse": tuple(pow(d // c, -1, s // c) for d, s, c in steps),
        "stride_a": activation_strides(a),
        "stride_c": activation_strides(out),
        "stride_w": weight_strides(w, w.shape[0] // conv.groups, phased),
        "PHASED": phased,
    }
