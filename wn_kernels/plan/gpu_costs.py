"""The candidates of the Triton path on a GPU, for the cost model (`costs.py`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..backends import tiles
from ..call import Call, Geometry, fits_unscaled, narrows_range
from .devices import Device
from .stages import Costs, Grid, Stage, convolution_sizes, keeps_product

# Threads that a multiprocessor runs at a time, and the elements that each has in flight in a pass.
THREADS = 2048
PER_THREAD = 16


def _pass(moved: float, elements: float, device: Device, least: float = 0.0) -> Stage:
    """Returns a pass of ours over so many elements, in tiles of at least 2048, all of which a
    program has in flight."""
    tile, needed = 2048, moved / device.passes
    programs = max(1, math.ceil(elements / tile))
    grid = Grid(programs, needed / programs, THREADS * PER_THREAD // tile)
    return Stage(needed, least=least, grid=grid)


def column_sums(m: int, size: float) -> Stage:
    """Returns PyTorch's sums of the columns of a matrix of `m` rows and so many bytes."""
    return Stage(size, least=min(m, SHARED_ROWS) * SUMMED_ROW)


def _loop(tile: tiles.Loop, programs: int, itemsizes: tuple[int, int], device: Device) -> Grid:
    """Returns the grid of a loop over `V`, whose tiles are in flight; those of the other factor
    come from the cache. `itemsizes` are those of `x` and `V`."""
    x_size, v_size = itemsizes
    v = tile.BLOCK_O * tile.BLOCK_R * v_size
    step = v + tile.BLOCK_M * max(tile.BLOCK_O, tile.BLOCK_R) * x_size
    return _pipelined(programs, v, step, tile.num_warps, tile.num_stages, device)


