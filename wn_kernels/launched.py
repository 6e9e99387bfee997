"""Layers on a GPU without the native library: what its `launched.h` does, in Python.

Both directions of a call are prepared once, for its dtypes, layouts and options
(`operators.launches`). A later call looks them up by shapes and options, and has PyTorch compare
the rest (`call.guard`). It then allocates and launches: nothing is checked, planned or looked up
below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators
from .autograd import ONLY_WEIGHT, Weight, needed, recorded_grads
from .backends import native, reference, vendor
from .call import (
    PLAIN_TYPES,
    Grads,
    Needs,
    Norm,
    Operands,
    are_modes_active,
    guard,
    keep,
    recorder,
    rows_of,
    takes_tf32,
)
from .operators import Launches
from .prepare import are_dense, reject

_MOST_BACKWARDS = 8  # layouts of dY, of each


class _Known(NamedTuple):
    """Holds what is prepared for a call.

    Attributes:
        fits: a function of a call's tensors that returns whether this was prepared for them.
        launches: what is prepared, or `None` if the rest of the package serves the call.
        infer: the forward without gradients, a function of `(x, v, g, bias)`, or of `(v, g)` for
            the weight alone.
        records: whether a tensor requires a gradient.
    """

    fits: Callable[..., bool]
    launches: Any
    infer: Callable[..., Tensor]
    records: bool


_UNSERVED = _Known(lambda *_: False, None, lambda *_: reject(), False)
_prepared: dict[Any, list[_Known]] = {}  # by shapes and options
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
    norm: Norm,
) -> Tensor | None:
    """The output of a layer, `W` where there is no `x`; `None` for a call that the rest of the
    package has to serve, or reject.

    Raises:
        TypeError, ValueError: as `prepare`.
    """
    if type(v) not in PLAIN_TYPES or are_modes_active():
        return None
    key: tuple
    tensors: tuple[Tensor, ...]
    known: _Known | None
    try:
        if x is None:
            key, tensors = (rank, v.shape, dim, eps, norm), (v, g)
        else:
            tf32 = takes_tf32(x.dtype, "conv" if rank else "matmul")
            key = rank, x.shape, v.shape, bias is None, geometry, dim, eps, norm, tf32
            tensors = (x, v, g) if bias is None else (x, v, g, bias)
        for known in _prepared.get(key, ()):
            if known.fits(*tensors):
                break
        else:
            known = None
    except (AttributeError, TypeError):  # an argument is no tensor, or an option cannot be hashed
        return None
    if known is None:
        known = _prepare(key, tensors, rank, x, v, g, bias, geometry, dim, eps, norm)
    _, launches, infer, records = known
    if launches is None:
        return None
    if not (records and torch.is_grad_enabled()):
        return infer(v, g) if x is None else infer(x, v, g, bias)
    if x is None:
        return _apply_weight(v, g, launches)
    if not launches.keeps:
        return _apply(x, v, g, bias, launches)
    return _product(launches, x, _formed(launches.weight, v, g), bias)


def _prepare(
    key: tuple[Any, ...],
    tensors: tuple[Tensor, ...],
    rank: int | None,
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> _Known:
    """Prepares a call, and keeps what is prepared unless something records it or is wrong with
    it."""
    if (
        any(type(t) not in PLAIN_TYPES for t in tensors)
        or recorder(v)
        or torch._C._is_any_autocast_enabled()
        or (rank is None) != (x is None)
        or not are_dense(tensors[0], v, g, bias)
        or not g.is_contiguous()
    ):
        return _UNSERVED
    launches = operators.launches(rank or 0, (x, v, g, bias), *options)
    infer = reject if launches is None else _inference(launches, x)
    known = _Known(guard(*tensors), launches, infer, any(t.requires_grad for t in tensors))
    keep(_prepared, key, known)
    return known


def _inference(launches: Any, x: Tensor | None) -> Callable[..., Tensor]:
    """Returns the forward without gradients, for calls with an `x` of as many dimensions."""
    if launches.forms_forward:
        form = _inference(launches.weight, None)
        return lambda x, v, g, bias: _product(launches, x, form(v, g), bias)
    if launches.run is None:
        if x is None:
            return lambda v, g: launches.forward(None, v, g, None)[0]
        return lambda x, v, g, bias: launches.forward(x, v, g, bias)[0]
    first = launches.run.first
    if x is None or launches.conv is not None or x.ndim == 2:
        return first
    return lambda x, v, g, bias: first(rows_of(x), v, g, bias).view(*x.shape[:-1], len(v))


# --- with gradients ------------------------------------------------------------------------------


class LaunchedWeight(torch.autograd.Function):
    """`W` alone, by launches that are prepared."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, launches: Launches) -> Tensor:
        run = launches.run
        w, n = launches.forward(None, v, g, None) if run is None else run.full(v, g)
        ctx.save_for_backward(v, g, n)
        ctx.launches = launches
        return w

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        v, g, n = ctx.saved_tensors
        launches = ctx.launches
        if not (torch.is_grad_enabled() or are_modes_active()):
            for _, fits, run in launches.backwards:
                if fits(dw):
                    return *run(dw, v, g, n), None
            return *_weight_grads(ctx.launches, dw, v, g, n), None
        needs = False, *ctx.needs_input_grad[:2], False
        grads = _recorded(ctx, dw, Operands(None, v, g, None), n, needs)
        return *grads[1:3], None


