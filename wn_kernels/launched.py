"""Layers on a GPU without the native library: what its `launched.h` does, in Python.

Both directions of a call are prepared once, for its dtypes, layouts and options
(`operators.launches`). A later call looks them up, allocates and launches: nothing is checked,
planned or looked up below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators
from .autograd import ONLY_WEIGHT, Weight, needed, recorded_grads
from .backends import native, reference, vendor
from .call import PLAIN_TYPES, Grads, Needs, Norm, Operands, recorder, rows_of, takes_tf32
from .operators import Launches
from .prepare import are_dense

_MOST = 4096  # calls that are kept
_MOST_BACKWARDS = 8  # layouts of dY, of each
Infer = Callable[[Any, Tensor, Tensor, Any], Tensor]  # (x, v, g, bias) -> y
_prepared: dict[Any, tuple[Launches, Infer] | None] = {}
_UNKNOWN: Any = object()
native.memos.append(_prepared)


def launched(
    rank: int | None,
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    dim: int | None,
    eps: float,
    norm: Norm = "l2",
) -> Tensor | None:
    """The output of a layer, `W` where there is no `x`; `None` for a call that the rest of the
    package has to serve, or reject.

    Raises:
        TypeError, ValueError: as `prepare`.
    """
    if (
        type(v) not in PLAIN_TYPES
        or type(g) not in PLAIN_TYPES
        or (type(x) not in PLAIN_TYPES if rank is not None else x is not None)
        or (bias is not None and type(bias) not in PLAIN_TYPES)
        or recorder(v)
        or torch._C._is_any_autocast_enabled()
    ):
        return None
    found = _find(rank or 0, x, v, g, bias, geometry, dim, eps, norm)
    if found is None:
        return None
    launches, infer = found
    if not torch.is_grad_enabled() or not (
        v.requires_grad
        or g.requires_grad
        or (x is not None and x.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return infer(x, v, g, bias)
    if not launches.keeps:
        return _apply(x, v, g, bias, launches)
    assert launches.weight is not None
    return _product(launches, x, _formed(launches.weight, v, g), bias)


def _find(
    rank: int,
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    dim: int | None,
    eps: float,
    norm: Norm,
) -> tuple[Launches, Infer] | None:
    """Returns what is prepared for a call, or `None` where the rest of the package serves it."""
    key: tuple
    try:
        weight = v.shape, v.stride(), v.dtype, v.device, g.shape, g.stride(), g.dtype, g.device
        key = weight, dim, eps, norm
        if x is not None:
            tf32 = takes_tf32(x.dtype, "conv" if rank else "matmul")
            key = key, rank, geometry, x.shape, x.stride(), x.dtype, x.device, tf32
        if bias is not None:
            key = key, bias.shape, bias.stride(), bias.dtype, bias.device
        found = _prepared.get(key, _UNKNOWN)
    except (TypeError, RuntimeError):  # an option cannot be hashed, or a tensor has no strides
        return None
    if found is not _UNKNOWN:
        return found
    if not are_dense(v if x is None else x, v, g, bias) or not g.is_contiguous():
        return None
    launches = operators.launches(rank, (x, v, g, bias), geometry, dim, eps, norm)
    found = None if launches is None else (launches, _inference(launches, x))
    if len(_prepared) >= _MOST:
        _prepared.clear()
    _prepared[key] = found
    return found


def _inference(launches: Any, x: Tensor | None) -> Infer:
    """Returns the forward without gradients, for calls with an `x` of as many dimensions."""
    if launches.forms_forward:
        form = _inference(launches.weight, None)
        return lambda x, v, g, bias: _product(launches, x, form(None, v, g, None), bias)
    if launches.run is None:
        return lambda x, v, g, bias: launches.forward(x, v, g, bias)[0]
    bare = launches.run.bare
    if x is None:
        return lambda x, v, g, bias: bare(v, g)[0]
    if launches.conv is not None or x.ndim == 2:
        return lambda x, v, g, bias: bare(x, v, g, bias)[0]
    return lambda x, v, g, bias: bare(rows_of(x), v, g, bias)[0].view(*x.shape[:-1], len(v))


class Launched(torch.autograd.Function):
    """The call of a layer whose launches are prepared."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        v: Tensor,
        g: Tensor,
        bias: Tensor | None,
        launches: Launches,
    ) -> Tensor:
        keep = launches.keeping is not None
        if keep:
            needs = ctx.needs_input_grad
            keep = needs[0] if launches.conv is not None else needs[1] or needs[2]
        y, n, kept = _forward(launches, x, v, g, bias, keep)
        ctx.save_for_backward(x, v, g, bias, n, kept)
        ctx.launches = launches
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, v, g, bias, n, kept = ctx.saved_tensors
        launches, needs = ctx.launches, ctx.needs_input_grad[:4]
        is_plain = type(dy) in PLAIN_TYPES and not recorder(dy)
        if is_plain and not torch.is_grad_enabled():
            dx, dv, dg, db = _backward(launches, dy, x, v, g, bias, n, needs, kept)
        elif is_plain and (weight := _weight_of(launches, x, v, g)) is not None:
            tensors = Operands(x, v, g, bias)
            needs = needed(ctx, tensors, needs)
            dx, dv, dg, db = recorded_grads(weight, launches.conv, dy, tensors, n, needs)
        else:
            options = launches.conv, launches.dim, launches.eps, needs, launches.norm
            dx, dv, dg, db = reference.differentiable_grads(dy, None, x, v, g, *options)
        if db is not None and bias is not None and db.dtype != bias.dtype:
            db = db.to(bias.dtype)
        return dx, dv, dg, db, None


