"""The pinned configurations: one per kernel, regime and architecture, no search.

Blocks are powers of two and at least 16 wherever a side meets `tl.dot`. How each regime's numbers
came about is in docs/notes/measurements.md; `make codegen` compiles them all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from triton import cdiv, next_power_of_2

from .. import native, tiles


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

    @property
    def is_hopper(self) -> bool:
        return self.architecture == tiles.HOPPER


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
    """A tile of `BLOCK_N` slices by `BLOCK_P` and `BLOCK_R` elements of their middle and their
    innermost loop."""

    BLOCK_N: int
    BLOCK_P: int
    BLOCK_R: int
    num_warps: int
    num_stages: int = 1

    @property
    def size(self) -> int:
        """Its elements."""
        return self.BLOCK_N * self.BLOCK_P * self.BLOCK_R


class FinishConfig(NamedTuple):
    """A tile of `BLOCK_S` partial sums of `BLOCK_N` slices."""

    BLOCK_N: int
    BLOCK_S: int
    num_warps: int
    num_stages: int


class SplitConfig(NamedTuple):
    """A tile of `BLOCK_M` rows by `BLOCK_O` outputs, walked in steps of `BLOCK_R`, which `splits`
    programs share."""

    BLOCK_M: int
    BLOCK_O: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    splits: int = 1

    def of_kernel(self) -> dict[str, int]:
        """What a kernel takes of it: all but the splits."""
        fields = self._asdict()
        del fields["splits"]
        return fields


class GradConfig(NamedTuple):
    """A `(BLOCK_O, BLOCK_R)` tile of `dW`, summed over the batch in steps of `BLOCK_M`."""

    BLOCK_M: int
    BLOCK_O: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


class ScaleConfig(NamedTuple):
    """A tile of `BLOCK_M` rows by `BLOCK_C` columns."""

    BLOCK_M: int
    BLOCK_C: int
    num_warps: int
    num_stages: int


class DirectConfig(NamedTuple):
    """A tile of `BLOCK_M` pixels by `BLOCK_O` channels, without `tl.dot`."""

    BLOCK_M: int
    BLOCK_O: int
    num_warps: int
    num_stages: int


_up_to = tiles.up_to


# Warps that a multiprocessor runs at a time, of 2048 threads.
WARPS_PER_SM = 64

# Elements of a tile for every thread: two wide loads of a half-precision tensor.
PER_THREAD = 16

# Tiles of a slice that one program walks, where there are slices enough.
WALKED = 8

# The programs of a split reduction, as a multiple of those that run at a time.
WAVES = 4


def _tile(block_n: int, block_p: int, block_r: int, per_thread: int = PER_THREAD) -> SliceConfig:
    size = block_n * block_p * block_r
    return SliceConfig(block_n, block_p, block_r, min(16, max(1, size // (32 * per_thread))))


def slices(
    n: int, loops: tuple[int, int, int], abreast: int, itemsize: int, programs: int, target: Target
) -> SliceConfig:
    """A tile that holds whole slices, where they are short enough: several short ones, as long as
    `programs` are left, which fill the machine. Otherwise a tile that is a part of them.

    `abreast` slices lie side by side in 128 bytes, and `itemsize` is the widest tensor's.
    """
    outer, middle, inner = (next_power_of_2(max(1, size)) for size in loops)
    abreast = min(next_power_of_2(abreast), next_power_of_2(max(1, n)))
    # A processor's registers: half of what 16 warps have. The largest tile has to be filled well.
    most = 16384 if itemsize <= 4 else 8192
    if outer * middle * inner > most // 2 and 3 * math.prod(loops) < 2 * outer * middle * inner:
        most //= 2
    if outer == 1 and abreast * middle * inner <= most:
        block_n = abreast
        while block_n > max(1, abreast // 4) and 2 * cdiv(n, block_n) < programs:
            block_n //= 2  # runs of 32 bytes at least
        while block_n * middle * inner < 2048 and cdiv(n, 2 * block_n) >= programs:
            block_n *= 2
        return _tile(block_n, middle, inner)
    if abreast == 1 and middle == outer == 1:
        return _tile(1, 1, 8192)
    # Wide along the middle loop as well, in which another tensor may be contiguous.
    rest = 4096 // abreast
    block_r = min(inner, max(64, rest // middle))
    # On an H200, more loads in flight for each thread were faster than more threads.
    per_thread = 2 * PER_THREAD if target.is_hopper and itemsize <= 2 else PER_THREAD
    found = _tile(abreast, min(middle, rest // block_r), block_r, per_thread)
    # On Blackwell the tile of a gradient would not fit the registers of half as many warps.
    return found._replace(num_warps=16) if target.architecture == "cuda:100" else found


# The launch of a group has as many warps in every program. One walks a slice in so many steps at
# most, and the addresses of so many sets of tensors are kept.
GROUPED_WARPS = 8
GROUPED_STEPS = 64
GROUPED_KNOWN = 16


def grouped(n: int, loops: tuple[int, int, int], along_rows: bool, itemsize: int) -> SliceConfig:
    """A tile of a weight that shares a launch, of 4096 elements at most. There are few of them,
    because the kernel has code for each."""
    most = 4096 if itemsize <= 4 else 2048
    _, middle, inner = loops
    if along_rows:
        block_r = next(r for r in (64, 256, 1024, most) if r >= inner or r == most)
        return SliceConfig(min(64, most // block_r), 1, block_r, GROUPED_WARPS)
    block_n = 32 if n >= 32 else 4
    block_r = 64 if inner > 16 else 16 if inner > 1 else 1
    rest = most // (block_n * block_r)
    return SliceConfig(block_n, rest if middle > 1 else 1, block_r, GROUPED_WARPS)


def splits(
    config: SliceConfig, blocks_n: int, tiles: int, programs: int, target: Target, sums: int = 1
) -> int:
    """The programs that share a slice of so many tiles: one where those of other slices, so many
    `programs`, fill the machine, or where there is little to share.

    Slices that together leave the cache before their second walk gain nothing from having one
    program each, and even shares end together. There are enough programs for `WAVES`, the last of
    which then leaves little of the machine idle. All programs read `sums · splits²` partial sums of
    a slice. These take an eighth of its bytes at most, at two bytes an element, and a quarter where
    a multiprocessor would have fewer than two programs.
    """
    if tiles <= (WALKED if blocks_n >= programs else 2):
        return 1
    blocks_n, elements = max(1, blocks_n), tiles * config.size // config.BLOCK_N // sums
    wanted = WAVES * WARPS_PER_SM // config.num_warps * target.multiprocessors // blocks_n
    wanted = min(max(wanted, tiles // WALKED), math.isqrt(elements // 16))
    least = min(2 * target.multiprocessors // blocks_n, math.isqrt(elements // 8))
    return max(1, min(tiles, max(wanted, least)))


def finish(itemsize: int) -> FinishConfig:
    """The second stage of a split reduction: partial sums of several slices, 128 splits a step."""
    return FinishConfig(16 if itemsize == 8 else 32, 128, 4, 1)


def one_pass(m: int, o: int, r: int, itemsize: int, ieee: bool, target: Target) -> SplitConfig:
    """As `tiles.one_pass`."""
    programs = target.multiprocessors
    tile = tiles.one_pass(m, o, r, itemsize, ieee, target.architecture, programs)
    return SplitConfig(*tile, tiles.one_pass_shares(m, o, r, tile, programs))


def added(m: int) -> ScaleConfig:
    """The pass that adds the shares of a one-pass product of `m` rows."""
    return ScaleConfig(_up_to(m, 1, 4, 16), 64, 4, 1)


def has_lanes(itemsize: int, ieee: bool, target: Target) -> bool:
    """As `tiles.has_lanes`."""
    return tiles.has_lanes(itemsize, ieee, target.architecture)


def split(config: SplitConfig, itemsize: int, ieee: bool, target: Target) -> int:
    """The shares of a step that the warps of a matmul take, for an `x` of `itemsize`. In a tile of
    few rows each warp multiplies a share of its own, and reads that share of both factors alone,
    where otherwise all would read all of `x`; the sums are added when the loop is over. It is 0
    where every r of a step has sums of its own."""
    if has_lanes(itemsize, ieee, target):
        return 0
    few = config.BLOCK_M <= 32 and itemsize == 2
    return config.num_warps if few and 16 * config.num_warps <= config.BLOCK_R else 1


def grad_one_pass(m: int, o: int, itemsize: int, target: Target) -> GradConfig:
    """As `tiles.grad_one_pass`."""
    return GradConfig(*tiles.grad_one_pass(m, o, itemsize, target.architecture))


def grads(m: int, o: int, r: int, itemsize: int, ieee: bool, target: Target) -> SplitConfig:
    """As `tiles.grads`."""
    tile = tiles.grads(m, itemsize, ieee, target.architecture)
    return SplitConfig(*tile, tiles.grads_splits(o, r, tile, target.multiprocessors))


def weight_product(itemsize: int, target: Target) -> GradConfig:
    """As `tiles.weight_product`."""
    return GradConfig(*tiles.weight_product(itemsize, target.architecture))


def scale(m: int, sums: bool) -> ScaleConfig:
    """A pass over a matrix of `m` rows: 4096 elements a step. One that `sums` columns has all rows
    of a few."""
    if sums:  # on an H200 the fastest of those measured
        if m <= 4:
            return ScaleConfig(4, 64, 4, 3)
        return ScaleConfig(_up_to(m, 16, 64, 128), 32, 8 if m > 128 else 4, 3)
    return ScaleConfig(_up_to(m, 1, 4, 16), 256, 4, 1)


def conv(
    m: int, o: int, r: int, taps: float, rest: int, itemsize: int, ieee: bool, target: Target
) -> SplitConfig:
    """A product over pixels, as `tiles.product` and `tiles.product_launch` describe it."""
    tile = tiles.product(m, o, r, taps, rest, itemsize, ieee, target.multiprocessors)
    launch = tiles.product_launch(tile, itemsize, ieee, target.architecture)
    return SplitConfig(*tile[:3], *launch, tile.splits)


def conv_grad(o: int, r: int, itemsize: int, target: Target) -> GradConfig:
    """As `tiles.gradient`."""
    return GradConfig(*tiles.gradient(o, r, itemsize, target.architecture))


def direct(itemsize: int) -> DirectConfig:
    """Groups of few channels, and the gradient of their weight: bound by activations' bytes."""
    return DirectConfig(*tiles.direct(itemsize), 4, 2)
