"""Sums that were split over programs: each left its part, and this adds them, in order.

OUT, REST = Σ_p PARTS[p] (+ bias)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import ADDED
from .common import offsets
from .configs import Target
from .launch import Launcher, acc_type, is_wide

# --- kernel ------------------------------------------------------------------------------------


@triton.jit
def sum_kernel(
    PARTS,
    BIAS,
    OUT,
    REST,
    N,
    M,
    parts,
    channels,
    inner,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """N elements of OUT, and M of REST behind them in each part. The channel of the bias is that of
    `(*, channels, inner)`. A tile holds BLOCK_P parts, so that as many loads are in flight."""
    offs_n = offsets(tl.program_id(0), BLOCK_N, WIDE)
    mask_n = offs_n < N + M
    total = tl.zeros((BLOCK_N,), ACC)
    for first in range(0, parts, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        at = PARTS + offs_p[:, None].to(tl.int64) * (N + M) + offs_n[None, :]
        mask = (offs_p < parts)[:, None] & mask_n[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
    if HAS_BIAS:
        channel = offs_n // inner % channels
        total += tl.load(BIAS + channel, mask=mask_n, other=0.0).to(ACC)
    tl.store(OUT + offs_n, total, mask=offs_n < N)
    tl.store(REST + offs_n - N, total, mask=(offs_n >= N) & mask_n)


# --- launcher ----------------------------------------------------------------------------------

# Up to so many parts, a thread adds all those of its elements: a wide load of each part. Otherwise
# threads share them. A tile has few elements, so that small results have many programs.
FEW = 8


def prepare_sum(
    target: Target,
    parts: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    rest: Tensor | None = None,
) -> Launcher:
    """A launch with `(parts, bias, out, rest)`: each of the P parts holds the N elements of a dense
    `out`, whose second dimension is the bias's, and behind them those of a dense `rest`. Any tensor
    takes the place of one that there is not."""
    count, size = parts.shape
    block_p = min(ADDED, triton.next_power_of_2(count))
    block_n, warps = (256, 2) if block_p <= FEW else (min(128, 2048 // block_p), 4)
    return Launcher(
        sum_kernel,
        target,
        (triton.cdiv(size, block_n),),
        N=out.numel(),
        M=0 if rest is None else rest.numel(),
        parts=count,
        channels=out.shape[1] if bias is not None else 1,
        inner=out.stride(1) if bias is not None else 1,
        HAS_BIAS=bias is not None,
        WIDE=is_wide(out),
        ACC=acc_type(parts),
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=1,
    )
