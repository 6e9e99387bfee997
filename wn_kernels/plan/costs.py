"""The cost model counts the bytes, operations and launches of a call, and estimates its time.

A candidate is a list of stages that run one after the other. Its time is estimated as

    Σ launches · overhead + max(bytes / bandwidth, operations / rate, least)

over its stages. The constants are those of a device class, not of one machine. They serve to rank
the candidates, not to predict times. `variants.py` picks the cheapest.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..backends import tiles, vendor
from ..backends.native import limits
from ..call import Call, Geometry, fits_unscaled, narrows_range
from .devices import Device, cpu, gpu, native

# PyTorch's own convolution has the overhead of this many stages of the native library, and each of
# its gradients.
CONVOLUTION_CALLS, GRADIENT_CALLS = 7, 10
# It reaches this fraction of the rate.
CONVOLUTION_EFFICIENCY = 0.85
# The native library's own products of few columns reach this fraction. A sum that they write then
# costs as much as so many times its bytes, and so does a number of an unfolded image that is
# written, or added to the image.
UNFOLDED_EFFICIENCY = 1.06
SUMMED, UNFOLDED, FOLDED = 32, 2, 5
# A run of numbers that is copied costs as much as this many bytes.
RUN = 12
# An unfolded input may take this many bytes whatever the size of the weight.
UNFOLDED_BYTES = 2**18
# PyTorch's own loops for half precision (`vendor.SLOW`) take this many times as long as a product
# in float32, in the forward and in the backward.
SLOW_FORWARD, SLOW_BACKWARD = 4, 50
# A product of at most so many columns has few of them.
FEW_COLUMNS = 64
# For a `W` of more bytes than this, the allocator maps fresh pages each time.
FRESH_PAGES = 2**24


class Stage(NamedTuple):
    """A stage is one launched operation of a candidate.

    Attributes:
        bytes: what it moves.
        operations: what it computes.
        least: seconds that it takes whatever it moves and computes.
        launches: how many launches' overhead it has.
    """

    bytes: float
    operations: float = 0.0
    least: float = 0.0
    launches: int = 1


class Costs(NamedTuple):
    """Holds the candidates of each direction by variant, on a device that computes at `rate`.
    `kept` is the backward of a training step that keeps `W`, if that is a candidate of its own."""

    forward: dict[str, list[Stage]]
    backward: dict[str, list[Stage]]
    device: Device
    rate: float
    kept: list[Stage] | None = None

    def seconds(self, stages: list[Stage]) -> float:
        """Returns the estimated time of a candidate in seconds."""
        device = self.device
        return sum(
            s.launches * device.overhead
            + max(s.bytes / device.bandwidth, s.operations / self.rate, s.least)
            for s in stages
        )

    def keeping_pays(self) -> bool:
        """Returns whether a training step that keeps `W`, if it is a candidate, is faster than one
        of the fastest candidates."""
        if self.kept is None:
            return False
        forward, backward = self.cheapest()
        without = self.forward[forward] + self.backward[backward]
        return self.seconds(self.forward["materialize"] + self.kept) < self.seconds(without)

    def cheapest(self) -> tuple[str, str]:
        """Returns the fastest candidate of each direction. The first one wins a tie."""
        forward, backward = (
            min(candidates, key=lambda name: self.seconds(candidates[name]))
            for candidates in (self.forward, self.backward)
        )
        return forward, backward


def costs(call: Call, backend: str, device: Device | None = None) -> Costs:
    """Returns the candidates of a backend for a call, on the call's GPU by default."""
    if backend == "aten":
        return aten_linear(call) if call.conv is None else aten_convolution(call, call.conv)
    if backend == "native":
        return native_linear(call) if call.conv is None else native_convolution(call, call.conv)
    device = device or gpu(call.device)
    if call.conv is None:
        return triton_linear(call, device)
    return triton_convolution(call, call.conv, device)


