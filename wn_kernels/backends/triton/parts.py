"""Sums that were split over programs: each left its part, and this adds them, in order.

OUT = Σ_p PARTS[p] (+ bias)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import offsets
from .configs import Target
from .launch import Launcher, acc_type, is_wide

# --- kernel ------------------------------------------------------------------------------------


@triton.jit
def sum_kernel(
    PARTS,
    BIAS,
    OUT,
    N,
    parts,
    channels,
    inner,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """N elements. The channel of the bias is that of `(*, channels, inner)`. A tile holds BLOCK_P
    parts, so that as many loads are in flight."""
    offs_n = offsets(tl.program_id(0), BLOCK_N, WIDE)
    mask_n = offs_n < N
    total = tl.zeros((BLOCK_N,), ACC)
    for first in range(0, parts, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        at = PARTS + offs_p[:, None].to(tl.int64) * N + offs_n[None, :]
        mask = (offs_p < parts)[:, None] & mask_n[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
    if HAS_BIAS:
        channel = offs_n // inner % channels
        total += tl.load(BIAS + channel, mask=mask_n, other=0.0).to(ACC)
    tl.store(OUT + offs_n, total, mask=mask_n)


# --- launcher ----------------------------------------------------------------------------------

# Parts and elements of a tile: few elements, so that small results have many programs.
BLOCK_P, BLOCK_N = 8, 128


def prepare_sum(target: Target, parts: Tensor, out: Tensor, bias: Tensor | None = None) -> Launcher:
    """A launch with `(parts, bias, out)`: `(P, N)` parts of a dense `out` of N elements, whose
    second dimension is the bias's. Without a bias any tensor takes its place."""
    return Launcher(
        sum_kernel,
        target,
        (triton.cdiv(out.numel(), BLOCK_N),),
        N=out.numel(),
        parts=len(parts),
        channels=out.shape[1] if bias is not None else 1,
        inner=out.stride(1) if bias is not None else 1,
        HAS_BIAS=bias is not None,
        WIDE=is_wide(out),
        ACC=acc_type(parts),
        BLOCK_P=BLOCK_P,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        num_stages=1,
    )
