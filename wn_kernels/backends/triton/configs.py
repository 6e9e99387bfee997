"""The pinned configurations: one per kernel, regime and architecture, no search.

Blocks are powers of two and at least 16 wherever a side meets `tl.dot`. How each regime's numbers
came about is in docs/performance.md; `make codegen` compiles them all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .. import native, tiles

# Architectures whose hardware copies tiles, by tensor descriptors.
COPYING = ("cuda:90", "cuda:100")

# Programs that fill a GPU, or nearly: it has 108 to 148 multiprocessors.
PROGRAMS = 128


class Target(NamedTuple):
    """What configurations and grids depend on of the place where a kernel runs.

    Attributes:
        device: the index of the GPU; -1 for tensors that are on none.
        architecture: `"cuda:80"`, `"cuda:90"`, `"cuda:100"` or `"hip:gfx942"`; the consumer's
            Blackwell (capability 12) is `"cuda:120"`.
        multiprocessors: their number.
    """

    device: int
    architecture: str
    multiprocessors: int

    @property
    def is_amd(self) -> bool:
        return self.architecture.startswith("hip")

    def stages(self, wanted: int) -> int:
        """An AMD compute unit has 64 KiB of shared memory: two stages, never more."""
        return min(wanted, 2) if self.is_amd else wanted


_other: str | None = None


@contextmanager
def architecture(name: str) -> Iterator[None]:
    """Configurations for another architecture than that of the tensors' GPU, inside the block."""
    global _other
    before, _other = _other, name
    native.forget()
    try:
        yield
    finally:
        _other = before
        native.forget()


@functools.cache
def _target(device: int, other: str | None) -> Target:
    name, multiprocessors = "cuda:90", 132
    if device >= 0:
        properties = torch.cuda.get_device_properties(device)
        multiprocessors = properties.multi_processor_count
        name = "hip:gfx942" if torch.version.hip else f"cuda:{properties.major * 10}"
    return Target(device, other or name, multiprocessors)


def target(device: int) -> Target:
    """The target of tensors whose `get_device()` is `device`; an H100 for those on no GPU."""
    return _target(device, _other)


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


class ConvConfig(NamedTuple):
    """As `MatmulConfig`, for pixels and channels; `splits` programs share the steps of a tile."""

    BLOCK_M: int
    BLOCK_O: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    splits: int = 1


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


_up_to = tiles.up_to


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


def one_pass(m: int, o: int, itemsize: int, target: Target) -> MatmulConfig:
    """A single row tile over the batch: bound by the bytes of `V`, so deep in flight and narrow
    enough in `O` to occupy the machine. `itemsize` is the wider one of x's and V's.

    Blackwell's memory outruns its shared memory in a tile of 32 rows: in one of 64 its tensor cores
    read both factors themselves. With a program to a multiprocessor it takes more stages to have as
    many bytes in flight as the memory's latency is worth.
    """
    if itemsize == 2 and target.architecture == "cuda:100":
        block_o, stages = (32, 6) if o <= 4096 else (64, 4)
        return MatmulConfig(16 if m <= 16 else 64, block_o, 128, 4, stages)
    block_m = _up_to(m, 16, 32, 64) if itemsize == 2 else _up_to(m, 16, 32)
    block_o = 32 if o <= 8192 else 64
    return MatmulConfig(
        block_m, block_o, 256 // itemsize, 4, target.stages(4 if itemsize < 8 else 2)
    )


def split(config: MatmulConfig, itemsize: int) -> int:
    """The shares of a step that the warps of a matmul take, for an `x` of `itemsize`. In a tile of
    few rows each warp multiplies a share of its own, and reads that share of both factors alone,
    where otherwise all would read all of `x`; the sums are added when the loop is over."""
    few = config.BLOCK_M <= 32 and itemsize == 2
    return config.num_warps if few and 16 * config.num_warps <= config.BLOCK_R else 1