class Launched(torch.autograd.Function):
    """The call of a layer whose launches are prepared."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None, launches: Launches
    ) -> Tensor:
        keep = launches.keeping is not None
        if keep:
            needs = ctx.needs_input_grad
            keep = needs[0] if launches.conv is not None else needs[1] or needs[2]
        y, n, kept = _forward(launches, x, v, g, bias, keep)
        ctx.save_for_backward(x, v, g, n, kept)
        ctx.launches, ctx.bias_dtype = launches, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, v, g, n, kept = ctx.saved_tensors
        launches, needs = ctx.launches, ctx.needs_input_grad[:4]
        run = None
        if not (torch.is_grad_enabled() or are_modes_active()):
            run = _find_backward(launches, dy, x, v, g, needs)
        if run is None:
            dx, dv, dg, db = _recorded(ctx, dy, Operands(x, v, g, None), n, needs)
        else:
            dx, dv, dg, db = run(dy, x, v, g, n, kept)
        if db is not None and db.dtype is not ctx.bias_dtype:
            db = db.to(ctx.bias_dtype)
        return dx, dv, dg, db, None


# `Function.apply` calls these, after it has looked for transforms of `torch.func`. A guard or
# `recorder` has looked for them already.
_apply = super(torch.autograd.Function, Launched).apply
_apply_weight = super(torch.autograd.Function, LaunchedWeight).apply


def _forward(
    launches: Launches, x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None, keep: bool
) -> tuple[Tensor, Any, Tensor | None]:
    """`(y, n, kept)` of a call that is recorded."""
    if launches.forms_forward:
        weight: Any = launches.weight
        run = weight.run
        w, n = weight.forward(None, v, g, None) if run is None else run.full(v, g)
        return _product(launches, x, w, bias), n, None
    prepared = launches.keeping if keep else launches.run
    if prepared is None:
        return *launches.forward(x, v, g, bias), None
    is_flat = launches.conv is not None or x.ndim == 2
    y, n, *more = prepared.full(x if is_flat else rows_of(x), v, g, bias)
    return y if is_flat else y.view(*x.shape[:-1], len(v)), n, more[0] if keep else None


def _formed(launches: Any, v: Tensor, g: Tensor) -> Tensor:
    """`W`, as part of the graph, by the launches of the weight alone."""
    if v.requires_grad or g.requires_grad:
        return _apply_weight(v, g, launches)
    return _inference(launches, None)(v, g)


def _product(launches: Launches, x: Any, w: Tensor, bias: Tensor | None) -> Tensor:
    """The product of `x` with a `W` that is formed, by PyTorch."""
    if bias is not None and bias.dtype != w.dtype:
        bias = bias.to(w.dtype)
    if launches.conv is None:
        return F.linear(x, w, bias)
    return vendor.convolution(x, w, bias, launches.conv)


# --- the backward --------------------------------------------------------------------------------


def _find_backward(
    launches: Launches, dy: Tensor, x: Tensor | None, v: Tensor, g: Tensor, needs: Needs
) -> Callable[..., Any] | None:
    """Returns what computes the gradients for such a dY, or `None` if that has to be recorded. It
    is a function of `(dy, x, v, g, n, kept)` that returns `(dX, dV, dg, db)`, or for the weight
    alone of `(dw, v, g, n)` that returns `(dV, dg)`. What is not needed may be `None`."""
    for known, fits, run in launches.backwards:
        if known == needs and fits(dy):
            return run
    if type(dy) not in PLAIN_TYPES or recorder(dy):
        return None
    run = _prepare_backward(launches, dy, x, v, g, needs)
    if len(launches.backwards) < _MOST_BACKWARDS:
        launches.backwards.append((needs, guard(dy), run))
    return run


def _prepare_backward(
    launches: Launches, dy: Tensor, x: Tensor | None, v: Tensor, g: Tensor, needs: Needs
) -> Callable[..., Any]:
    if launches.forms_backward:
        return functools.partial(_backward_of_convolution, launches, needs)
    is_flat = x is None or launches.conv is not None or x.ndim == 2
    flat = (dy, x) if is_flat or x is None else (rows_of(dy), rows_of(x))
    prepared = launches.prepare_backward(*flat, v, g, needs)
    if x is None:
        if prepared is not None:
            return prepared.full
        return lambda dw, v, g, n: launches.backward(dw, None, v, g, n, needs)[1:3]
    if prepared is None:
        return lambda dy, x, v, g, n, _: launches.backward(dy, x, v, g, n, needs)
    full = prepared.full
    if is_flat and launches.keeping is not None:
        return full

    def run(dy: Tensor, x: Tensor, *rest: Any) -> Grads:
        rest = rest if launches.keeping is not None else rest[:-1]
        if is_flat:
            return full(dy, x, *rest)
        dx, dv, dg, db = full(rows_of(dy), rows_of(x), *rest)
        return dx if dx is None else dx.view(x.shape), dv, dg, db

    return run


def _weight_grads(
    launches: Any, dw: Tensor, v: Tensor, g: Tensor, n: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """`(dV, dg)` by the launches of the weight alone."""
    run = _find_backward(launches, dw, None, v, g, ONLY_WEIGHT)
    if run is not None:
        return run(dw, v, g, n)
    options = launches.conv, launches.dim, launches.eps, ONLY_WEIGHT, launches.norm
    return reference.differentiable_grads(dw, None, None, v, g, *options)[1:3]


def _backward_of_convolution(
    launches: Launches,
    needs: Needs,
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    kept: Tensor | None,
) -> Grads:
    """The backward around PyTorch's convolution, the layout of whose `dW` it alone determines."""
    needs_x, needs_v, needs_g, needs_bias = needs
    needs_weight = needs_v or needs_g
    weight, conv = launches.weight, launches.conv
    assert weight is not None
    assert conv is not None
    w = _inference(weight, None)(v, g) if needs_x else v.to(x.dtype)
    dx, dw, db = vendor.convolution_grads(dy, x, w, conv, needs_x, needs_weight, needs_bias)
    dv, dg = (None, None) if dw is None else _weight_grads(weight, dw, v, g, n)
    return dx, dv, dg, db


