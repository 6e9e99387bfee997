"""Which backend and which variant serves a call.

The backend: a forced one (`use_backend`, or the environment variable `WN_KERNELS_BACKEND`) or, by
default, Triton for tensors on a GPU and ATen for everything else. A forced backend that cannot
serve a call raises and says why.

The variant, by a cost model. Each candidate is described by the bytes it moves through memory, the
floating-point operations it does and the operations it launches; its time is estimated as

    launches · overhead + max(bytes / bandwidth, operations / rate)

and the cheapest candidate is picked. The constants are those of a device class, not of one
machine: they have to rank the candidates, not to predict the clock.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .backends.reference import narrows_range
from .backends.shapes import Geometry

BACKENDS = ("triton", "aten", "reference")
ENVIRONMENT_VARIABLE = "WN_KERNELS_BACKEND"


# --- backend -----------------------------------------------------------------------------------


def _backend_from_environment() -> str | None:
    name = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower()
    if name in ("", "auto"):
        return None
    return _checked_backend(name, f"the environment variable {ENVIRONMENT_VARIABLE}")


def _checked_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        expected = f"one of {BACKENDS} or 'auto'"
        raise ValueError(f"{source} names the backend {name!r}; expected {expected}")
    return name


_forced: str | None = _backend_from_environment()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend inside a `with` block, for every thread of the process.

    Args:
        name: `"triton"`, `"aten"`, `"reference"`, or `"auto"` for the planner's own choice. The
            backward of a layer runs where its forward did, also outside the block.

    Raises:
        ValueError: the name is unknown. A call that the forced backend cannot serve raises
            `RuntimeError` and says why; it never falls back in silence.
    """
    global _forced
    before = _forced
    _forced = None if name == "auto" else _checked_backend(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def goes_to_aten(backend: str) -> bool:
    """Whether the ATen path is called directly; a compiler gets the registered operator."""
    return backend == "aten" and (_forced is None or not is_compiling())


def is_forced() -> bool:
    """Whether a backend is forced."""
    return _forced is not None


@functools.cache
def triton_unavailable() -> str | None:
    """Why Triton cannot be used in this process, or `None` if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        import triton
    except Exception as error:  # a broken installation must not break the ATen path
        return f"importing triton failed: {error!r}"
    if triton.knobs.runtime.interpret:
        return None
    try:
        triton.runtime.driver.active.get_current_target()
    except RuntimeError as error:
        return f"{error} (on a machine without a GPU, TRITON_INTERPRET=1 runs Triton's interpreter)"
    return None


def choose_backend(x: Tensor) -> str:
    """The backend for tensors like `x`; `""` while a compiler traces and none is forced: the
    operator then asks again when it runs.

    Raises:
        RuntimeError: a forced backend cannot serve the call.
    """
    if _forced is not None:
        if _forced == "triton" and (reason := triton_unavailable()):
            raise RuntimeError(f"backend 'triton' was forced but cannot serve this call: {reason}")
        return _forced
    if is_compiling():
        return ""
    return "triton" if x.is_cuda and triton_unavailable() is None else "aten"


# --- variant -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """The constants of a device class.

    Attributes:
        bandwidth: bytes per second from memory.
        rate: floating-point operations per second of the vendor's matmul, by bytes per element.
        overhead: seconds per launched operation.
        efficiency: what our own matmul kernel reaches of the vendor's.
        inline_norm: factor on the operations of a matmul whose loop also takes the norm.
        prologue: factor on the operations of a matmul whose loop scales its tile of `V`.
        tf32_rate: operations per second of a float32 matmul in TF32.
    """

    bandwidth: float
    rate: dict[int, float]
    overhead: float
    efficiency: float = 1.0
    inline_norm: float = 1.0
    prologue: float = 1.0
    tf32_rate: float = 0.0


# Two cores of a current server: measured, docs/performance.md.
CPU = Device(bandwidth=2e10, rate={2: 1e11, 4: 1e11, 8: 5e10}, overhead=8e-6)

# Data sheet of an H100 SXM: 3.35 TB/s; dense, 989 TFLOP/s in bfloat16, 495 in TF32, 67 in float32
# and float64. The efficiency is an assumption; the factors of the inline norm and of the prologue
# are read from compiled code (docs/performance.md).
GPU = Device(
    bandwidth=3.35e12,
    rate={2: 9.89e14, 4: 6.7e13, 8: 6.7e13},
    overhead=4e-6,
    efficiency=0.8,
    inline_norm=2.1,
    prologue=3.8,
    tf32_rate=4.95e14,
)


class Stage(NamedTuple):
    """One launched operation of a candidate: what it moves and what it computes."""

    bytes: float
    operations: float = 0.0


def seconds(stages: list[Stage], device: Device, rate: float) -> float:
    """The estimated time of a candidate: its stages run one after the other."""
    return sum(
        device.overhead + max(s.bytes / device.bandwidth, s.operations / rate) for s in stages
    )


class Path(NamedTuple):
    """The variant of each direction of a layer."""

    forward: str
    backward: str


def _cheapest(candidates: dict[str, list[Stage]], device: Device, rate: float) -> str:
    """The first of the fastest."""
    return min(candidates, key=lambda name: seconds(candidates[name], device, rate))


class AtenLinear(NamedTuple):
    """How the ATen path serves a linear layer: the variant of each direction, and whether the
    forward saves `x Vᵀ` for the backward."""

    forward: str
    backward: str
    keeps_product: bool


@functools.lru_cache(maxsize=4096)
def aten_linear(
    x_shape: torch.Size,
    v_shape: torch.Size,
    x_dtype: torch.dtype,
    v_dtype: torch.dtype,
    dim: int | None,
) -> AtenLinear:
    """`scaled` or `materialize` on the ATen path, for `x` of shape `(*, K)`.

    Both take the norms and do the same matmuls, so only what differs is counted. Scaling the
    output (the input, for dim=1) reads and writes `M·N` (`M·K`) numbers, materialising `W` writes
    and reads `N·K`: the batch decides. In the backward, `dW` has to be read again beside `V` for
    the dots `⟨dW, V⟩`, unless a smaller product holds them already: `dX` before its scale, for
    dim=1 and None, or the forward's `x Vᵀ`. Materialising launches fewer operations, which is
    what counts for small layers.

    The product `x Vᵀ` is kept where it is at most an eighth of `V`'s size: the memory saved for
    backward stays that of the plain layer within 1/8 of its weight.
    """
    if x_dtype != v_dtype or x_dtype.itemsize < 4:
        return AtenLinear("materialize", "materialize", False)
    n, k = v_shape
    m = math.prod(x_shape[:-1])
    size = x_dtype.itemsize
    weight = size * n * k
    activation = size * m * (k if dim == 1 else n)

    def cheaper(scaled: list[Stage], materialize: list[Stage]) -> str:
        candidates = {"scaled": scaled, "materialize": materialize}
        return _cheapest(candidates, CPU, CPU.rate[size])

    forward = cheaper([Stage(2 * activation), Stage(0)], [Stage(2 * weight)])
    keeps_product = forward == "scaled" and dim == 0 and 8 * m <= k
    if keeps_product or dim != 0:
        scaled = [Stage(2 * activation)] * 3 + [Stage(2 * weight)] + [Stage(0)] * 5
    else:
        scaled = [Stage(2 * activation), Stage(0), Stage(5 * weight)]
    backward = cheaper(scaled, [Stage(2 * weight), Stage(5 * weight)])
    return AtenLinear(forward, backward, keeps_product)


# Bytes of a convolution's `W` that are kept for the backward whatever the input's size.
KEPT_WEIGHT = 2**21


class AtenConvolution(NamedTuple):
    """How the ATen path serves a convolution: the variant of each direction, and whether `W` is
    materialised once for both."""

    forward: str
    backward: str
    keeps_weight: bool


@functools.lru_cache(maxsize=4096)
def aten_convolution(
    x_shape: torch.Size,
    v_shape: torch.Size,
    x_dtype: torch.dtype,
    v_dtype: torch.dtype,
    conv: Geometry,
    dim: int | None,
) -> AtenConvolution:
    """`output`, `input` or `materialize` on the ATen path.

    All take the norms and run the same convolution, so only what differs is counted. Scaling a
    side reads and writes its activations, materialising `W` writes and reads the weight: long
    signals and large images materialise, wide layers over few pixels scale. A scale along taps
    belongs to neither side, one over the whole weight to both, and then the smaller one is scaled.

    In the backward, scaling the output takes one more convolution call, since `dX` wants the
    scaled `dY` and `⟨dW, V⟩` the unscaled one. Scaling the input takes the dots from `x` and `dX`
    instead of from the weight's gradient, and finishes `dV` in one pass over it.

    A materialised `W` is kept for the backward where it is at most an eighth of the input's size,
    so that the memory saved stays that of the plain layer within 1/8 of its input, or at most
    `KEPT_WEIGHT` bytes, where recomputing it is all overhead.
    """
    axis = conv.scale_axis(dim)
    if x_dtype != v_dtype or x_dtype.itemsize < 4 or axis == "taps":
        return AtenConvolution("materialize", "materialize", False)
    size = x_dtype.itemsize
    sizes = conv.output_sizes(x_shape[2:], v_shape[2:])
    w = size * math.prod(v_shape)
    input = size * math.prod(x_shape)
    output = size * x_shape[0] * conv.out_channels(v_shape) * math.prod(sizes)

    # A weight of a few MiB stays in cache between two operations.
    weight = w / 4 if w <= 2**23 else w

    forward = {"materialize": [Stage(2 * weight)]}
    backward = {"materialize": [Stage(2 * weight), Stage(5 * weight)]}
    if axis in ("output", "whole"):
        forward["output"] = [Stage(2 * output), *[Stage(0)] * 4]
        backward["output"] = [*[Stage(2 * output)] * 3, Stage(5 * weight), Stage(0)]
    if axis in ("input", "whole"):
        forward["input"] = [Stage(2 * input), *[Stage(0)] * 4]
        backward["input"] = [*[Stage(2 * input)] * 4, Stage(3 * weight), *[Stage(0)] * 4]
    rate = CPU.rate[size]
    variants = _cheapest(forward, CPU, rate), _cheapest(backward, CPU, rate)
    keeps_weight = variants == ("materialize", "materialize") and w <= max(input / 8, KEPT_WEIGHT)
    return AtenConvolution(*variants, keeps_weight)


def one_pass_rows(itemsize: int) -> int:
    """The rows that one tile of the one-pass kernels holds, by the wider of x's and V's elements:
    with more, it would not fit the registers."""
    return 64 if itemsize == 2 else 32


@functools.lru_cache(maxsize=4096)
def triton_linear(
    x_shape: torch.Size,
    v_shape: torch.Size,
    x_dtype: torch.dtype,
    v_dtype: torch.dtype,
    dim: int | None,
    tf32: bool,
) -> Path:
    """`one_pass`, `scaled` or `materialize` on a GPU, for `x` of shape `(*, K)`; `tf32` says how
    float32 products are taken.

    Small batches are bound by the bytes of `V`: one pass reads it once and launches once. Larger
    ones are bound by the tensor cores, where squares in the loop cost more than a norm kernel
    beforehand; the largest by the matmul itself, where the vendor's own on a materialised `W` wins
    as soon as its lead in efficiency pays for writing `W`.
    """
    n, k = v_shape
    m = math.prod(x_shape[:-1])
    x_size, v_size = x_dtype.itemsize, v_dtype.itemsize
    x, y, v, w = x_size * m * k, x_size * m * n, v_size * n * k, x_size * n * k
    matmul = 2.0 * m * n * k
    own = matmul / GPU.efficiency
    narrows = narrows_range(x_dtype, v_dtype)

    prologue = GPU.prologue if dim == 1 or narrows else 1.0
    forward = {
        "scaled": [Stage(v), Stage(x + v + y, own * prologue)],
        "materialize": [Stage(v + w), Stage(x + w + y, matmul)],
    }
    fits = m <= one_pass_rows(max(x_size, v_size))
    if dim == 0 and fits and not narrows:
        forward["one_pass"] = [Stage(x + v + y, own * GPU.inline_norm)]

    dx = Stage(y + v + x, own * (GPU.prologue if dim == 0 or narrows else 1.0))
    backward = {
        "scaled": [dx, Stage(x + y + 2 * v, own), Stage(0), Stage(3 * v)],
        "materialize": [
            Stage(v + w),
            Stage(y + w + x, matmul),
            Stage(x + y + w, matmul),
            Stage(w + 2 * v),
        ],
    }
    if dim is not None and fits:
        backward["one_pass"] = [dx, Stage(x + y + 3 * v, 2 * own)]

    rate = GPU.tf32_rate if tf32 else GPU.rate[x_size]
    return Path(_cheapest(forward, GPU, rate), _cheapest(backward, GPU, rate))


@functools.lru_cache(maxsize=4096)
def triton_convolution(
    x_shape: torch.Size,
    v_shape: torch.Size,
    x_dtype: torch.dtype,
    v_dtype: torch.dtype,
    conv: Geometry,
    dim: int | None,
    channels_last: bool,
    tf32: bool,
) -> Path:
    """`one_pass`, `scaled`, `packed` or `materialize` on a GPU.

    Our kernels read channels-last activations. Given others, they pay for repacking the input and
    the output, which the vendor's library does not: beyond a few pixels `materialize` wins there.

    The forms differ in what they do with the weight, which is small beside the activations, and
    in what the loop does with its tile. `one_pass` launches once and takes the norms beside the
    product, again for every tile of pixels: it is for few pixels. `scaled` takes the norms first;
    with the scale along the output it costs the loop nothing, elsewhere it is multiplied into
    every tile. Both gather `V` as it lies, taps innermost. `packed` writes `W` once, in the
    product's dtype and with channels innermost, and its loop is that of a plain convolution.

    In the backward the weight's gradient is the same product over pixels in every form of ours.
    Groups of a few channels are bound by the bytes of their activations whatever their form: one
    pass where it applies, the scale in the loop otherwise.
    """
    x_size, v_size = x_dtype.itemsize, v_dtype.itemsize
    sizes = conv.output_sizes(x_shape[2:], v_shape[2:])
    channels = conv.out_channels(v_shape)
    x = x_size * math.prod(x_shape)
    y = x_size * x_shape[0] * channels * math.prod(sizes)
    weight = math.prod(v_shape)
    v, w = v_size * weight, x_size * weight
    pixels = x_shape[0] * math.prod(x_shape[2:] if conv.transposed else sizes)
    product = 2.0 * pixels * weight
    own = product / GPU.efficiency
    narrows = narrows_range(x_dtype, v_dtype)
    axis = conv.scale_axis(dim)
    repack = [] if channels_last else [Stage(2 * x), Stage(2 * y)]

    def scaled(epilogue: bool) -> float:
        return own * (1.0 if epilogue and not narrows else GPU.prologue)

    forward = {
        "packed": [*repack, Stage(v + w), Stage(x + w + y, own)],
        "scaled": [*repack, Stage(v), Stage(x + v + y, scaled(axis in ("output", "whole")))],
        "materialize": [Stage(v + w), Stage(x + w + y, product)],
    }
    if conv.owns_slices(dim) and not narrows:
        forward["one_pass"] = [*repack, Stage(x + v + y, own * GPU.inline_norm)]
    grad = [Stage(x + y + 4 * weight, own), Stage(4 * weight + 2 * v)]
    backward = {
        "packed": [*repack, Stage(v + w), Stage(y + w + x, own), *grad],
        "scaled": [*repack, Stage(y + v + x, scaled(axis in ("input", "whole"))), *grad],
        "materialize": [
            Stage(v + w),
            Stage(y + w + x, product),
            Stage(x + y + w, product),
            Stage(w + 2 * v),
        ],
    }
    rate = GPU.tf32_rate if tf32 else GPU.rate[x_size]
    return Path(_cheapest(forward, GPU, rate), _cheapest(backward, GPU, rate))
