"""The cost model counts the bytes, operations and launches of a call, and estimates its time.

The constants are those of a device class, not of one machine. They serve to rank the candidates,
not to predict times. `variants.py` picks the cheapest. This file has the candidates on a CPU, and
`gpu_costs.py` has those on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..backends import aten_weight, vendor
from ..backends.native import limits
from ..call import Call, Geometry
from . import rates
from .devices import Device, cpu, gpu, native
from .gpu_costs import triton_convolution, triton_linear
from .stages import Costs, Stage, convolution_sizes, keeps_product

# oneDNN's convolution, and each of its gradients, has the overhead of this many stages of the
# native library. It reaches this multiple of the rate.
CONVOLUTION_CALLS = 100
CONVOLUTION_EFFICIENCY = 1.05
# If a number of channels is no multiple of a vector's, it costs so many times the bytes of the
# weight and of both images more.
ODD_WEIGHT, ODD_IMAGE = 1, 3.6
# The same of PyTorch's own loops, which unfold the image. A number of it costs so many times its
# bytes, and so it does if it is added to the image. A line of pixels costs this many bytes more.
LOOP_CALLS, LOOP_EFFICIENCY = 20, 0.9
LOOP_UNFOLDED, LOOP_FOLDED, LOOP_LINE = 2, 7.5, 300
# The native library's own products reach this multiple of the rate of PyTorch's product of many
# columns. Columns that do not fill a strip of two vectors take so many times as long as others. To
# copy a row, or to add up its norm, takes as long as so many columns of the product.
OWN_EFFICIENCY, SINGLE, NORMED = 1.25, 1.3, 5
# A tile of few rows takes as long as one of so many.
LEAST_ROWS = 4
# To transpose a number of the input costs so many times its bytes.
TURNED = 2
# A number of an unfolded image that is written, or added to the image, costs so many times its
# bytes.
UNFOLDED, FOLDED = 2, 2.7
# A run of numbers that is copied costs as much as this many bytes.
RUN = 20
# An unfolded forward and backward have the overhead of this many stages more.
UNFOLD_CALLS, UNFOLD_GRAD_CALLS = 5, 36
# Forming a `W` for PyTorch's product has the overhead of this many stages in a linear layer. In the
# forward of a convolution, it costs so many times the bytes of `W`.
FORMED_CALLS, FORMED = 2, 12
# An unfolded input may take this many bytes whatever the size of the weight.
UNFOLDED_BYTES = 2**18
# If the rates of oneDNN's products in half precision are not known, the library's own serve at most
# so many rows, and only if `W` would have to be formed for oneDNN's.
FEW_MIXED_ROWS = 8
# PyTorch's own loops for half precision (`vendor.SLOW`) take this many times as long as a product
# in float32, in the forward and in the backward.
SLOW_FORWARD, SLOW_BACKWARD = 4, 50
# A backward in Python has the overhead of so many operations of ATen more.
FUNCTION_CALLS = 8
# A product of at most so many columns has few of them.
FEW_COLUMNS = 64
# A weight of at most so many bytes stays in the cache between two passes of the native library, and
# a smaller one between two operations of ATen on a linear layer's weight.
CACHED = 2**22
# For a `W` of more bytes than this, the allocator maps fresh pages each time.
FRESH_PAGES = 2**24


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


def aten_linear(call: Call) -> Costs:
    """Returns the candidates `scaled` and `materialize` of the ATen path.

    Both compute the norms and the same matmuls. Scaling the output (the input, for dim=1) reads and
    writes `M·N` (`M·K`) numbers. Materialising `W` writes and reads `N·K`. Which is cheaper depends
    on the batch. In the backward, `dW` has to be read again together with `V` for the dots
    `⟨dW, V⟩`, unless a smaller product holds them already. For dim=1 and None, that product is
    `dX` before its scale. For dim=0, it is the forward's `x Vᵀ`. Materialising launches fewer
    operations, which matters most for small layers. A step that keeps `W` has no backward in
    Python.
    """
    device = cpu(call.x_dtype)
    n, k = call.v_shape
    m = math.prod(call.x_shape[:-1])
    size = call.x_dtype.itemsize
    x, y, w = size * m * k, size * m * n, float(size * n * k)
    norms = Stage(w)
    if w < CACHED:
        w /= device.cache
        norms = Stage(2 * w)  # from the cache, they are bound by their arithmetic
    activation = x if call.dim == 1 else y
    product = Stage(x + y + w, vendors(device, 2.0 * m * n * k, m))
    forward = {"materialize": [Stage(3 * w), product]}
    backward = {"materialize": [Stage(2 * w), product, product, Stage(5 * w)]}
    kept = [product, product, Stage(3 * w)] if aten_weight.keeps_weight(call) else None
    if call.dim == 0 and call.x_dtype == call.v_dtype == torch.bfloat16:
        scaled = [Stage(2 * activation), product, product, Stage(5 * w)]
        backward = {"scaled": scaled} | (backward if kept else {})
    if scales_late(call):
        # The first candidate wins a tie.
        forward = {"scaled": [norms, Stage(2 * activation), product]} | forward
        if keeps_product(call) or call.dim != 0:
            finish = [*[Stage(2 * activation)] * 3, Stage(2 * w), *[Stage(0)] * 5]
        else:
            finish = [Stage(2 * activation), Stage(0), Stage(5 * w)]
        backward = {"scaled": [product, product, *finish]} | backward
    called = Stage(0, launches=FUNCTION_CALLS)
    backward = {name: [*stages, called] for name, stages in backward.items()}
    return Costs(forward, backward, device, device.rate(size), kept)


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
    device = cpu(call.x_dtype)
    size = call.x_dtype.itemsize
    x, y, w, operations = convolution_sizes(call, conv)
    axis = conv.scale_axis(call.dim) if scales_late(call) else "none"
    # A weight of a few MiB stays in cache between two operations.
    weight = w / device.cache if w <= 2**23 else w
    flops = vendors(device, operations, _columns(call, conv)) / device.conv
    product = Stage(x + y + weight, flops)
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


def _smaller_side(call: Call, conv: Geometry) -> Sequence[int]:
    """Returns the spatial sizes of the image whose pixels a convolution's product has."""
    sizes = call.x_shape[2:]
    return sizes if conv.transposed else conv.output_sizes(sizes, call.v_shape[2:])


