"""Which backend and which variant serves a call.

The backend: a forced one (`use_backend`, or the environment variable `WN_KERNELS_BACKEND`) or, by
default, Triton for tensors on a GPU, the native library for those on a CPU where it was built and
knows the call, and ATen for everything else. A forced backend that cannot serve a call raises and
says why.

The variant: the one that was measured to be the fastest on this machine, where `wn_kernels.tune`
was run for such a call (`table.py`), and otherwise the cheapest by the cost model (`costs.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.compiler import is_compiling

from . import table
from .backends import native
from .costs import Call, costs, keeps_product, scales_late

BACKENDS = ("triton", "native", "aten", "reference")
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
        name: `"triton"`, `"native"`, `"aten"`, `"reference"`, or `"auto"` for the planner's own
            choice. The backward of a layer runs where its forward did, also outside the block.

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
    """The backend for tensors like `x`, where the native library does not serve the call; `""`
    while a compiler traces and none is forced: the operator then asks again when it runs.

    Raises:
        RuntimeError: a forced backend cannot serve the call.
    """
    if _forced is not None:
        if _forced == "triton" and (reason := triton_unavailable()):
            raise cannot_serve("triton", reason)
        if _forced == "native":  # it has been asked
            raise cannot_serve("native", native.unavailable() or native.SERVES)
        return _forced
    if is_compiling():
        return ""
    return "triton" if x.is_cuda and triton_unavailable() is None else "aten"


def serving(v: Tensor, dim: int | None = 0) -> str:
    """The backend for the plainest call with a weight like `v`.

    Raises:
        RuntimeError: a forced backend cannot serve it.
    """
    knows = native.knows(dim, v.ndim) and v.dtype in native.DTYPES
    if knows and v.is_cpu and asks_native() and native.library():
        return "native"
    return choose_backend(v)


def cannot_serve(backend: str, reason: str) -> RuntimeError:
    """The error for a call that a forced backend cannot serve."""
    return RuntimeError(f"backend {backend!r} was forced but cannot serve this call: {reason}")


def asks_native() -> bool:
    """Whether the native library is asked first: it tells itself which calls it serves."""
    return (_forced is None or _forced == "native") and not is_compiling()


# --- variant -----------------------------------------------------------------------------------


class Path(NamedTuple):
    """How Triton serves a layer: the variant of each direction."""

    forward: str
    backward: str


class AtenLinear(NamedTuple):
    """How the ATen path or the native library serves a linear layer: the variant of each
    direction, and whether the forward saves `x Vᵀ` for the backward."""

    forward: str
    backward: str
    keeps_product: bool


class AtenConvolution(NamedTuple):
    """How the ATen path or the native library serves a convolution: the variant of each
    direction, and whether `W` is materialised once for both."""

    forward: str
    backward: str
    keeps_weight: bool


# Bytes of a convolution's `W` that are kept for the backward whatever the input's size.
KEPT_WEIGHT = 2**21


def _may_keep(call: Call, backend: str, forward: str, backward: str) -> bool:
    """Whether a CPU's path may save more for the backward than the plain layer does: the product
    `x Vᵀ` of a linear layer, or a convolution's `W`, within 1/8 of the weight's or the input's
    size. A small `W` of a convolution is kept whatever the input's: recomputing it is all overhead.
    The native library forms it for a training step, whatever its forward does without gradients,
    and keeps any that is normalised by position: forming it twice takes longer than eager does.
    """
    if not scales_late(call):
        return False
    if call.conv is None:
        return forward == backward == "scaled" and keeps_product(call)
    if backward != "materialize" or (forward != "materialize" and backend == "aten"):
        return False
    if call.conv.scale_axis(call.dim) == "taps":  # nothing but `W` can be scaled
        return backend == "native"
    size = call.x_dtype.itemsize
    w, input = size * math.prod(call.v_shape), size * math.prod(call.x_shape)
    return w <= max(input / 8, KEPT_WEIGHT)


def _choice(call: Call, backend: str, forward: str, backward: str, keeps: bool) -> Any:
    if backend == "triton":
        return Path(forward, backward)
    kind = AtenLinear if call.conv is None else AtenConvolution
    return kind(forward, backward, keeps)


def by_cost(call: Call, backend: str) -> Any:
    """The cheapest by the cost model."""
    forward, backward = costs(call, backend).cheapest()
    return _choice(call, backend, forward, backward, _may_keep(call, backend, forward, backward))


def choices(call: Call, backend: str) -> list[Any]:
    """Everything that can serve a call on a backend, the cost model's choice first."""
    found = costs(call, backend)
    every = {
        _choice(call, backend, forward, backward, keeps): None
        for forward in found.forward
        for backward in found.backward
        for keeps in (True, False)
        if not keeps or _may_keep(call, backend, forward, backward)
    }
    first = by_cost(call, backend)
    return sorted(every, key=lambda choice: choice != first)


@functools.lru_cache(maxsize=4096)
def choose(call: Call, backend: str) -> Any:
    """How `backend` serves a call: `AtenLinear` or `AtenConvolution` for `"aten"` and `"native"`,
    `Path` for `"triton"`."""
    if _watched is not None:
        _watched.append((call, backend))
    if (call, backend) in _fixed:
        return _fixed[call, backend]
    tuned = table.find(backend, key(call))
    if tuned is None:
        return by_cost(call, backend)
    for choice in choices(call, backend):
        if choice._asdict() == tuned:
            return choice
    warnings.warn(
        f"{table.location()} has {tuned} for {key(call)}, which cannot serve it: ignored",
        stacklevel=2,
    )
    return by_cost(call, backend)


def key(call: Call) -> str:
    """A call's name in the tuned table."""
    shapes = "·".join("×".join(map(str, shape)) for shape in (call.x_shape, call.v_shape))
    dtypes = "·".join(str(dtype).removeprefix("torch.") for dtype in (call.x_dtype, call.v_dtype))
    words = ["linear" if call.conv is None else "convolution", shapes, dtypes, f"dim={call.dim}"]
    if call.conv is not None:
        words += [f"{name}={value}" for name, value in call.conv._asdict().items()]
    words += [name for name in ("channels_last", "tf32") if getattr(call, name)]
    return " ".join(words)


_watched: list[tuple[Call, str]] | None = None
_fixed: dict[tuple[Call, str], Any] = {}


@contextmanager
def watching() -> Iterator[list[tuple[Call, str]]]:
    """Collects what `choose` is asked for inside the block, with nothing remembered from before."""
    global _watched
    before, _watched = _watched, []
    choose.cache_clear()
    try:
        yield _watched
    finally:
        _watched = before


@contextmanager
def fixed(call: Call, backend: str, choice: Any) -> Iterator[None]:
    """Serves a call this way inside the block. Whoever remembers choices has to forget them."""
    _fixed[call, backend] = choice
    choose.cache_clear()
    try:
        yield
    finally:
        del _fixed[call, backend]
        choose.cache_clear()
