"""Pixels and taps: how the kernels of a convolution find their elements.

Every activation is `(B, C, *sizes)` with its channels contiguous, and has three spatial
dimensions: those that a lower rank lacks have size 1, which folds away when a kernel is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import multiple, offsets
from .launch import unallocated, unit

# --- in a kernel -------------------------------------------------------------------------------


@triton.jit
def split_pixels(m, sizes):
    """Pixel index `m` as its batch and its three positions in a grid of `sizes`."""
    w = m % sizes[2]
    m = m // sizes[2]
    h = m % sizes[1]
    m = m // sizes[1]
    return m // sizes[0], (m % sizes[0], h, w)


@triton.jit
def split_taps(tap, sizes):
    """Tap index as its three positions in a kernel of `sizes`."""
    rest = tap // sizes[2]
    return (rest // sizes[1], rest % sizes[1], tap % sizes[2])


@triton.jit
def block_of_taps(block, taps, R, FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr):
    """Positions of the tap, channels, and which of them exist, of a block along the reduced axis.

    A block is BLOCK_R channels under one tap; FLAT walks taps and channels as one axis, for
    channels too few to fill a block, and each of them has a tap of its own.
    """
    if FLAT:
        flat = offsets(block, BLOCK_R, WIDE)
        tap = flat // R
        offs_r = flat % R
        exists = flat < taps[0] * taps[1] * taps[2] * R
    else:
        blocks = tl.cdiv(R, BLOCK_R)
        tap = block // blocks
        offs_r = offsets(block % blocks, BLOCK_R, WIDE)
        exists = offs_r < R
    return split_taps(tap, taps), offs_r, exists


@triton.jit
def as_rows(q):
    """Positions, to broadcast over columns."""
    return (q[0][:, None], q[1][:, None], q[2][:, None])


@triton.jit
def as_columns(j):
    """Positions, to broadcast over rows."""
    return (j[0][None, :], j[1][None, :], j[2][None, :])


@triton.jit
def in_units(stride, UNIT: tl.constexpr):
    """The strides of an activation whose channels are contiguous; the others are multiples of
    UNIT."""
    d, h, w = multiple(stride[2], UNIT), multiple(stride[3], UNIT), multiple(stride[4], UNIT)
    return (multiple(stride[0], UNIT), stride[1], d, h, w)


@triton.jit
def weight_in_units(stride, UNIT: tl.constexpr, PHASED: tl.constexpr):
    """The strides of a packed weight whose innermost channels, those of (group, o, r, *taps) that
    are o if PHASED and r if not, are a multiple of UNIT."""
    o, r = stride[1], stride[2]
    if PHASED:
        r = multiple(r, UNIT)
    else:
        o = multiple(o, UNIT)
    d, h, w = multiple(stride[3], UNIT), multiple(stride[4], UNIT), multiple(stride[5], UNIT)
    return (multiple(stride[0], UNIT), o, r, d, h, w)


@triton.jit
def pixel_offset(q, stride):
    """Offset of pixels in an activation; `stride` is that of (batch, channel, *sizes)."""
    return q[0] * stride[2] + q[1] * stride[3] + q[2] * stride[4]


@triton.jit
def tap_offset(t, stride):
    """Offset of taps in a weight or in a scale; `stride` is that of (group, o, r, *taps)."""
    return t[0] * stride[3] + t[1] * stride[4] + t[2] * stride[5]


@triton.jit
def gathered(q, j, factor, base, advance, sizes, stride):
    """Offsets of `q · factor + base + j · advance` in an activation, and whether that is inside."""
    d = q[0] * factor[0] + base[0] + j[0] * advance[0]
    h = q[1] * factor[1] + base[1] + j[1] * advance[1]
    w = q[2] * factor[2] + base[2] + j[2] * advance[2]
    inside = (d >= 0) & (d < sizes[0]) & (h >= 0) & (h < sizes[1]) & (w >= 0) & (w < sizes[2])
    return pixel_offset((d, h, w), stride), inside


# --- on the host -------------------------------------------------------------------------------


def three(values: Sequence[int], fill: int = 1) -> tuple[int, ...]:
    """Of three spatial dimensions; those that are missing come first."""
    return (fill,) * (3 - len(values)) + tuple(values)


def with_channels_last(
    batch: int, channels: int, sizes: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The layout of `(batch, channels, *sizes)` with its channels contiguous."""
    return unallocated((batch, *sizes, channels), dtype).movedim(-1, 1)


def channels_last(x: Tensor) -> Tensor:
    """The layout of `x` with its channels contiguous: its own if they are, or that of a copy."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return with_channels_last(x.shape[0], x.shape[1], x.shape[2:], x.dtype)


def activation_strides(x: Tensor) -> tuple[int, ...]:
    """Of (batch, channel, *sizes)."""
    return (x.stride(0), x.stride(1), *three(x.stride()[2:], 0))


def activation_unit(x: Tensor) -> int:
    """The unit of `in_units`."""
    return unit(x.stride(0), *x.stride()[2:])


def weight_strides(v: Tensor, k: int, phased: bool = False) -> tuple[int, ...]:
    """Of (group, o, r, *taps), `k` rows a group; o and r change places in a phased product."""
    first, second, *taps = v.stride()
    pair = (second, first) if phased else (first, second)
    return (k * first, *pair, *three(taps, 0))