# --- the ATen path -------------------------------------------------------------------------------


def scales_late(call: Call) -> bool:
    """Returns whether the ATen path may scale after a product. In lower precision it must not,
    because an unscaled product may leave the range of the dtype."""
    return call.x_dtype == call.v_dtype and call.x_dtype.itemsize >= 4


def keeps_product(call: Call) -> bool:
    """Returns whether `x Vᵀ` is at most an eighth of `V`'s size. If it is kept for the backward,
    the layer saves at most 1/8 of its weight more than the plain layer does."""
    return call.dim == 0 and 8 * math.prod(call.x_shape[:-1]) <= call.v_shape[1]


def aten_linear(call: Call) -> Costs:
    """Returns the candidates `scaled` and `materialize` of the ATen path.

    Both compute the norms and the same matmuls. Scaling the output (the input, for dim=1) reads and
    writes `M·N` (`M·K`) numbers. Materialising `W` writes and reads `N·K`. Which is cheaper depends
    on the batch. In the backward, `dW` has to be read again together with `V` for the dots
    `⟨dW, V⟩`, unless a smaller product holds them already. For dim=1 and None, that product is
    `dX` before its scale. For dim=0, it is the forward's `x Vᵀ`. Materialising launches fewer
    operations, which matters most for small layers.
    """
    device = cpu()
    n, k = call.v_shape
    m = math.prod(call.x_shape[:-1])
    size = call.x_dtype.itemsize
    x, y, w = size * m * k, size * m * n, size * n * k
    activation = x if call.dim == 1 else y
    product = Stage(x + y + w, _vendors(device, 2.0 * m * n * k, m))
    forward = {"materialize": [Stage(3 * w), product]}
    backward = {"materialize": [Stage(2 * w), product, product, Stage(5 * w)]}
    if call.dim == 0 and call.x_dtype == call.v_dtype == torch.bfloat16:
        backward = {"scaled": [Stage(2 * activation), product, product, Stage(5 * w)]}
    if scales_late(call):
        # The first candidate wins a tie.
        forward = {"scaled": [Stage(w), Stage(2 * activation), product]} | forward
        if keeps_product(call) or call.dim != 0:
            finish = [*[Stage(2 * activation)] * 3, Stage(2 * w), *[Stage(0)] * 5]
        else:
            finish = [Stage(2 * activation), Stage(0), Stage(5 * w)]
        backward = {"scaled": [product, product, *finish]} | backward
    return Costs(forward, backward, device, device.rate(size))


def aten_convolution(call: Call, conv: Geometry) -> Costs:
    """Returns the candidates `output`, `input` and `materialize` of the ATen path.

    All compute the norms and run the same convolution. Scaling a side reads and writes its
    activations. Materialising `W` writes and reads the weight. Long signals and large images are
    therefore cheaper to materialise, and wide layers over few pixels are cheaper to scale. A scale
    along taps belongs to neither side. One scale for the whole weight belongs to both, and then the
    smaller side is scaled.

    In the backward, scaling the output takes one more convolution call, because `dX` needs the
    scaled `dY` and `⟨dW, V⟩` needs the unscaled one. If the input is scaled, the dots come from `x`
    and `dX` instead of the weight's gradient, and one pass over `dV` completes it.
    """
    device = cpu()
    size = call.x_dtype.itemsize
    x, y, w, operations = _convolution_sizes(call, conv)
    axis = conv.scale_axis(call.dim) if scales_late(call) else "none"
    # A weight of a few MiB stays in cache between two operations.
    weight = w / device.cache if w <= 2**23 else w
    product = Stage(x + y + weight, _vendors(device, operations, _columns(call, conv)))
    forward = {"materialize": [Stage(3 * weight), product]}
    backward = {"materialize": [Stage(2 * weight), product, product, Stage(5 * weight)]}
    if axis in ("output", "whole"):
        forward["output"] = [Stage(weight), product, Stage(2 * y), *[Stage(0)] * 3]
        rest = [*[Stage(2 * y)] * 3, Stage(5 * weight), Stage(0)]
        backward["output"] = [product, product, *rest]
    if axis in ("input", "whole"):
        forward["input"] = [Stage(weight), product, Stage(2 * x), *[Stage(0)] * 3]
        rest = [*[Stage(2 * x)] * 4, Stage(3 * weight), *[Stage(0)] * 4]
        backward["input"] = [product, product, *rest]
    return Costs(forward, backward, device, device.rate(size))


