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
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..backends import native
from ..call import PLAIN_TYPES, recorder

Backend: TypeAlias = Literal["triton", "native", "aten", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)
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
def use_backend(name: Backend | Literal["auto"]) -> Iterator[None]:
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
    if served and v.is_cpu and prepares(v) == "native" and native.unavailable() is None:
        return "native"
    return choose_backend(v)


def cannot_serve(backend: str, reason: str = "") -> RuntimeError:
    """Returns the error for a call that a forced backend cannot serve."""
    reason = reason or native.unavailable() or native.SERVES
    return RuntimeError(f"backend {backend!r} was forced but cannot serve this call: {reason}")


def prepares(v: Tensor) -> str:
    """Returns the backend whose prepared calls a call with the weight `v` is looked up in first:
    `"native"` for layers on a CPU, `"triton"` for kernels that are launched, `"aten"` if that is
    forced, or `""` for none.

    If the native library was built, its nodes launch the kernels, except where a compiler is set to
    trace the backward: it can trace a node in Python, and a node in C++ only if that defines
    `compiled_args`, as ours do not.
    """
    if is_dynamo_compiling():  # other compilers record tensors of their own, which are declined
        return ""
    if _forced is None:
        if type(v) not in PLAIN_TYPES:
            return ""
        if v.is_cpu:
            return "native"
        if not v.is_cuda:
            return ""
    elif _forced in ("native", "aten"):
        return _forced
    elif _forced != "triton":
        return ""
    if triton_unavailable() is not None or (torch.is_grad_enabled() and _traces_backward()):
        return ""
    return "triton"


_tracing: Any = None  # the entry of the compiler's setting
_seen: tuple[Any, bool] = object(), False  # what a user has set, and what the setting was then


def _traces_backward() -> bool:
    """Returns whether a compiler is set to trace the backward. The setting, which takes up to 3 µs
    to read, is read again only if a user has changed it."""
    global _tracing, _seen
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    try:
        if _tracing is None:
            _tracing = dynamo.config._config["compiled_autograd"]
        changed = _tracing.user_override
        changed = changed.get() if isinstance(changed, ContextVar) else changed
    except (AttributeError, KeyError):  # another version of torch
        return dynamo.config.compiled_autograd
    if changed is not _seen[0]:
        _seen = changed, dynamo.config.compiled_autograd
    return _seen[1]