def matmul(
    m: int, o: int, itemsize: int, prologue: bool, ieee: bool, copies: bool, target: Target
) -> MatmulConfig:
    """The scaled form, bound by the tensor cores as soon as the batch allows it.

    A tile of V that is scaled in the loop lives in registers meanwhile, and so does all of an IEEE
    float32 product: both take smaller tiles. Hopper's and Blackwell's tensor cores outrun the L2
    cache at 128×128: twice that, where enough programs are left and hardware `copies` tiles. V's
    side is the short one where its tile is scaled, so that more rows share the scaling.
    """
    if itemsize == 8:
        return MatmulConfig(32, 32, 16, 4, 2)
    if ieee:
        return MatmulConfig(_up_to(m, 16, 32), 64, 16 if prologue else 32, 4, target.stages(3))
    if m <= 64:
        return MatmulConfig(_up_to(m, 16, 32, 64), 64, 128 // itemsize, 4, target.stages(3))
    if itemsize == 4:
        return MatmulConfig(64, 128, 32, 8, target.stages(3))
    if copies and m * o >= PROGRAMS * 256 * 128:
        return MatmulConfig(256, 128, 64, 8, 3) if prologue else MatmulConfig(128, 256, 64, 8, 3)
    return MatmulConfig(128, 128, 32 if target.is_amd else 64, 8, target.stages(3))


def may_copy(m: int, itemsize: int, target: Target) -> bool:
    """Whether the tiles of a matmul may be copied by hardware, where their rows are aligned."""
    return m > 128 and itemsize == 2 and target.architecture in COPYING


def loads(config: MatmulConfig, form: str, target: Target) -> str:
    """How the programs of a matmul that `may_copy` move their tiles. `"descriptors"`: by the
    hardware that copies tiles, which takes fewer instructions and registers than `"pointers"`: by
    these the large tiles spill. `"specialized"`: the same, by a warp of its own while another
    multiplies and the rest scale V's."""
    if config.BLOCK_M * config.BLOCK_O < 256 * 128:
        return "pointers"
    scales = form.startswith("prologue") and target.architecture == "cuda:100"
    return "specialized" if scales else "descriptors"


def grad_one_pass(m: int, itemsize: int, target: Target) -> GradConfig:
    """The recompute form of `dV`: the whole batch in one tile, few rows a program; deep in flight,
    as it is bound by the bytes of `V` and `dV`. The tile of `dY` is read from shared memory for
    every step: on Blackwell, where that would be the bound, of twice the width."""
    if itemsize == 8:
        return GradConfig(_up_to(m, 16, 32), 16, 16, 4, 1)
    block_m = _up_to(m, 16, 32, 64) if itemsize == 2 else _up_to(m, 16, 32)
    block_r = 64 if itemsize == 4 and block_m == 32 else 128
    if itemsize == 2 and block_m == 16 and target.architecture == "cuda:100":
        block_r = 256
    return GradConfig(block_m, 16, block_r, 4, target.stages(4))


def grad(itemsize: int, target: Target) -> GradConfig:
    """The two-phase form of `dV`: a matmul over the batch."""
    if itemsize == 8:
        return GradConfig(16, 32, 32, 4, 2)
    if itemsize == 4:
        return GradConfig(32, 64, 128, 8, target.stages(3))
    return GradConfig(64, 128, 128, 8, target.stages(3))


def conv(
    m: int, o: int, r: int, taps: float, rest: int, itemsize: int, ieee: bool, target: Target
) -> ConvConfig:
    """A product over pixels, as `tiles.product` describes it. Its steps are long, and several are
    in flight: they are bound by latency."""
    tile = tiles.product(m, o, r, taps, rest, itemsize, ieee, target.multiprocessors)
    # A wide load takes 16 bytes for each of the tile's threads, of which gfx942 has 64 a warp.
    warps = 2 if target.is_amd and ieee else 4
    if tile.BLOCK_M == 128 and target.architecture == "cuda:80":
        warps = 8  # the addresses of so many pixels would not fit the registers of four
    stages = 3 if tile.BLOCK_R == 128 and tile.BLOCK_M >= 64 else 4
    if itemsize == 8 or ieee:
        stages = 2
    return ConvConfig(*tile[:3], warps, target.stages(stages), tile.splits)


def conv_grad(o: int, r: int, itemsize: int) -> GradConfig:
    """The gradient of a convolution's weight: a product over pixels."""
    return GradConfig(*tiles.gradient(o, r, itemsize), 4, 2)


def direct(itemsize: int) -> DirectConfig:
    """Groups of few channels, and the gradient of their weight: bound by activations' bytes."""
    return DirectConfig(32, 64 if itemsize == 2 else 32, 4, 2)