def _pipelined(
    programs: int, loaded: int, step: int, warps: int, stages: int, device: Device
) -> Grid:
    """Returns the grid of a loop, of whose step so many bytes are `loaded` from memory. A program
    has all stages in flight but the one that it computes with."""
    deep = max(1, stages - 1)
    resident = min(THREADS // (32 * warps), device.shared // (deep * step))
    return Grid(max(1, programs), deep * loaded, max(1, resident))


class Loaded(NamedTuple):
    """A tile of a factor: its elements, their bytes, and the elements of a row in memory."""

    elements: int
    itemsize: int
    row: int


def _loading(device: Device, warps: int, *loaded: Loaded) -> float:
    """Returns the time of a step's loads. A load has as many elements as all rows begin at a
    multiple of, in up to 16 bytes."""
    seconds = 0.0
    for elements, itemsize, row in loaded:
        wide = math.gcd(16 // itemsize, row)
        load = device.single_load if wide == 1 and itemsize == 4 else device.load
        seconds += elements / wide * load
    return seconds / (32 * warps)


# --- linear layers -------------------------------------------------------------------------------

# A product of the vendor's takes the overhead of this many launches, since its kernels take longer
# to begin and to end than a pass does.
PRODUCT_LAUNCHES = 2
# The products of the backward `product` reach these fractions of the rate: by tensor cores, and
# without them.
PRODUCT_EFFICIENCY, IEEE_EFFICIENCY = 0.3, 0.25
IEEE_ROWS = 16
# Sums of columns walk rows, each of which takes so many seconds: PyTorch's, which share more rows
# than these among programs, and those that ride along with the pass over `dY`.
SUMMED_ROW, RIDING_ROW = 1.25e-8, 7e-9
SHARED_ROWS = 512
# The vendor's products round the rows of `x` up to a multiple of this, except a single row.
VENDOR_ROWS = 128


def vendor_rows(m: int) -> int:
    """Returns how many rows the vendor's product of `m` rows computes."""
    return m if m == 1 else math.ceil(m / VENDOR_ROWS) * VENDOR_ROWS


def triton_linear(call: Call, device: Device) -> Costs:
    """Returns the candidates `one_pass`, `scaled` and `materialize` on a GPU, and the backward
    `product`.

    `one_pass` reads `V` once, for a few rows. It is bound by what a multiprocessor takes in, and
    has a second launch where programs share the sums. In the backward it recomputes `dW`, and
    writes nothing but `dV`. `scaled` has the vendor's product with `V` itself, after a pass that
    reads `V` for the norms, and scales the smaller activations in another pass. `materialize`
    writes `W` instead, which costs less than these passes for many rows. In the backward all but
    `one_pass` form `dW` and finish it in a pass.

    `product` reads `V` once for `dX` and `dV`, and leaves parts of `dX` that are added. For more
    rows it is a product for each of the two, and forms no `dW` either. It takes the product `x Vᵀ`
    of the forward, whose write and whose read count with the pass that scales `dY`. A `W` that is
    kept from the forward spares the backward a pass.
    """
    n, k = call.v_shape
    m = math.prod(call.x_shape[:-1])
    x_size, v_size = call.x_dtype.itemsize, call.v_dtype.itemsize
    x, y, v, w = x_size * m * k, x_size * m * n, v_size * n * k, x_size * n * k
    dim, size = call.dim, max(x_size, v_size)

    def passes(moved: float) -> Stage:  # over activations
        return _pass(moved, moved / x_size, device)

    def weight_passes(moved: float) -> Stage:
        return _pass(moved, n * k, device)

    product = Stage(x + y + w, 2.0 * vendor_rows(m) * n * k, launches=PRODUCT_LAUNCHES)
    ieee = x_size >= 4 and not call.tf32
    sizes, architecture = (x_size, v_size), device.architecture
    form, finish = weight_passes(v + w), weight_passes(w + 2 * v)
    late = fits_unscaled(call.x_dtype, call.v_dtype)
    scale = passes(2 * (x if dim == 1 else y))
    sums = column_sums(m, y)

    forward = {"materialize": [form, product]}
    if late:
        forward = {"scaled": [weight_passes(v), product, scale]} | forward
    few = dim == 0 and m <= tiles.one_pass_rows(size, ieee=ieee)
    if few and not narrows_range(call.x_dtype, call.v_dtype):
        forward = {"one_pass": _one_pass(call, m, ieee, device)} | forward

    dx = [form, product]
    if late:  # the pass over `dY` sums its columns as well, for a few rows
        rides = dim != 1 and m <= tiles.SUMMED_ROWS
        over_dy = scale._replace(least=m * RIDING_ROW * rides)
        dx = [product, scale] if dim == 1 else [over_dy, product]
    backward = {"materialize": [form, product, product, sums, finish]}
    if late:
        backward = {"scaled": [*dx, *[sums] * (not rides), product, finish]} | backward
    if dim is not None and m <= tiles.one_pass_rows(size, grad=True):
        slices, walked = (k, y) if dim == 1 else (n, x)
        loop = tiles.grad_one_pass(m, slices, size, architecture)
        programs = tiles.blocks(slices, loop.BLOCK_O)
        busy = min(device.multiprocessors, programs)
        taken_in = 3 * v / busy + 2 * walked * programs / busy
        products = 8.0 * m * n * k if ieee else 0.0
        # Two walks over both factors, in a wave of programs or several.
        row = n if dim == 1 else k
        factors = (
            Loaded(loop.BLOCK_M * loop.BLOCK_R, x_size, row),
            Loaded(loop.BLOCK_O * loop.BLOCK_R, v_size, k),
        )
        steps = 2 * tiles.blocks(row, loop.BLOCK_R) * programs / busy
        loading = steps * _loading(device, loop.num_warps, *factors)
        least, grid = taken_in / device.grad_intake, _loop(loop, programs, sizes, device)
        grad = Stage((x + y + 3 * v) / device.passes, products, max(least, loading), 1, grid)
        backward = {"one_pass": [*dx, grad]} | backward
    # Without tensor cores it lost to the vendor's products by more rows than these.
    many = ieee and m > IEEE_ROWS
    keeps = dim == 0 and keeps_product(call) and call.x_dtype != torch.float16
    dots = passes(4 * y)._replace(least=m * RIDING_ROW)
    if keeps and m <= tiles.walked_rows(size) and not many:
        loop = tiles.grads(m, size, ieee, architecture)
        splits = tiles.grads_splits(n, k, loop, device.multiprocessors)
        parts = 0.0 if splits == 1 else max(4.0, x_size) * splits * m * k
        efficiency = IEEE_EFFICIENCY if ieee else PRODUCT_EFFICIENCY
        moved, products = 2 * v + x + parts, 4.0 * max(m, loop.BLOCK_M) * n * k / efficiency
        grid = _loop(loop, splits * tiles.blocks(k, loop.BLOCK_R), sizes, device)
        walk = Stage(moved / device.passes, products, 0.0, 1, grid)
        added = [passes(parts + x)] if parts else []
        backward = {"product": [dots, walk, *added]} | backward
    elif keeps and x_size == v_size == 2:
        backward = {"product": [dots, product, _weight_product(call, m, device)]} | backward
    kept = [product, product, sums, finish]
    return Costs(forward, backward, device, device.rate(x_size, call.tf32), kept)


def _one_pass(call: Call, m: int, ieee: bool, device: Device) -> list[Stage]:
    """Returns the launches of the forward that takes the norms in its loop. Each program reads the
    rows of `x` of its tile."""
    n, k = call.v_shape
    x_size, v_size = call.x_dtype.itemsize, call.v_dtype.itemsize
    size, programs = max(x_size, v_size), device.multiprocessors
    loop = tiles.one_pass(m, n, k, size, ieee, device.architecture, programs)
    shares = tiles.one_pass_shares(m, n, k, loop, programs)
    blocks = tiles.blocks(m, loop.BLOCK_M) * tiles.blocks(n, loop.BLOCK_O) * shares
    rows = loop.BLOCK_M if size == 2 else min(m, loop.BLOCK_M)
    taken_in = (loop.BLOCK_O * v_size + rows * x_size) * k / shares
    taken_in *= blocks / max(1, min(programs, blocks))
    intake = device.intake if size == 2 else device.wide_intake
    parts = (max(4.0, x_size) * m + 4) * n * shares if shares > 1 else 0.0
    moved, y = v_size * n * k + x_size * m * k, x_size * m * n
    steps = tiles.blocks(k, loop.BLOCK_R) / shares * max(1.0, blocks / programs)
    x_tile = Loaded(min(m, loop.BLOCK_M) * loop.BLOCK_R, x_size, k)
    v_tile = Loaded(min(n, loop.BLOCK_O) * loop.BLOCK_R, v_size, k)
    step = _loading(device, loop.num_warps, x_tile, v_tile)
    product = last = 0.0
    if tiles.has_lanes(size, ieee, device.architecture):
        product = device.lanes_product
        intake, last = device.lanes_intake, device.lanes_sum * loop.BLOCK_M
    elif ieee:
        product = device.ieee_product
    step = max(step, loop.BLOCK_M * loop.BLOCK_O * loop.BLOCK_R * product)
    grid = _loop(loop, blocks, (x_size, v_size), device)
    walk = Stage(moved + (parts or y), 0.0, last + max(taken_in / intake, steps * step), 1, grid)
    return [walk, _pass(parts + y, m * n, device)] if parts else [walk]


# The product for `dV` takes in its factors at this rate in a multiprocessor, and reaches this
# fraction of the bandwidth for `V` and `dV`, before or after its loop.
WEIGHT_PRODUCT_INTAKE, WEIGHT_PRODUCT_PASSES = 9.4e10, 0.71


def _weight_product(call: Call, m: int, device: Device) -> Stage:
    """Returns the launch of the product for `dV` of a kept `x Vᵀ`."""
    (n, k), size = call.v_shape, call.v_dtype.itemsize
    loop = tiles.weight_product(size, device.architecture)
    blocks = tiles.blocks(n, loop.BLOCK_O) * tiles.blocks(k, loop.BLOCK_R)
    step = (loop.BLOCK_O + loop.BLOCK_R) * loop.BLOCK_M * size
    taken_in = blocks * step * m / loop.BLOCK_M / min(blocks, device.multiprocessors)
    moved = 2.0 * size * n * k
    least = taken_in / WEIGHT_PRODUCT_INTAKE + moved / (WEIGHT_PRODUCT_PASSES * device.bandwidth)
    grid = _pipelined(blocks, step, step, loop.num_warps, loop.num_stages, device)
    return Stage(moved, 2.0 * m * n * k, least, 1, grid)


# --- convolutions --------------------------------------------------------------------------------

# The vendor's convolutions split a sum of more numbers than this, of which one more takes this part
# of the time.
VENDOR_LENGTH, VENDOR_SPLIT = 2**13, 0.3


def triton_convolution(call: Call, conv: Geometry, device: Device) -> Costs:
    """Returns the candidates `one_pass`, `packed`, `weight_grad` and `materialize` on a GPU.

    Our products read channels-last activations. Others are repacked first, and results are written
    as they have to lie. The loop of our products is bound by latency, so their time is that of
    their steps (`backends/tiles.py`). A call of the vendor's convolution takes longer than its
    kernel does, since it converts layouts.

    `packed` writes `W` once, in the product's dtype and with channels innermost, and computes all
    products itself. `materialize` leaves all of them to the vendor. The backward `weight_grad`
    leaves `dX` to the vendor and computes the weight's gradient itself. Groups of a few channels
    are bound by the bytes of their activations. Their forward can compute the norms in its loop
    (`one_pass`), where each output owns a slice.
    """
    own = _Products.of(call, conv, device)
    constants, weight = device.convolution, math.prod(call.v_shape)
    v, dw = call.v_dtype.itemsize * weight, _grad_size(call) * weight
    form, finish = (_pass(moved, weight, device) for moved in (2 * v + own.w, 2 * (dw + v) + v))
    repacks = not call.channels_last
    repack_x, repack_y = (
        [_pass(2 * side, side / call.x_dtype.itemsize, device, constants.repack)] * repacks
        for side in (own.x, own.y)
    )

    forward = {
        "packed": [*repack_x, form, *own.product(conv.transposed)],
        "materialize": [form, own.vendors(*own.vendors_sum(conv.transposed))],
    }
    narrows = narrows_range(call.x_dtype, call.v_dtype)
    if conv.has_small_groups(call.v_shape) and conv.owns_slices(call.dim) and not narrows:
        forward["one_pass"] = [*repack_x, *own.product(False)]
    vendors_dx = own.vendors(*own.vendors_sum(not conv.transposed), is_grad=True)
    bias = Stage(own.y, 0.0, constants.step)  # the sum of `dY` alone
    grad = [*repack_x, *own.gradient(), finish] + ([bias] if conv.transposed else [])
    backward = {
        "packed": [form, *repack_y, *own.product(not conv.transposed), *grad],
        "weight_grad": [form, vendors_dx, *repack_y, *grad],
        "materialize": [form, vendors_dx, own.vendors(own.small, 1, is_grad=True), bias, finish],
    }
    return Costs(forward, backward, device, device.rate(call.x_dtype.itemsize, call.tf32))


def _grad_size(call: Call) -> int:
    """Returns the bytes of an element of the norms, and of our gradients of a weight."""
    return 8 if call.v_dtype.itemsize == 8 else 4


class _Products(NamedTuple):
    """Describes the products of a convolution.

    Attributes:
        call, conv, device: what they compute, and where.
        x, y, w: bytes of the input, of the output and of `W`.
        operations: those of each.
        small, phase: pixels of the smaller side, and of a phase of the larger one.
    """

    call: Call
    conv: Geometry
    device: Device
    x: float
    y: float
    w: float
    operations: float
    small: int
    phase: int

    @classmethod
    def of(cls, call: Call, conv: Geometry, device: Device) -> _Products:
        sizes = conv.output_sizes(call.x_shape[2:], call.v_shape[2:])
        small, large = (call.x_shape[2:], sizes) if conv.transposed else (sizes, call.x_shape[2:])
        phase = (tiles.blocks(n, s) for n, s in zip(large, conv.stride, strict=True))
        batch = call.x_shape[0]
        pixels = batch * math.prod(small), batch * math.prod(phase)
        return cls(call, conv, device, *convolution_sizes(call, conv), *pixels)

    def vendors_sum(self, phased: bool) -> tuple[float, int]:
        """Returns `length` and `phases` of the vendor's product. It computes all phases as one, and
        takes longer for a result than the numbers of its phase would. On tensor cores it multiplies
        the zeros between pixels as well."""
        phases = math.prod(self.conv.stride) if phased else 1
        return self.length(phased) * math.sqrt(phases), 1 if self.ieee else phases

    def vendors(self, length: float, phases: int, is_grad: bool = False) -> Stage:
        """Returns one of the vendor's products, each of whose results sums `length` numbers. A call
        has a fixed time, and the sum is bound by latency."""
        call, conv, device = self.call, self.conv, self.device
        constants, moved = device.convolution, self.x + self.y + self.w
        if conv.has_small_groups(call.v_shape):
            converts = 2 * (self.x + self.y) * call.channels_last
            numbers = max(self.x, self.y) / self._size * constants.vendor_number
            least = max(constants.vendor_direct, numbers)
            return Stage(moved + converts, 0.0, least, 1 + call.channels_last)
        # Few channels are padded.
        as_it_lies = call.channels_last and len(conv.stride) > 1 and call.v_shape[1] >= 16
        least, step = constants.vendor, constants.vendor_step
        if as_it_lies:
            least = constants.vendor_native_grad if is_grad else constants.vendor_native
            step = constants.vendor_native_step
        longer = VENDOR_SPLIT * max(0.0, length - VENDOR_LENGTH)
        least += (min(length, VENDOR_LENGTH) + longer) * step + 4 * self.w / device.bandwidth
        # Images are converted to another layout, but for a matrix product of all channels.
        is_pointwise = math.prod(call.v_shape[2:]) == 1 and not call.channels_last
        converted = 0 if is_pointwise else 1 if as_it_lies else 2
        least += converted * (self.x + self.y) / device.bandwidth
        if conv.groups > 1:
            least += self.operations / (constants.vendor_grouped * device.rates[0])
        rate = device.rate(self._size, call.tf32) * (constants.vendor_ieee if self.ieee else 1)
        return Stage(moved, 0.0, least + phases * self.operations / rate)

    @property
    def _size(self) -> int:
        return self.call.x_dtype.itemsize

    def _channels(self, phased: bool) -> tuple[int, int]:
        """Returns the output and input channels of a group."""
        o, r = self.call.v_shape[0] // self.conv.groups, self.call.v_shape[1]
        return (r, o) if phased else (o, r)

    def length(self, phased: bool) -> float:
        """Returns how many numbers an element of the result sums, in the mean over phases."""
        phases = math.prod(self.conv.stride) if phased else 1
        return self._channels(phased)[1] * math.prod(self.call.v_shape[2:]) / phases

    @property
    def ieee(self) -> bool:
        """Whether tensor cores cannot serve them."""
        return self._size == 8 or (self._size == 4 and not self.call.tf32)

    def _seconds(self, steps: float, step: float, ieee: float) -> float:
        """Returns the time of steps of a loop, and of what it computes without tensor cores, where
        it reaches the fraction `ieee` of the rate."""
        seconds = steps * step
        if self.ieee:
            rate = self.device.rate(self._size) * ieee
            seconds = max(seconds, self.operations / rate)
        return seconds

    def product(self, phased: bool) -> list[Stage]:
        """Returns the launches of a product: forward, or `dX`."""
        moved, conv = self.x + self.y + self.w, self.conv
        constants = self.device.convolution
        if conv.has_small_groups(self.call.v_shape):
            return [self._direct(moved)]
        o, r = self._channels(phased)
        phases = math.prod(conv.stride) if phased else 1
        m, rest, device = self.phase if phased else self.small, phases * conv.groups, self.device
        tile = tiles.product(
            *(m, o, r, self.length(phased) / r, rest, self._size, self.ieee),
            device.multiprocessors,
        )
        programs = tiles.blocks(m, tile.BLOCK_M) * tiles.blocks(o, tile.BLOCK_O) * rest
        programs *= tile.splits
        warps, deep = tiles.product_launch(tile, self._size, self.ieee, device.architecture)
        grid = self._grid(programs, tile.BLOCK_M, tile.BLOCK_O, tile.BLOCK_R, warps, deep)
        waves = programs / device.multiprocessors
        step = constants.step
        if self.ieee:  # programs that wait for their loads let others compute
            step = max(constants.ieee_step, step / max(1.0, waves))
        if r < 16:
            step *= constants.flat ** len(conv.stride)
        else:
            a = Loaded(tile.BLOCK_M * tile.BLOCK_R, self._size, r)
            w = Loaded(tile.BLOCK_O * tile.BLOCK_R, self._size, o if phased else r)
            step = max(step, _loading(device, warps, a, w))
        seconds = self._seconds(tile.steps, step, constants.ieee)
        found = [Stage(moved, self.operations, seconds, grid=grid)]
        if tile.splits > 1:
            result = self.y if phased == conv.transposed else self.x
            added = (4 * tile.splits / self._size + 1) * result
            found.append(_pass(added, result / self._size, device, constants.added))
        return found

    def _grid(self, programs: int, a: int, b: int, step: int, warps: int, stages: int) -> Grid:
        """Returns the grid of a product whose tile is `a` by `b`, in steps of `step`. Both factors
        are in flight."""
        loaded = (a + b) * step * self._size
        return _pipelined(programs, loaded, loaded, warps, stages, self.device)

    def _direct(self, moved: float) -> Stage:
        """Returns a launch of groups of few channels. A program has a tile of `x` in flight."""
        device, size = self.device, self._size
        constants = device.convolution
        tile = math.prod(tiles.direct(size))
        programs = max(1, math.ceil((self.x + self.y) / 2 / size / tile))
        grid = Grid(programs, tile * size, THREADS // 128)
        taps = min(self.x, self.y) / size * math.prod(self.call.v_shape[1:])
        return Stage(moved, 0.0, max(constants.direct, constants.direct_tap * taps), grid=grid)

    def gradient(self) -> list[Stage]:
        """Returns the launches of the gradient of the weight."""
        call, conv, device = self.call, self.conv, self.device
        constants = device.convolution
        o, r = self._channels(False)
        taps = math.prod(call.v_shape[2:])
        dw = float(_grad_size(call) * math.prod(call.v_shape))
        if conv.has_small_groups(call.v_shape):
            return [self._direct(self.x + self.y + dw)]
        loop = tiles.gradient(o, r, self._size, device.architecture)
        block_m, block_o, block_r = loop[:3]
        across = tiles.blocks(taps * r, block_r) if r < 16 else taps * tiles.blocks(r, block_r)
        count = tiles.blocks(o, block_o) * across * conv.groups
        steps = tiles.blocks(self.small, block_m)
        parts = tiles.parts(steps, count, device.multiprocessors)
        # The first loads and the stores of a program take a step of a product.
        waves = max(1.0, count * parts / (2 * device.multiprocessors))
        step = tiles.GRAD_STEP * (len(conv.stride) + 1) / 2
        walked = (step * tiles.blocks(steps, parts) + 1) * waves
        if r < 16 or call.tf32:  # loads of single elements, and a tile that is turned in registers
            walked *= 2
        seconds = self._seconds(walked, constants.step, constants.grad_ieee)
        if r >= 16:
            p, q = (Loaded(block_m * b, self._size, c) for b, c in ((block_o, o), (block_r, r)))
            loading = _loading(device, loop.num_warps, p, q)
            seconds = max(seconds, tiles.blocks(steps, parts) * waves * loading)
        grid = self._grid(count * parts, block_o, block_r, block_m, *loop[3:])
        found = [Stage(self.x + self.y + parts * dw, self.operations, seconds, grid=grid)]
        if parts > 1:
            least = tiles.blocks(parts, tiles.ADDED) * constants.added
            elements = dw / _grad_size(call)
            found.append(_pass(parts * dw + dw, elements, device, least))
        return found