# What `Function.apply` calls, which looks for transforms of `torch.func` first: `recorder` has done
# so already.
_apply = super(torch.autograd.Function, Launched).apply


def _forward(
    launches: Launches,
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Any, Tensor | None]:
    """`(y, n, kept)` of a call that is recorded, where `y` is `W` without `x`."""
    if launches.forms_forward:
        assert launches.weight is not None
        w, n, _ = _forward(launches.weight, None, v, g, None, False)
        return _product(launches, x, w, bias), n, None
    prepared = launches.keeping if keep else launches.run
    if prepared is None:
        return *launches.forward(x, v, g, bias), None
    run = prepared.full
    if x is None:
        return *run(v, g), None
    if launches.conv is not None or x.ndim == 2:
        y, n, *more = run(x, v, g, bias)
    else:
        y, n, *more = run(rows_of(x), v, g, bias)
        y = y.view(*x.shape[:-1], len(v))
    return y, n, more[0] if keep else None


def _formed(launches: Launches, v: Tensor, g: Tensor) -> Tensor:
    """`W`, as part of the graph, by the launches of the weight alone."""
    if v.requires_grad or g.requires_grad:
        return _apply(None, v, g, None, launches)
    return _inference(launches, None)(None, v, g, None)


def _weight_of(launches: Launches, x: Tensor | None, v: Tensor, g: Tensor) -> Weight | None:
    """What a recorded backward takes: launches of the weight alone in V's dtype, where the call is
    not that of a weight itself. `None` where Python forms the weight."""
    options = launches.dim, launches.eps, launches.norm
    alone = launches
    if x is not None:
        found = _find(0, None, v, g, None, (), *options)
        if found is None:
            return None
        alone = found[0]

    def grads(dw: Tensor, v: Tensor, g: Tensor, n: Tensor) -> tuple[Any, Any]:
        dw = dw if x is None else dw.to(v.dtype)
        return _backward(alone, dw, None, v, g, None, n, ONLY_WEIGHT)[1:3]

    return Weight(functools.partial(_formed, alone), grads, *options)


def _product(launches: Launches, x: Any, w: Tensor, bias: Tensor | None) -> Tensor:
    """The product of `x` with a `W` that is formed, by PyTorch."""
    if bias is not None and bias.dtype != w.dtype:
        bias = bias.to(w.dtype)
    if launches.conv is None:
        return F.linear(x, w, bias)
    return vendor.convolution(x, w, bias, launches.conv)


def _backward(
    launches: Launches,
    dy: Tensor,
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    n: Tensor,
    needs: Needs,
    kept: Tensor | None = None,
) -> Grads:
    """`(dX, dV, dg, db)`; what is not needed may be `None`."""
    if launches.forms_backward:
        return _backward_of_convolution(launches, dy, x, v, g, n, needs)
    is_flat = x is None or launches.conv is not None or x.ndim == 2
    flat_dy, flat_x = (dy, x) if is_flat or x is None else (rows_of(dy), rows_of(x))
    key = needs, flat_dy.stride()
    run = launches.backwards.get(key, launches)
    if run is launches:
        full = len(launches.backwards) >= _MOST_BACKWARDS
        prepared = None if full else launches.prepare_backward(flat_dy, flat_x, v, g, needs)
        run = prepared and prepared.full
        if not full:
            launches.backwards[key] = run
    if run is None:
        return launches.backward(dy, x, v, g, bias, n, needs)
    if x is None:
        dv, dg = run(dy, v, g, n)
        return None, dv, dg, None
    dx, dv, dg, db = run(flat_dy, flat_x, v, g, n, *[kept] * (launches.keeping is not None))
    return dx if is_flat or dx is None else dx.view(x.shape), dv, dg, db


def _backward_of_convolution(
    launches: Launches, dy: Tensor, x: Any, v: Tensor, g: Tensor, n: Tensor, needs: Needs
) -> Grads:
    """The same around PyTorch's convolution, the layout of whose `dW` it alone determines."""
    needs_x, needs_v, needs_g, needs_bias = needs
    needs_weight = needs_v or needs_g
    weight, conv = launches.weight, launches.conv
    assert weight is not None
    assert conv is not None
    w = _inference(weight, None)(None, v, g, None) if needs_x else v.to(x.dtype)
    dx, dw, db = vendor.convolution_grads(dy, x, w, conv, needs_x, needs_weight, needs_bias)
    dv = dg = None
    if dw is not None:
        _, dv, dg, _ = _backward(weight, dw, None, v, g, None, n, ONLY_WEIGHT)
    return dx, dv, dg, db
