"""This file chooses the backend that serves a call.

A backend can be forced by `use_backend` or by the environment variable `WN_KERNELS_BACKEND`. A call
that the forced backend cannot serve raises an error that gives the reason. By default, Triton
serves tensors on a GPU. The native library serves those on a CPU if it was built and supports the
call. ATen serves everything else.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends import native
from ..call import PLAIN_TYPES, recorder

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
            choice. The backward of a layer runs on the backend of its forward, also outside the
            block.

    Raises:
        ValueError: the name is unknown. A call that the forced backend cannot serve raises
            `RuntimeError` with the reason. It never falls back silently.
    """
    global _forced
    before = _forced
    _forced = None if name == "auto" else _checked_backend(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def is_forced() -> bool:
    """Returns whether a backend is forced."""
    return _forced is not None


def forced() -> str | None:
    """Returns the backend that is forced, or `None`."""
    return _forced


@functools.cache
def triton_unavailable() -> str | None:
    """Returns why Triton cannot be used in this process, or `None` if it can."""
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


def choose_backend(v: Tensor) -> str:
    """Returns the backend for a call with the weight `v` that the native library does not serve.

    The result is `"native"` only if that is forced. Under a compiler it is `""`, because the
    registered operator chooses when it runs.

    Raises:
        RuntimeError: a forced backend cannot serve the call.
    """
    recorded = recorder(v)
    if _forced is None:
        if recorded == "composite":
            return "reference"
        if recorded == "compiler":
            return ""
        return "triton" if v.is_cuda and triton_unavailable() is None else "aten"
    if _forced == "triton" and (reason := triton_unavailable()):
        raise cannot_serve("triton", reason)
    if recorded == "composite" and _forced != "native":
        if _forced == "triton":
            raise cannot_serve(
                "triton",
                "a torch.func transform or forward-mode AD is active, the call is being exported "
                f"or traced, or v is a {type(v).__name__}",
            )
        return "reference"
    return _forced


def serving(v: Tensor, dim: int | None = 0) -> str:
    """Returns the backend for the simplest call with a weight like `v`.

    Raises:
        RuntimeError: a forced backend cannot serve it.
    """
    served = native.serves_dim(dim, v.ndim)
    if served and v.is_cpu and tries_native(v) and native.unavailable() is None:
        return "native"
    return choose_backend(v)


def cannot_serve(backend: str, reason: str = "") -> RuntimeError:
    """Returns the error for a call that a forced backend cannot serve."""
    reason = reason or native.unavailable() or native.SERVES
    return RuntimeError(f"backend {backend!r} was forced but cannot serve this call: {reason}")


def tries_native(v: Tensor) -> bool:
    """Returns whether a call with the weight `v` goes to the native library first. The library
    returns `None` for calls that it does not serve."""
    wanted = _forced == "native" if _forced else type(v) in PLAIN_TYPES and v.is_cpu
    return wanted and not is_compiling()


def launches(v: Tensor) -> bool:
    """Returns whether Triton's kernels serve a call with the weight `v`. If the native library was
    built, its nodes launch them, except where a compiler is set to trace the backward: it can trace
    a node in Python, and a node in C++ only if that defines `compiled_args`, as ours do not."""
    wanted = _forced == "triton" if _forced else type(v) in PLAIN_TYPES and v.is_cuda
    if not wanted or is_compiling() or triton_unavailable() is not None:
        return False
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not torch.is_grad_enabled():  # reading the setting takes over 1 µs
        return True
    return not dynamo.config.compiled_autograd