def _convolution_sizes(call: Call, conv: Geometry) -> tuple[float, float, float, float]:
    """Returns the bytes of the input, of the output and of `W`, and the operations of the
    product."""
    size = call.x_dtype.itemsize
    sizes = conv.output_sizes(call.x_shape[2:], call.v_shape[2:])
    batch, weight = call.x_shape[0], math.prod(call.v_shape)
    pixels = batch * math.prod(call.x_shape[2:] if conv.transposed else sizes)
    y = size * batch * conv.out_channels(call.v_shape) * math.prod(sizes)
    return size * math.prod(call.x_shape), y, size * weight, 2.0 * pixels * weight


def _columns(call: Call, conv: Geometry) -> int:
    """Returns the columns of the product that a convolution is: the pixels of its smaller side."""
    sizes = call.x_shape[2:]
    pixels = sizes if conv.transposed else conv.output_sizes(sizes, call.v_shape[2:])
    return call.x_shape[0] * math.prod(pixels)


def _vendors(device: Device, operations: float, columns: int) -> float:
    """Returns the operations of PyTorch's product, with those that its efficiency costs on this
    processor if it has few columns."""
    return operations / device.few if columns <= FEW_COLUMNS else operations


# --- the native library --------------------------------------------------------------------------


def native_linear(call: Call) -> Costs:
    """Returns the candidates `scaled`, `materialize` and `widen` of the native library, for dim=0.

    The first two are those of the ATen path, with one pass in place of several operations. With few
    rows, the pass of the product also computes the norms. These products of few rows are computed
    in float32 from a `V` of any dtype. Otherwise `scaled` needs one dtype, which must not be
    float16, and a product of oneDNN. `widen` forms `W` in float32 for an `x` in half precision.
    """
    device = native()
    n, k = call.v_shape
    m = math.prod(call.x_shape[:-1])
    size = call.x_dtype.itemsize
    x, y, w, v = size * m * k, size * m * n, size * n * k, call.v_dtype.itemsize * n * k
    operations = 2.0 * m * n * k
    forward, backward = {}, {}
    own, slow = limits.is_own(call), call.x_dtype in vendor.SLOW
    if own or (call.x_dtype == call.v_dtype != torch.float16 and not slow):
        own_operations = operations / device.own
        product = Stage(x + y + v, own_operations if own else _vendors(device, operations, m))
        forward["scaled"] = [product] if own else [Stage(v), product, Stage(2 * y)]
        finish = Stage(2 * v if own or keeps_product(call) else w + 2 * v)
        backward["scaled"] = [Stage(2 * y), product, product, finish]
    # The empty stage is the call of PyTorch's layer with `W`.
    for name, (slowness, slowness_of_grad), wider in _formed(call):
        formed = wider * w
        product = Stage(wider * (x + y) + formed, _vendors(device, operations, m))
        casts = [Stage(3 * x), Stage(3 * y)] if wider > 1 else []
        forward[name] = [Stage(v + formed), Stage(0), *casts, *_slower([product], slowness)]
        grads = _slower([product, product], slowness_of_grad)
        backward[name] = [Stage(v + formed), *casts, *grads, Stage(formed + 2 * v)]
    return Costs(forward, backward, device, device.rate(size))