# --- a backward that is differentiated -----------------------------------------------------------


def _recorded(ctx: Any, dy: Tensor, tensors: Operands, n: Tensor, needs: Needs) -> Grads:
    """`(dX, dV, dg, db)` as part of the graph, or by operations that can be recorded."""
    launches, (x, v, g, _) = ctx.launches, tensors
    if type(dy) in PLAIN_TYPES and not recorder(dy) and (weight := _weight_of(launches, x, v, g)):
        needs = needed(ctx, x is not None, needs)
        return recorded_grads(weight, launches.conv, dy, tensors, n, needs)
    options = launches.conv, launches.dim, launches.eps, needs, launches.norm
    return reference.differentiable_grads(dy, None, x, v, g, *options)


def _weight_of(launches: Launches, x: Tensor | None, v: Tensor, g: Tensor) -> Weight | None:
    """Returns the launches of the weight alone, which a recorded backward takes. They are in V's
    dtype if the call has an `x`. The result is `None` if Python forms the weight."""
    options = launches.dim, launches.eps, launches.norm
    if x is not None:
        key = None, v.shape, *options
        known = next((each for each in _prepared.get(key, ()) if each.fits(v, g)), None)
        known = known or _prepare(key, (v, g), None, None, v, g, None, (), *options)
        if known.launches is None:
            return None
        launches = known.launches

    def grads(dw: Tensor, v: Tensor, g: Tensor, n: Tensor) -> tuple[Any, Any]:
        return _weight_grads(launches, dw if x is None else dw.to(v.dtype), v, g, n)

    return Weight(functools.partial(_formed, launches), grads, *options)
