"""The native library as `functional.py` asks it, and what it asks this package in turn.

It answers a call with `None` where it does not serve it, or where something is wrong with it. How
it serves one it asks here, once for what the call was made with.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from . import autograd, plan
from .backends import native
from .checks import check_convolution, check_linear, remembers


def asked() -> Any:
    """The library, where it is to be asked; otherwise `None`."""
    library = native.library() if plan.asks_native() else None
    if library is not None:
        _introduce(library)
    return library


@functools.cache
def _introduce(library: Any) -> None:
    """Tells the library whom to ask."""
    library.set_callbacks(_plan_linear, _plan_convolution, autograd.second_order)
    remembers(library.forget)


# The library's variants, by number; whichever side is scaled late, the library knows.
_VARIANTS = {"materialize": 0, "scaled": 1, "input": 1, "output": 1, "unfold": 2}


def _flags(path: Any) -> tuple[int, int, bool]:
    """The variants of the forward and of the backward, and whether anything is kept."""
    forward, backward, keeps = path
    return _VARIANTS[forward], _VARIANTS[backward], keeps


def _plan_linear(
    x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None, dim: Any, eps: Any
) -> tuple | None:
    """How the native library serves a linear layer's call; `None` where it does not."""
    if dim not in (0, -v.ndim):
        return None
    shapes = x.shape, v.shape, g.shape, None if bias is None else bias.shape
    path = check_linear(*shapes, dim, eps, x.dtype, v.dtype, "native").path
    return None if path is None else _flags(path)


def _plan_convolution(
    rank: int, x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None, *options: Any
) -> tuple | None:
    """How the native library serves a convolution's call; `None` where it does not."""
    if x.ndim != rank + 2:
        return None
    shapes = x.shape, v.shape, g.shape, None if bias is None else bias.shape
    call = check_convolution(*shapes, rank, *options, x.dtype, v.dtype, "native")
    if call.path is None or (call.dim != 0 and g.ndim == 1):
        return None
    sizes = call.conv.output_sizes(x.shape[2:], v.shape[2:])
    return *call.conv, (x.shape[0], call.conv.out_channels(v.shape), *sizes), _flags(call.path)