def _formed(call: Call) -> list[tuple[str, tuple[float, float], int]]:
    """Returns the native library's variants that form `W`. For each, it returns the slowness of
    PyTorch's forward and backward with that `W`, and how many times as wide `W` is as `x`."""
    if call.x_dtype.itemsize > 2:
        return [("materialize", (1, 1), 1)]
    widened = ("widen", (1.0, 1.0), 2)
    if call.conv is not None and vendor.is_wrong_for(call.x_dtype, len(call.v_shape)):
        return [widened]
    if call.x_dtype in vendor.SLOW:
        return [("materialize", (SLOW_FORWARD, SLOW_BACKWARD), 1), widened]
    return [("materialize", (1, 1), 1)]


def native_convolution(call: Call, conv: Geometry) -> Costs:
    """Returns the candidates `output` or `input`, `unfold` and `materialize` of the native library.

    `output`, `input` and `materialize` are those of the ATen path, with one pass in place of
    several operations. PyTorch's convolution first copies its weight into a layout of its own. A
    fresh `W` costs more than its bytes. In the forward it is in the caches of the threads that
    wrote it, which are not those that read it, and every page of a large one is mapped anew. In the
    backward, scaling the output takes a second convolution call, which reads everything once more.

    `unfold` writes the unfolded input, a number for every tap and pixel, and multiplies it by `V`
    with one read of `V`. It suits a large weight over few pixels. It is a candidate if those
    numbers are few, or not many more than the weight's.
    """
    device = native()
    size = call.x_dtype.itemsize
    x, y, w, operations = _convolution_sizes(call, conv)
    # A weight of a few MiB stays in cache between two passes.
    weight = w / device.cache if w <= 2**22 else w
    moved = x + y + weight
    flops = _padded(call, conv) * operations / CONVOLUTION_EFFICIENCY
    flops = _vendors(device, flops, _columns(call, conv))
    product = [*[Stage(0)] * CONVOLUTION_CALLS, Stage(2 * weight), Stage(moved, flops)]
    grad = [*[Stage(0)] * GRADIENT_CALLS, Stage(2 * weight), Stage(moved, flops)]
    pages = 10 * w if w > FRESH_PAGES else 0
    forward, backward = {}, {}
    for name, (slow, slow_grad), wider in _formed(call):
        casts = [Stage(3 * x), Stage(3 * y)] if wider > 1 else []
        formed = [Stage(wider * 4 * weight + pages), *casts]
        forward[name] = [*formed, *_slower(product, slow)]
        formed = [Stage(wider * 2 * weight + pages), *casts]
        backward[name] = [*formed, *_slower([*grad, *grad], slow_grad), Stage(3 * weight)]
    if call.dim == 0 and scales_late(call):  # a scale along taps belongs to neither side
        if conv.transposed:
            forward["input"] = [Stage(weight), *product, Stage(2 * x)]
            backward["input"] = [Stage(2 * x), *grad, *grad, Stage(3 * weight)]
        else:
            forward["output"] = [Stage(weight), *product, Stage(2 * y, launches=0)]
            again = Stage(2 * (x + y + weight))
            backward["output"] = [Stage(2 * y), *grad, again, *grad, Stage(3 * weight)]
    unfolded = Unfolded.of(call, conv)
    few = size * unfolded.numbers <= max(2 * w, UNFOLDED_BYTES)
    if few and scales_late(call) and not call.channels_last:
        forward["unfold"], backward["unfold"] = unfolded.stages(
            call, conv, device.own, x, y, weight
        )
    return Costs(forward, backward, device, device.rate(size))


