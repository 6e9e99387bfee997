"""Activations with their channels contiguous: a copy where they lie otherwise."""

from __future__ import annotations

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import offsets
from .configs import Target
from .launch import Launcher, is_wide
from .passes import Pass
from .pixels import channels_last

# --- kernel ------------------------------------------------------------------------------------


@triton.jit
def repack_kernel(
    X,
    OUT,
    C,
    P,
    stride_xb,
    stride_xc,
    stride_xp,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """OUT[b, p, c] = X[b, c, p], of P pixels and C channels."""
    offs_p = offsets(tl.program_id(0), BLOCK_P, WIDE)[:, None]
    offs_c = offsets(tl.program_id(1), BLOCK_C, WIDE)[None, :]
    b = tl.program_id(2).to(tl.int64)
    mask = (offs_p < P) & (offs_c < C)
    at = X + b * stride_xb + offs_p * stride_xp + offs_c * stride_xc
    x = tl.load(at, mask=mask, other=0.0)
    tl.store(OUT + (b * P + offs_p) * C + offs_c, x, mask=mask)


# --- launcher ----------------------------------------------------------------------------------

# A tile of pixels and channels, both of which are contiguous on one side.
BLOCK_P, BLOCK_C = 64, 32


def repack(run: Pass, target: Target, name: str, x: Tensor) -> tuple[str, Tensor]:
    """The tensor of a pass that is `x` with its channels contiguous, and its layout: `x` itself, by
    its `name`, or a copy, to which end steps are added."""
    packed = channels_last(x)
    if packed is x:
        return name, x
    copy = f"{name}, channels last"
    run.new(**{copy: packed})
    stride_p = _pixel_stride(x)
    if stride_p is None:
        run.call(_copy, copy, name)
        return copy, packed
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    grid = triton.cdiv(pixels, BLOCK_P), triton.cdiv(channels, BLOCK_C), len(x)
    launch = Launcher(
        repack_kernel,
        target,
        grid,
        C=channels,
        P=pixels,
        stride_xb=x.stride(0),
        stride_xc=x.stride(1),
        stride_xp=stride_p,
        WIDE=is_wide(x, packed),
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
        num_warps=4,
        num_stages=1,
    )
    run.call(launch, name, copy)
    return copy, packed


def _pixel_stride(x: Tensor) -> int | None:
    """The stride of pixels as one dimension; `None` where they are none, or too many images for a
    grid."""
    dims = [d for d in range(2, x.ndim) if x.shape[d] != 1]
    merges = all(x.stride(a) == x.shape[b] * x.stride(b) for a, b in itertools.pairwise(dims))
    if not merges or len(x) > 65535:
        return None
    return x.stride(dims[-1]) if dims else 1


def _copy(out: Tensor, x: Tensor) -> tuple[()]:
    torch.Tensor.copy_(out, x)
    return ()