def _columns(call: Call, conv: Geometry) -> int:
    """Returns the columns of the product that a convolution is: the pixels of its smaller side."""
    return call.x_shape[0] * math.prod(_smaller_side(call, conv))


def vendors(device: Device, operations: float, columns: int) -> float:
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
    device = native(call.x_dtype)
    n, k = call.v_shape
    m = math.prod(call.x_shape[:-1])
    size = call.x_dtype.itemsize
    x, y, w, v = size * m * k, size * m * n, size * n * k, call.v_dtype.itemsize * n * k
    operations = 2.0 * m * n * k
    forward, backward = {}, {}
    own = is_own(call)
    if own or _may_be_late(call):
        forward["scaled"] = _scaled(call, device)["own" if own else "late"]
        product = max(forward["scaled"], key=lambda stage: stage.operations)
        grads = [product, product]
        if own:
            grad = product._replace(operations=operations / _own_efficiency(call, device))
            grads = [grad, grad]
        finish = Stage(2 * v if own or keeps_product(call) else w + 2 * v)
        backward["scaled"] = [Stage(2 * y), *grads, finish]
    # The empty stage is the call of PyTorch's layer with `W`.
    for name, (slowness, slowness_of_grad), wider in _formed(call):
        formed = wider * w
        form = Stage(v + formed + _pages(formed), launches=FORMED_CALLS)
        product = Stage(wider * (x + y) + formed, vendors(device, operations, m))
        casts = [Stage(3 * x), Stage(3 * y)] if wider > 1 else []
        forward[name] = [form, Stage(0), *casts, *_slower([product], slowness)]
        grads = _slower([product, product], slowness_of_grad)
        backward[name] = [form, *casts, *grads, Stage(formed + 2 * v)]
    return Costs(forward, backward, device, device.rate(size))


def _may_be_late(call: Call) -> bool:
    """Returns whether the library scales PyTorch's product with `V`."""
    return call.x_dtype == call.v_dtype != torch.float16 and call.x_dtype not in vendor.SLOW