def _padded(call: Call, conv: Geometry) -> float:
    """Returns by how much PyTorch's convolution has more operations than the layer. Channels are
    padded to whole vectors, or to halves of one. A depthwise one computes few anyway."""
    lanes = limits.VECTOR_BYTES // 4
    channels = call.v_shape[0] // conv.groups, call.v_shape[1]
    if min(channels) == 1:
        return 1.0
    blocks = (lanes // 2 if c <= lanes // 2 else lanes for c in channels)
    return math.prod(math.ceil(c / b) * b / c for c, b in zip(channels, blocks, strict=True))


def _slower(stages: list[Stage], slowness: float) -> list[Stage]:
    return [stage._replace(operations=slowness * stage.operations) for stage in stages]


class Unfolded(NamedTuple):
    """Describes an unfolded convolution.

    Attributes:
        numbers: the elements of the unfolded input.
        runs: the runs along taps or pixels in which they are copied.
        operations: the operations of a product with it. Its sizes are padded to whole panels and
            tiles.
    """

    numbers: float
    runs: float
    operations: float

    @staticmethod
    def of(call: Call, conv: Geometry) -> Unfolded:
        rows, length = call.v_shape[0] // conv.groups, math.prod(call.v_shape[1:])
        sizes, taps = call.x_shape[2:], call.v_shape[2:]
        pixels = sizes if conv.transposed else conv.output_sizes(sizes, taps)
        columns = _columns(call, conv)
        numbers = conv.groups * length * columns
        panel, tile = limits.panel(call.x_dtype.itemsize), limits.TILE_ROWS
        padded = math.ceil(rows / tile) * tile * math.ceil(length / panel) * panel * conv.groups
        run = taps[-1] if taps[-1] >= limits.LONG_LINE else pixels[-1]
        return Unfolded(numbers, numbers / run, 2.0 * padded * columns)

    def stages(
        self, call: Call, conv: Geometry, efficiency: float, x: float, y: float, weight: float
    ) -> tuple[list[Stage], list[Stage]]:
        """Returns the forward and the backward. `efficiency` is the device's `own`. `x`, `y` and
        `weight` are bytes.

        The forward of a convolution, and `dX` of a transposed one, unfold an image and multiply it
        by `V`, which gives a sum for each number of the other image. `dX`, and the forward of a
        transposed one, multiply by `Vᵀ` and add the results to an image.
        """
        size, moved = call.x_dtype.itemsize, x + y + weight
        product = Stage(moved, self.operations / (UNFOLDED_EFFICIENCY * efficiency))
        unfold = Stage(UNFOLDED * size * self.numbers + RUN * self.runs)
        fold = Stage(FOLDED * size * self.numbers + RUN * self.runs)
        sums = Stage(SUMMED * (x if conv.transposed else y), launches=0)
        norms = [] if call.dim == 0 else [Stage(weight)]
        finish = Stage(weight if call.dim == 0 else 3 * weight)
        if conv.transposed:
            return [*norms, product, fold], [unfold, product, sums, product, finish]
        return [*norms, unfold, product, sums], [product, fold, unfold, product, finish]


# --- the Triton path -----------------------------------------------------------------------------


# A product of the vendor's takes the overhead of this many launches, since its kernels take longer
# to begin and to end than a pass does.
PRODUCT_LAUNCHES = 2
# The vendor's products round the rows of `x` up to a multiple of this, except a single row.
VENDOR_ROWS = 128


def one_pass_rows(itemsize: int, grad: bool = False) -> int:
    """Returns how many rows one tile of the one-pass kernels holds, of the forward or of the
    weight's gradient. `itemsize` is that of the wider of `x` and `V`. A tile of more rows would not
    fit the registers."""
    if itemsize > 2:
        return 32
    return 64 if grad else 128


def triton_linear(call: Call, device: Device) -> Costs:
    """Returns the candidates `one_pass`, `scaled` and `materialize` on a GPU.

    `one_pass` reads `V` once and launches once, for a few rows. Each of its programs reads all of
    `x`, so it is bound by what a multiprocessor takes in. In the backward it recomputes `dW`, and
    writes nothing but `dV`. `scaled` has the vendor's product with `V` itself, after a pass that
    reads `V` for the norms, and scales the smaller activations in another pass. `materialize`
    writes `W` instead, which costs less than these passes for many rows. In the backward all but
    `one_pass` form `dW` and finish it in a pass.

    A `W` that is kept from the forward spares the backward a pass.
    """
    n, k = call.v_shape
    m = math.prod(call.x_shape[:-1])
    x_size, v_size = call.x_dtype.itemsize, call.v_dtype.itemsize
    x, y, v, w = x_size * m * k, x_size * m * n, v_size * n * k, x_size * n * k
    dim, size = call.dim, max(x_size, v_size)
    rows = m if m == 1 else math.ceil(m / VENDOR_ROWS) * VENDOR_ROWS

    def passes(moved: float) -> Stage:
        return Stage(moved / device.passes)

    product = Stage(x + y + w, 2.0 * rows * n * k, launches=PRODUCT_LAUNCHES)
    form = passes(v + w)
    late = fits_unscaled(call.x_dtype, call.v_dtype)
    scale, sums, finish = passes(2 * (x if dim == 1 else y)), passes(y), passes(w + 2 * v)

    forward = {"materialize": [form, product]}
    if late:
        forward = {"scaled": [passes(v), product, scale]} | forward
    if dim == 0 and m <= one_pass_rows(size) and not narrows_range(call.x_dtype, call.v_dtype):
        # A program has as many rows of `V` as leave no multiprocessor idle, or 16.
        programs = max(1, min(device.multiprocessors, n / 16))
        tile = 64 if m <= 64 else 128
        taken_in = v / programs + (tile if size == 2 else m) * x_size * k
        intake = device.intake if size == 2 else device.wide_intake
        products = 0.0 if x_size < 4 or call.tf32 else 2.0 * m * n * k / device.ieee
        least = taken_in / intake
        forward = {"one_pass": [Stage(x + v + y, products, least)]} | forward

    dx = [form, product]
    if late:
        dx = [product, scale] if dim == 1 else [scale, product]
    backward = {"materialize": [form, product, product, sums, finish]}
    if late:  # the pass over `dY` sums its columns as well, for a few rows
        bias = [sums] if dim == 1 or m > tiles.SUMMED_ROWS else []
        backward = {"scaled": [*dx, *bias, product, finish]} | backward
    if dim is not None and m <= one_pass_rows(size, grad=True):
        slices, walked = (k, y) if dim == 1 else (n, x)
        programs = math.ceil(slices / tiles.grad_slices(m, slices, size))
        busy = min(device.multiprocessors, programs)
        taken_in = 3 * v / busy + 2 * walked * programs / busy
        products = 0.0 if x_size < 4 or call.tf32 else 8.0 * m * n * k
        grad = Stage((x + y + 3 * v) / device.passes, products, taken_in / device.grad_intake)
        backward = {"one_pass": [*dx, grad]} | backward
    kept = [product, product, sums, finish]
    return Costs(forward, backward, device, device.rate(x_size, call.tf32), kept)


# The vendor's convolutions split a sum of more numbers than this.
VENDOR_LENGTH = 2**13


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
    form, finish = Stage(2 * v + own.w), Stage(2 * (dw + v) + v)
    repacks = not call.channels_last
    repack_x, repack_y = (
        [Stage(2 * side, 0.0, constants.repack)] * repacks for side in (own.x, own.y)
    )

    forward = {
        "packed": [form, *repack_x, *own.product(conv.transposed)],
        "materialize": [form, own.vendors(own.length(conv.transposed))],
    }
    narrows = narrows_range(call.x_dtype, call.v_dtype)
    if conv.has_small_groups(call.v_shape) and conv.owns_slices(call.dim) and not narrows:
        forward["one_pass"] = [*repack_x, *own.product(False)]
    vendors_dx = own.vendors(own.length(not conv.transposed), is_grad=True)
    bias = Stage(own.y, 0.0, constants.step)  # the sum of `dY` alone
    grad = [*repack_x, *own.gradient(), finish] + ([bias] if conv.transposed else [])
    backward = {
        "packed": [form, *repack_y, *own.product(not conv.transposed), *grad],
        "weight_grad": [form, vendors_dx, *repack_y, *grad],
        "materialize": [form, vendors_dx, own.vendors(own.small, is_grad=True), bias, finish],
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
        return cls(call, conv, device, *_convolution_sizes(call, conv), *pixels)

    def vendors(self, length: float, is_grad: bool = False) -> Stage:
        """Returns one of the vendor's products, each of whose results sums `length` numbers. A call
        has a fixed time, and the sum is bound by latency, but for a long one, which is split."""
        call, conv, device = self.call, self.conv, self.device
        constants, moved = device.convolution, self.x + self.y + self.w
        if conv.has_small_groups(call.v_shape):
            converts = 2 * (self.x + self.y) * call.channels_last
            return Stage(moved + converts, 0.0, constants.vendor_direct, 1 + call.channels_last)
        # Few channels are padded.
        as_it_lies = call.channels_last and len(conv.stride) > 1 and call.v_shape[1] >= 16
        least, step = constants.vendor, constants.vendor_step
        if as_it_lies:
            least = constants.vendor_native_grad if is_grad else constants.vendor_native
            step = constants.vendor_native_step
        least += min(length, VENDOR_LENGTH) * step + 4 * self.w / device.bandwidth
        if conv.groups > 1:
            least += self.operations / (constants.vendor_grouped * device.rates[0])
        return Stage(moved, 0.0, least + self.operations / device.rate(self._size, call.tf32))

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

    def _seconds(self, steps: float, ieee: float) -> float:
        """Returns the time of steps of a loop, and of what it computes without tensor cores, where
        it reaches the fraction `ieee` of the rate."""
        constants = self.device.convolution
        seconds = steps * constants.step
        if self.ieee:
            rate = self.device.rate(self._size) * ieee
            seconds = max(seconds, self.operations / rate)
        return seconds

    def product(self, phased: bool) -> list[Stage]:
        """Returns the launches of a product: forward, or `dX`."""
        moved, conv = self.x + self.y + self.w, self.conv
        constants = self.device.convolution
        if conv.has_small_groups(self.call.v_shape):
            return [Stage(moved, 0.0, constants.direct)]
        o, r = self._channels(phased)
        phases = math.prod(conv.stride) if phased else 1
        tile = tiles.product(
            self.phase if phased else self.small,
            *(o, r, self.length(phased) / r, phases * conv.groups, self._size, self.ieee),
            self.device.multiprocessors,
        )
        steps = tile.steps * (constants.flat ** len(conv.stride) if r < 16 else 1)
        found = [Stage(moved, self.operations, self._seconds(steps, constants.ieee))]
        if tile.splits > 1:
            result = self.y if phased == conv.transposed else self.x
            found.append(Stage((4 * tile.splits / self._size + 1) * result, 0.0, constants.added))
        return found

    def gradient(self) -> list[Stage]:
        """Returns the launches of the gradient of the weight."""
        call, conv, device = self.call, self.conv, self.device
        constants = device.convolution
        o, r = self._channels(False)
        taps = math.prod(call.v_shape[2:])
        dw = float(_grad_size(call) * math.prod(call.v_shape))
        if conv.has_small_groups(call.v_shape):
            return [Stage(self.x + self.y + dw, 0.0, constants.direct)]
        block_m, block_o, block_r = tiles.gradient(o, r, self._size)
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
        seconds = self._seconds(walked, constants.grad_ieee)
        found = [Stage(self.x + self.y + parts * dw, self.operations, seconds)]
        if parts > 1:
            least = tiles.blocks(parts, tiles.ADDED) * constants.added
            found.append(Stage(parts * dw + dw, 0.0, least))
        return found
