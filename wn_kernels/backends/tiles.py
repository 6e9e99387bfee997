"""What the kernels on a GPU and the cost model share: the tiles of a convolution's products, how
long a program walks, and how a linear layer's gradients are shared among programs.

The loops of a convolution's products are bound by latency: a step takes as long as its loads do,
whatever the tile. So the choice of a tile and the cost model count the same steps. This file
imports no Triton, because the cost model runs without it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# The addition of the parts of a split sum costs as much as this many steps of a product. A step of
# the gradient of a weight takes as long as GRAD_STEP of them, because it also finds its pixels.
SUM_STEPS = 10
GRAD_STEP = 3
# The parts that are added in one step.
ADDED = 64
# A tile's loads of this many bytes take as long as their latency.
STEP_BYTES = 2**15

# The architecture of an H100 and of an H200.
HOPPER = "cuda:90"

# Up to this many rows of a linear layer's `dY`, the pass that scales them sums their columns too.
SUMMED_ROWS = 256


class Tile(NamedTuple):
    """A tile of `BLOCK_M` pixels by `BLOCK_O` outputs, walked in steps of `BLOCK_R`.

    Attributes:
        splits: the programs that share the steps of a tile.
        steps: the steps that a multiprocessor takes one after the other. A step of a large tile
            counts as more than one.
    """

    BLOCK_M: int
    BLOCK_O: int
    BLOCK_R: int
    splits: int
    steps: float


def stages(wanted: int, architecture: str) -> int:
    """Returns how many stages a loop has. An AMD compute unit has 64 KiB of shared memory: two
    stages, never more."""
    return min(wanted, 2) if architecture.startswith("hip") else wanted


class Loop(NamedTuple):
    """The tile of a loop, and how it is launched: of a product, `BLOCK_M` rows by `BLOCK_O` outputs
    in steps of `BLOCK_R`."""

    BLOCK_M: int
    BLOCK_O: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


def up_to(size: int, *blocks: int) -> int:
    """Returns the smallest block that covers `size`, or the largest."""
    return next((b for b in blocks if size <= b), blocks[-1])


def blocks(size: int, block: int) -> int:
    """Returns the number of blocks that cover `size`."""
    return -(-size // block)


def product(
    m: int, o: int, r: int, taps: float, rest: int, itemsize: int, ieee: bool, programs: int
) -> Tile:
    """Returns the tile of a product over `m` pixels.

    Args:
        m: pixels of a phase.
        o, r: output and input channels of a group.
        taps: the taps that a program walks; their mean, if phases differ.
        rest: the number of phases times that of groups.
        itemsize: that of the factors.
        ieee: whether a float32 product is computed without tensor cores.
        programs: the multiprocessors to fill.
    """
    block_o = up_to(o, 16, 32, 64)
    if itemsize == 8 or ieee:
        block_o = min(block_o, 16 if itemsize == 8 else 32)
        shapes = [(up_to(m, 16, 32), 16)]
    else:
        longest = up_to(r, 16, 32, 64, 128) if itemsize == 2 else up_to(r, 16, 32)
        largest = up_to(m, 16, 32, 64, 128 if itemsize == 2 else 64)
        shapes = [
            (block_m, min(longest, 64) if block_m == 128 else longest)
            for block_m in (16, 32, 64, 128)
            if block_m <= largest
        ]
    found = []
    for block_m, block_r in shapes:
        tiles = blocks(m, block_m) * blocks(o, block_o) * rest
        # Few channels are walked together with the taps.
        walked = taps * r / block_r if r < 16 else taps * blocks(r, block_r)
        steps = math.ceil(walked)
        weight = 1 + (block_m + block_o) * block_r * itemsize / STEP_BYTES
        for splits in (1, 2, 4, 8, 16, 32):
            if splits > 1 and (2 * splits > steps or tiles * splits > 2 * programs):
                break
            waves = max(1.0, tiles * splits / programs)
            cost = waves * weight * blocks(steps, splits)
            added = SUM_STEPS if splits > 1 else 0
            found.append((cost + added, Tile(block_m, block_o, block_r, splits, cost)))
    return min(found)[1]


def product_launch(tile: Tile, itemsize: int, ieee: bool, architecture: str) -> tuple[int, int]:
    """Returns the warps and the stages of a product over pixels. Its steps are long, and several
    are in flight: they are bound by latency."""
    # A wide load takes 16 bytes for each of the tile's threads, of which gfx942 has 64 a warp.
    warps = 2 if architecture.startswith("hip") and (ieee or itemsize == 8) else 4
    # Addresses of so many pixels, or of so long a step, would not fit the registers of four.
    long = tile.BLOCK_R == 128 and architecture in ("cuda:80", "cuda:100")
    if long or (tile.BLOCK_M == 128 and architecture == "cuda:80"):
        warps = 8
    deep = 3 if tile.BLOCK_R == 128 and tile.BLOCK_M >= 64 else 4
    if itemsize == 8 or ieee:
        deep = 3 if has_lanes(itemsize, ieee, architecture) else 2
    return warps, stages(deep, architecture)


def sharing(steps: int, wanted: int) -> int:
    """Returns how many programs share so many steps evenly: `wanted` at most, none of which is left
    without a step."""
    return blocks(steps, blocks(steps, wanted)) if steps else 1


def parts(steps: int, tiles: int, programs: int, is_direct: bool = False) -> int:
    """Returns the parts of a sum of `steps` that one program would take for each of the `tiles`.
    There are as many as fill the machine with four programs for each of its multiprocessors
    (`programs`), if the addition costs less than the steps that they save. Programs of the direct
    kernel load nothing in advance, and as many as run at a time hide each other's latency."""
    each = 16 if is_direct else 4
    found = sharing(steps, max(1, min(steps // 2, each * programs // max(1, tiles))))
    return found if GRAD_STEP * (steps - blocks(steps, found)) >= SUM_STEPS else 1


def gradient(o: int, r: int, itemsize: int, architecture: str) -> Loop:
    """Returns the loop of the gradient of a convolution's weight, whose steps have `BLOCK_M`
    pixels. With three stages, four programs share a multiprocessor's memory."""
    if itemsize == 8:
        return Loop(16, 16, 32, 4, stages(2, architecture))
    block_o, deep = up_to(o, 16, 32, 64), stages(3, architecture)
    if r < 16:
        warps = 8 if itemsize == 4 and architecture == "cuda:100" else 4
        return Loop(32, block_o, 32, warps, deep)
    return Loop(64 if itemsize == 2 else 32, block_o, up_to(r, 16, 32, 64), 4, deep)


def direct(itemsize: int) -> tuple[int, int]:
    """Returns the pixels and the channels of a tile where groups have few channels."""
    return 32, 64 if itemsize == 2 else 32


def one_pass_rows(itemsize: int, grad: bool = False, ieee: bool = False) -> int:
    """Returns for how many rows the one-pass kernels are planned, of the forward or of the weight's
    gradient, which holds them in one tile. `itemsize` is that of the wider of `x` and `V`. A tile
    of more rows would not fit the registers. Without tensor cores (`ieee`) the vendor's product
    takes long for a few rows, so that the forward is planned for more of them."""
    if itemsize > 2:
        return 64 if ieee and itemsize == 4 and not grad else 32
    return 64 if grad else 256


def walked_rows(itemsize: int) -> int:
    """Returns for how many rows one walk over `V` computes `dX` and `dV`. They are in one tile."""
    return 32 if itemsize > 2 else 128


def has_lanes(itemsize: int, ieee: bool, architecture: str) -> bool:
    """Returns whether every r of a product's step has sums of its own: in float32 without tensor
    cores. An AMD's multiply such numbers."""
    return itemsize == 4 and ieee and not architecture.startswith("hip")


# A program of a one-pass forward that shares its r with others walks so many steps at least, and r
# is not shared where one program walks fewer than so many.
SHARED_STEPS, LONG_WALK = 8, 32
# A walk over an r of at most this many is over before a deep pipeline is full. Its tiles are small
# enough for two programs to share a multiprocessor, one of which loads while the other stores.
SHORT_WALK = 512


def one_pass(
    m: int, o: int, r: int, itemsize: int, ieee: bool, architecture: str, programs: int
) -> Loop:
    """Returns the loop of the one-pass forward: a tile of rows, deep in flight and narrow enough in
    `o` to occupy the machine.

    Hopper's and Blackwell's tensor cores read both factors of a tile of at least 64 rows
    themselves. On an H200 it takes less time than one of 16 rows, however few there are; its
    configurations are the fastest of those measured there. Blackwell has a multiprocessor's memory
    latency to fill with one program: more stages.

    Args:
        m, o, r: rows of `x`, rows of `V`, and what both sum over.
        itemsize: that of the wider one of `x` and `V`.
        ieee: whether the product is computed without tensor cores.
        architecture: as in `configs.Target`.
        programs: the multiprocessors to fill.
    """
    deep = stages(4 if itemsize < 8 else 2, architecture)
    is_hopper = architecture == HOPPER
    block_o = 32 if o <= 8192 else 64
    if has_lanes(itemsize, ieee, architecture):
        # A thread's registers hold the sums of a tile: a row and an output for each r.
        block_m, deep = up_to(m, 4, 8, 16), 8 if architecture == "cuda:100" else 5
        return Loop(block_m, 32, 256 // block_m if block_m < 16 else 32, 4, deep)
    if itemsize > 2:
        if is_hopper and not ieee:
            return Loop(64, block_o, 64, 4, deep)
        warps = 4
        if architecture == "cuda:100":  # where larger tiles of four warps would spill
            warps = 8 if m > 16 and itemsize == 4 else 4
            block_o = 16 if itemsize == 8 else block_o
        return Loop(up_to(m, 16, 32), block_o, 256 // itemsize, warps, deep)
    if is_hopper:
        if o > 8192:
            if r <= SHORT_WALK:
                return Loop(128, 128, 64, 8, 3) if m > 64 else Loop(64, 64, 64, 4, 3)
            wide = Loop(128, 128, 128, 8, 3) if m <= 128 else Loop(256, 128, 64, 8, 4)
            return wide if m > 64 else Loop(64, 64, 128, 4, 3)
        if r >= LONG_WALK * 128:
            return Loop(64, 32, 128, 4, 4) if o < 4096 else Loop(64, 64, 128, 4, 3)
        if o * blocks(m, 64) <= 16 * programs:
            return Loop(64, 16, 128, 4, 4)
        return Loop(64, 32, 128, 4, 5)
    if m > 64:
        deep = stages(4 if block_o == 32 else 3, architecture)
        return Loop(128, block_o, 64 if architecture.startswith("hip") else 128, 8, deep)
    if architecture == "cuda:100":
        block_o, deep = (32, 6) if o <= 4096 else (64, 4)
        return Loop(16 if m <= 16 else 64, block_o, 128, 4, deep)
    return Loop(up_to(m, 16, 32, 64), block_o, 128, 4, deep)


def one_pass_shares(m: int, o: int, r: int, loop: Loop, programs: int) -> int:
    """Returns how many programs share the r of a tile of the one-pass forward: as many as give each
    multiprocessor (`programs`) two, or one of eight warps, where r is long."""
    tiles, steps = blocks(m, loop.BLOCK_M) * blocks(o, loop.BLOCK_O), blocks(r, loop.BLOCK_R)
    if steps < LONG_WALK:
        return 1
    wanted = (2 if loop.num_warps <= 4 else 1) * programs
    return sharing(steps, max(1, min(wanted // max(1, tiles), steps // SHARED_STEPS)))


def grad_one_pass(m: int, o: int, itemsize: int, architecture: str) -> Loop:
    """Returns the loop of `dV` that recomputes `dW`: the whole batch in one tile, few slices a
    program; deep in flight, as it is bound by the bytes of `V` and `dV`. The tile of `dY` is read
    from shared memory for every step: steps of twice the width halve that, where a tile of 16 rows
    leaves room."""
    if itemsize == 8:
        return Loop(up_to(m, 16, 32), 16, 16, 4, 1)
    if itemsize == 4:
        return Loop(*((16, 16, 128) if m <= 16 else (32, 16, 64)), 4, stages(4, architecture))
    if m <= 16:  # on an A100 twice the width spills
        block_r = 128 if architecture == "cuda:80" else 256
        # A Blackwell's loop of five stages with 64-bit indices is bound by issue slots.
        deep = 4 if architecture == "cuda:100" else 5
        return Loop(16, 16, block_r, 4, stages(deep, architecture))
    block_o = grad_slices(m, o, itemsize)
    if block_o == 64:  # a tile of four warps spills where Hopper's does not
        warps = 4 if architecture == HOPPER else 8
        return Loop(up_to(m, 32, 64), block_o, 128, warps, stages(3, architecture))
    return Loop(up_to(m, 32, 64), block_o, 128, 4, stages(4, architecture))


def grad_slices(m: int, slices: int, itemsize: int) -> int:
    """Returns how many slices a program of the one-pass gradient has, for `m` rows. Every program
    reads all of the other factor, so it has more slices where that is large and enough programs are
    left."""
    return 64 if itemsize == 2 and m > 16 and slices >= 8192 else 16


def grads(m: int, itemsize: int, ieee: bool, architecture: str) -> Loop:
    """Returns the loop of the walk for `dX` and `dV`: a step has `BLOCK_O` rows of `V`, of which a
    program has `BLOCK_R` columns. Arguments as in `one_pass`."""
    block_m = up_to(m, 16, 32, 64, 128)
    block_o, block_r, deep = {2: (64, 64, 4), 4: (32, 64, 3), 8: (16, 32, 1)}[itemsize]
    if ieee and itemsize == 4:
        block_o, block_r, deep = (16, 128, 4) if block_m == 16 else (16, 64, 3)
    elif block_m == 128 and architecture == "cuda:80":  # more would not fit the registers
        block_o //= 2
    warps = 8 if block_m == 128 else 4
    return Loop(block_m, block_o, block_r, warps, stages(deep, architecture))


def weight_product(itemsize: int, architecture: str) -> Loop:
    """Returns the loop of the product for `dV`: a tile of `V`, summed over rows in steps of
    `BLOCK_M`."""
    if itemsize > 2:
        return Loop(16, 64, 64, 4, stages(3 if itemsize == 4 else 1, architecture))
    # On an H200 the fastest of those measured. Of four warps, two programs share a multiprocessor.
    return Loop(64, 128, 128, 4 if architecture == HOPPER else 8, stages(3, architecture))


def grads_splits(o: int, r: int, loop: Loop, programs: int) -> int:
    """Returns how many programs share the rows of the same columns of `V` in that walk: as many as
    give each multiprocessor (`programs`) two, or one of 128 rows."""
    wanted = (1 if loop.BLOCK_M == 128 else 2) * programs // blocks(r, loop.BLOCK_R)
    steps = blocks(o, loop.BLOCK_O)
    return sharing(steps, max(1, min(wanted, steps)))