def is_own(call: Call) -> bool:
    """Returns whether the products of a linear layer's variant `scaled` are the library's own.
    Those of one row always are, and those of some dtypes are the only ones."""
    rows = math.prod(call.x_shape[:-1])
    if rows == 1:
        return True
    if call.x_dtype.itemsize == 2 and call.x_dtype not in vendor.SLOW and rates.find() is None:
        return rows <= FEW_MIXED_ROWS and call.x_dtype != call.v_dtype and limits.may_be_own(call)
    if not limits.may_be_own(call) or not _may_be_late(call):
        return limits.may_be_own(call)
    device = native(call.x_dtype)
    rate = device.rate(call.x_dtype.itemsize)
    return Costs(_scaled(call, device), {}, device, rate).cheapest_forward() == "own"


def _scaled(call: Call, device: Device) -> dict[str, list[Stage]]:
    """Returns the ways to a product with `V` that is scaled. The library's own product also has the
    norms and the scales, of an input that is transposed. PyTorch's is between two passes."""
    n, k = call.v_shape
    rows = math.prod(call.x_shape[:-1])
    size = call.x_dtype.itemsize
    y, v = size * rows * n, call.v_dtype.itemsize * n * k
    moved = size * rows * k + y + v
    operations = rows_product(n, k, rows, max(4, size))
    own = [
        Stage(TURNED * size * rows * k, launches=0),
        Stage(moved, operations / _own_efficiency(call, device)),
    ]
    product = Stage(moved, vendors(device, 2.0 * rows * n * k, rows))
    return {"own": own, "late": [Stage(v), product, Stage(2 * y)]}


def _own_efficiency(call: Call, device: Device) -> float:
    """Returns the rate of the library's own products as a multiple of the device's for this dtype.
    Those of half precision are computed in float32."""
    size = call.x_dtype.itemsize
    wide = device.rate(max(4, size)) / device.rate(size)
    return OWN_EFFICIENCY * device.own * wide


