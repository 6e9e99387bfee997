"""The pinned configurations: one per kernel, regime and vendor, no search.

Blocks are powers of two and at least 16 wherever a side meets `tl.dot`. How each regime's numbers
came about is in docs/performance.md; `make codegen` compiles them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class SliceConfig(NamedTuple):
    """A tile of `BLOCK_N` slices by `BLOCK_R` reduced elements."""

    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int = 2


class MatmulConfig(NamedTuple):
    """A tile of `BLOCK_M` rows by `BLOCK_O` outputs, walked in steps of `BLOCK_R`."""

    BLOCK_M: int
    BLOCK_O: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


class GradConfig(NamedTuple):
    """A `(BLOCK_O, BLOCK_R)` tile of `dW`, summed over the batch in steps of `BLOCK_M`."""

    BLOCK_M: int
    BLOCK_O: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


class DirectConfig(NamedTuple):
    """A tile of `BLOCK_M` pixels by `BLOCK_O` channels, without `tl.dot`."""

    BLOCK_M: int
    BLOCK_O: int
    num_warps: int
    num_stages: int


def _up_to(size: int, *blocks: int) -> int:
    """The smallest block that covers `size`, or the largest."""
    return next((b for b in blocks if size <= b), blocks[-1])


def slices(n: int, r: int, n_is_fast: bool) -> SliceConfig:
    """Wide along the axis that memory is contiguous in: `n` (a kept last dimension) or `r`."""
    if n == 1:
        return SliceConfig(1, 4096, 4)
    if n_is_fast or r <= 16:
        return SliceConfig(128, 16, 4)
    return SliceConfig(8, 128, 4) if r <= 128 else SliceConfig(4, 1024, 4)


def finish(itemsize: int) -> SliceConfig:
    """The second stage of a split reduction: partial sums of several slices, 128 splits a step."""
    return SliceConfig(16 if itemsize == 8 else 32, 128, 4, 1)


_vendor = "hip" if torch.version.hip else "cuda"


@contextmanager
def vendor(name: str) -> Iterator[None]:
    """Configurations for another vendor's GPUs, "cuda" or "hip", than those of this torch."""
    global _vendor
    before, _vendor = _vendor, name
    try:
        yield
    finally:
        _vendor = before


def _stages(wanted: int) -> int:
    """An AMD compute unit has 64 KiB of shared memory: two stages, never more."""
    return min(wanted, 2) if _vendor == "hip" else wanted


def one_pass(m: int, o: int, itemsize: int) -> MatmulConfig:
    """A single row tile over the batch: bound by the bytes of `V`, so deep in flight and narrow
    enough in `O` to occupy the machine. `itemsize` is the wider one of x's and V's."""
    block_m = _up_to(m, 16, 32, 64) if itemsize == 2 else _up_to(m, 16, 32)
    block_o = 32 if o <= 8192 else 64
    return MatmulConfig(block_m, block_o, 256 // itemsize, 4, _stages(4 if itemsize < 8 else 2))


def matmul(m: int, itemsize: int, prologue: bool, ieee: bool) -> MatmulConfig:
    """The scaled form, bound by the tensor cores as soon as the batch allows it.

    A tile of V that is scaled in the loop lives in registers meanwhile, and so does all of an IEEE
    float32 product: both take smaller tiles.
    """
    if itemsize == 8:
        return MatmulConfig(32, 32, 16, 4, 2)
    if ieee:
        return MatmulConfig(_up_to(m, 16, 32), 64, 16 if prologue else 32, 4, _stages(3))
    if m <= 64:
        return MatmulConfig(_up_to(m, 16, 32, 64), 64, 128 // itemsize, 4, _stages(3))
    if itemsize == 4:
        return MatmulConfig(64, 128, 32, 8, _stages(3))
    return MatmulConfig(128, 128, 64 if _vendor == "cuda" else 32, 8, _stages(3))


def grad_one_pass(m: int, itemsize: int) -> GradConfig:
    """The recompute form of `dV`: the whole batch in one tile, few rows a program."""
    if itemsize == 8:
        return GradConfig(_up_to(m, 16, 32), 16, 16, 4, 1)
    block_m = _up_to(m, 16, 32, 64) if itemsize == 2 else _up_to(m, 16, 32)
    block_r = 64 if itemsize == 4 and block_m == 32 else 128
    return GradConfig(block_m, 16, block_r, 4, 2)


def grad(itemsize: int) -> GradConfig:
    """The two-phase form of `dV`: a matmul over the batch."""
    if itemsize == 8:
        return GradConfig(16, 32, 32, 4, 2)
    if itemsize == 4:
        return GradConfig(32, 64, 128, 8, _stages(3))
    return GradConfig(64, 128, 128, 8, _stages(3))


def conv(m: int, o: int, r: int, itemsize: int, form: str, ieee: bool) -> MatmulConfig:
    """A product over `m` pixels, with `o` and `r` channels a group.

    A tile of A takes registers for its addresses besides: half the steps of a matmul's. A tile of
    V with taps innermost, and one that is scaled, pass through registers and take smaller tiles
    than a packed one.
    """
    block_o, block_r = _up_to(o, 16, 32, 64), _up_to(r, 16, 32)
    if itemsize == 8:
        return MatmulConfig(_up_to(m, 16, 32), 16, 16, 4, 2)
    if (
        ieee
    ):  # a wide load takes 16 bytes for each of the tile's threads, of which gfx942 has 64 a warp
        warps = 2 if _vendor == "hip" else 4
        return MatmulConfig(_up_to(m, 16, 32), min(block_o, 32), 16, warps, 2)
    large = 128 if form == "packed" and itemsize == 2 else 64
    return MatmulConfig(_up_to(m, 16, 32, 64, large), block_o, block_r, 4, _stages(3))


def conv_grad(o: int, r: int, itemsize: int) -> GradConfig:
    """The gradient of a convolution's weight: a product over pixels."""
    if itemsize == 8:
        return GradConfig(16, 16, 32, 4, 2)
    block_o = _up_to(o, 16, 32, 64)
    if r < 16:
        return GradConfig(32, block_o, 32, 4, 2)
    return GradConfig(64 if itemsize == 2 else 32, block_o, _up_to(r, 16, 32, 64), 4, 2)


def direct(itemsize: int) -> DirectConfig:
    """Groups of few channels, and the gradient of their weight: bound by activations' bytes."""
    return DirectConfig(32, 64 if itemsize == 2 else 32, 4, 2)