def rows_product(rows: int, length: int, columns: int, itemsize: int) -> float:
    """Returns the operations of the library's own product of `V`, `(rows, length)`, with a matrix
    of so many columns, with those that its efficiency costs, and tiles that are not full."""
    strip = 2 * limits.VECTOR_BYTES // itemsize
    single = columns % strip
    if rest := single % (strip // 2):  # their number is padded to a power of two
        single += 2 ** math.ceil(math.log2(rest)) - rest
    width = columns // strip * strip + SINGLE * single + NORMED
    return 2.0 * padded_rows(rows) * length * width


def padded_rows(rows: int) -> int:
    """Returns how many rows of `V` a product takes as long for. Those that do not fill a tile are
    in tiles of half as many rows, and so on."""
    taken, height = 0, limits.TILE_ROWS
    while rows:
        tiles, rows = divmod(rows, height)
        taken += tiles * max(height, LEAST_ROWS)
        height //= 2
    return taken


def _formed(call: Call) -> list[tuple[str, tuple[float, float], int]]:
    """Returns the native library's variants that form `W`. For each, it returns the slowness of
    PyTorch's forward and backward with that `W`, and how many times as wide `W` is as `x`."""
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
    device = native(call.x_dtype)
    size = call.x_dtype.itemsize
    x, y, w, _ = convolution_sizes(call, conv)
    weight = w / device.cache if w <= CACHED else w
    product = grad = _vendors_convolution(call, conv, device)
    pages = _pages(w)
    forward, backward = {}, {}
    for name, (slow, slow_grad), wider in _formed(call):
        casts = [Stage(3 * x), Stage(3 * y)] if wider > 1 else []
        formed = [Stage(wider * FORMED * weight + pages), *casts]
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
        moved = x + y + weight
        forward["unfold"], backward["unfold"] = unfolded.stages(
            call, conv, device.own, moved, weight
        )
    return Costs(forward, backward, device, device.rate(size))


def _pages(w: float) -> float:
    """Returns the bytes that the fresh pages of a `W` of `w` bytes cost."""
    return 10 * w if w > FRESH_PAGES else 0


def _vendors_convolution(call: Call, conv: Geometry, device: Device) -> list[Stage]:
    """Returns the stages of PyTorch's convolution, or of one of its gradients."""
    x, y, w, operations = convolution_sizes(call, conv)
    weight = w / device.cache if w <= CACHED else w
    moved = x + y + weight
    if not vendor.uses_onednn(call.x_shape, call.v_shape, call.x_dtype, conv):
        written = LOOP_FOLDED if conv.transposed else LOOP_UNFOLDED
        unfolded, line = Unfolded.of(call, conv), _smaller_side(call, conv)[-1]
        unfold = written * call.x_dtype.itemsize * unfolded.numbers
        unfold += LOOP_LINE * unfolded.numbers / line
        if max(*conv.stride, *call.v_shape[2:]) == 1 and not any(conv.padding):
            unfold = 0  # the image is its own unfolded one
        columns = math.prod(_smaller_side(call, conv))  # every image has a product of its own
        flops = operations / LOOP_EFFICIENCY * _padded_columns(columns) / columns
        calls = Stage(0, launches=LOOP_CALLS * conv.groups)
        return [calls, Stage(unfold), Stage(moved, vendors(device, flops, columns))]
    channels = call.v_shape[0] // conv.groups, call.v_shape[1]
    is_odd = min(channels) > 1 and any(c % (limits.VECTOR_BYTES // 4) for c in channels)
    reordered = 2 * weight + (ODD_WEIGHT * w + ODD_IMAGE * (x + y) if is_odd else 0)
    flops = _padded(call, conv) * operations / (CONVOLUTION_EFFICIENCY * device.conv)
    flops = vendors(device, flops, _columns(call, conv))
    return [Stage(0, launches=CONVOLUTION_CALLS), Stage(reordered), Stage(moved, flops)]


def _padded_columns(columns: int) -> float:
    """Returns how many columns PyTorch's product takes as long for. It computes whole vectors of
    columns. For less than one, it has other kernels, which are slower."""
    lanes = limits.VECTOR_BYTES // 4
    if columns < lanes:
        return (3.5 if columns <= lanes // 2 else 2.25) * lanes
    return math.ceil(columns / lanes) * lanes + lanes / 3


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
        summed: the operations of a product that sums over it.
        product: the operations of another product with it. Its sizes are padded to whole panels
            and tiles.
    """

    numbers: float
    runs: float
    summed: float
    product: float

    @staticmethod
    def of(call: Call, conv: Geometry) -> Unfolded:
        rows, length = call.v_shape[0] // conv.groups, math.prod(call.v_shape[1:])
        taps, columns = call.v_shape[2:], _columns(call, conv)
        numbers = conv.groups * length * columns
        size = call.x_dtype.itemsize
        panel, tile = limits.panel(size), limits.TILE_ROWS
        summed = conv.groups * rows_product(rows, length, columns, size)
        padded = math.ceil(rows / tile) * tile * math.ceil(length / panel) * panel
        run = taps[-1] if taps[-1] >= limits.LONG_LINE else _smaller_side(call, conv)[-1]
        return Unfolded(numbers, numbers / run, summed, 2.0 * conv.groups * padded * columns)

    def stages(
        self, call: Call, conv: Geometry, efficiency: float, moved: float, weight: float
    ) -> tuple[list[Stage], list[Stage]]:
        """Returns the forward and the backward. `efficiency` is the device's `own`. `moved` are the
        bytes of both images and the weight, and `weight` those of the weight.

        The forward of a convolution, and `dX` of a transposed one, unfold an image and multiply it
        by `V`, which gives a sum for each number of the other image. `dX`, and the forward of a
        transposed one, multiply by `Vᵀ` and add the results to an image.
        """
        size = call.x_dtype.itemsize
        product = Stage(moved, self.product / (OWN_EFFICIENCY * efficiency))
        summed = Stage(moved, self.summed / (OWN_EFFICIENCY * efficiency))
        unfold = Stage(UNFOLDED * size * self.numbers + RUN * self.runs)
        fold = Stage(FOLDED * size * self.numbers + RUN * self.runs)
        norms = Stage(0 if call.dim == 0 else weight, launches=UNFOLD_CALLS)
        finish = Stage(weight if call.dim == 0 else 3 * weight, launches=UNFOLD_GRAD_CALLS)
        if conv.transposed:
            return [norms, product, fold], [unfold, summed, product, finish]
        return [norms, unfold, summed], [product, fold, unfold, product, finish]
