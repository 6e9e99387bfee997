"""The one call into a backend, and the registered operators `torch.ops.wn_kernels.*`.

    layer           (x, v, g, bias)     -> (y, n)
    layer_backward  (dY, x, v, g, n)    -> (dX, dV, dg, db)

`x` is `(*, K)` for a linear layer, `(B, C, *sizes)` for a convolution, whose geometry is `conv` as
`Geometry.packed` has it, and absent for the weight alone, whose `W` in `dtype` is `y`. `dim` is
canonical (`None` or in `[0, ndim)`), `norm` is one of `NORMS`, `g` and `n` have the kept shape. A
gradient that `needs` excludes is an empty tensor. `backend` names the backend; where it is `""`,
the operator chooses when it runs. No operator is differentiable by itself: `autograd.py` is.

The functions `layer` and `layer_backward` call the backend of a plan. They go through the
registered operators where something records the operations: a compiler, or a dispatch mode on whose
tensors a Triton kernel must not be launched. The operations of the ATen path can always be recorded
by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plan as plans
from .backends import aten, native, vendor
from .call import (
    Call,
    Geometry,
    Grads,
    Needs,
    Norm,
    Operands,
    kept_shape,
    recorder,
    rows_of,
    scale_dtype,
)
from .plan import Plan
from .prepare import plan_native, prepare


def _module(backend: str) -> Any:
    """The backend's module. Triton's is imported on first use: `import wn_kernels` must not."""
    if backend == "triton":
        from .backends import triton

        return triton
    return aten


def native_library() -> Any:
    """The native library, or `None` if it cannot be used."""
    return native.library(plan_native, launches)


def slice_norm(v: Tensor, dim: int | None, norm: Norm) -> Tensor | None:
    """Returns the norms of the native library, or `None` if it does not serve the call. The
    arguments need not have been checked."""
    library = native_library() if plans.prepares(v) == "native" else None
    return None if library is None else library.slice_norm(v, dim, norm)


def is_direct(backend: str, *v: Tensor) -> bool:
    """Whether a backend can be called with these weights without the registered operator."""
    return backend == "aten" or (backend == "triton" and not any(map(recorder, v)))


def _is_direct(plan: Plan, v: Tensor) -> bool:
    return bool(plan.forward) and is_direct(plan.backend, v)


# --- one call down -------------------------------------------------------------------------------


def layer(
    call: Call, plan: Plan, tensors: Operands, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, n, kept)`: the output, which is `W` where there is no `x`, the norms, and what the plan
    keeps for the backward where `keep` allows it.

    Raises:
        aten.OutOfRange: a norm on a CPU is beyond the formulas of the ATen path.
    """
    if _is_direct(plan, tensors.v):
        return _run(call, plan, tensors, keep)
    return *_layer_op(*tensors, *_options(call), call.x_dtype, plan.backend), None


def _run(
    call: Call, plan: Plan, tensors: Operands, keep: bool, look: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    module = _module(plan.backend)
    options = (look,) if module is aten else ()
    x = tensors.x
    if call.conv is not None or x is None or x.ndim == 2:
        return module.layer(call, plan, tensors, keep, *options)
    y, n, kept = module.layer(call, plan, tensors._replace(x=rows_of(x)), keep, *options)
    return y.view(*x.shape[:-1], len(tensors.v)), n, kept


def layer_backward(
    call: Call,
    plan: Plan,
    dy: Tensor,
    tensors: Operands,
    n: Tensor,
    kept: Tensor | None,
    needs: Needs,
) -> Grads:
    """`(dX, dV, dg, db)`; what `needs` excludes may be `None`."""
    if _is_direct(plan, tensors.v):
        return _run_backward(call, plan, dy, tensors, n, kept, needs)
    found = _layer_backward_op(dy, *tensors[:3], n, *_options(call), plan.backend, needs)
    dx, dv, dg, db = (grad if need else None for grad, need in zip(found, needs, strict=True))
    return dx, dv, dg, db


def _options(call: Call) -> tuple[list[int], int | None, float, Norm]:
    """What both operators take of a call."""
    return call.conv.packed() if call.conv else [], call.dim, call.eps, call.norm


def _run_backward(
    call: Call,
    plan: Plan,
    dy: Tensor,
    tensors: Operands,
    n: Tensor,
    kept: Tensor | None,
    needs: Needs,
) -> Grads:
    module, x = _module(plan.backend), tensors.x
    if call.conv is not None or x is None or x.ndim == 2:
        return module.layer_backward(call, plan, dy, tensors, n, kept, needs)
    flat = tensors._replace(x=rows_of(x))
    dx, dv, dg, db = module.layer_backward(call, plan, rows_of(dy), flat, n, kept, needs)
    return dx if dx is None else dx.view(x.shape), dv, dg, db


class Launches(NamedTuple):
    """What a node holds of a call on the Triton path, in the native library or without it
    (launched.py).

    Attributes:
        forward: a function of `(x, v, g, bias)` that returns `(y, n)`.
        backward: a function of `(dy, x, v, g, n, needs)` that returns the gradients.
        run: the pass of the forward, where it is one.
        prepare_backward: a function of `(dy, x, v, g, needs)` that returns the pass of the backward
            for these layouts, or `None` where it is none.
        forms_forward, forms_backward: whether PyTorch's convolution with a formed `W` serves them.
        keeps: whether a training step keeps the `W` that PyTorch's product takes.
        keeping: the pass of the forward in a training step that keeps the packed `W` or the product
            `x Vᵀ`, which it returns behind `n`, and which the pass of the backward takes.
        weight: the same of `W` alone, where it is formed.
        conv, dim, eps, norm: as in `Call`.
        signs: attributes that tell whether something observes launches.
        backwards: the passes of the backward by what is needed and the strides of dY, as far as
            Python has prepared them.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Grads]
    run: Any
    prepare_backward: Callable[..., Any]
    forms_forward: bool
    forms_backward: bool
    keeps: bool
    keeping: Any
    weight: Launches | None
    conv: Geometry | None
    dim: int | None
    eps: float
    norm: Norm
    signs: list[tuple[Any, str, Any]]
    backwards: list[tuple[Needs, Callable[..., bool], Callable[..., Grads]]]


def launches(
    rank: int,
    tensors: tuple[Tensor | None, Tensor, Tensor, Tensor | None],
    geometry: tuple[Any, ...],
    dim: int | None,
    eps: float,
    norm: Norm,
) -> Launches | None:
    """What a node holds of a call, or `None` where no node serves it. This is called once for a
    call's dtypes, layouts and options.

    Raises:
        TypeError, ValueError: as `prepare`.
    """
    operands = Operands(*tensors)
    found = prepare(rank, operands, geometry, dim, eps, norm, "triton")
    if not found.fits:
        return None
    return _launches(found.call, found.plan, operands)


def _launches(call: Call, plan: Plan, tensors: Operands) -> Launches | None:
    module, x = _module("triton"), tensors.x
    if x is not None and call.conv is None:
        tensors = tensors._replace(x=rows_of(x))
    forms_forward, forms_backward = (
        call.conv is not None and way == "materialize" for way in (plan.forward, plan.backward)
    )
    weight = None
    takes_pytorchs = forms_forward or forms_backward or plan.backward == "weight_grad"
    if takes_pytorchs and x is not None and vendor.is_wrong(x):
        return None
    if forms_forward or forms_backward or plan.keeps == "weight":
        of_weight = Operands(None, tensors.v, tensors.g, None)
        weight = _launches(call.of_weight(), plan.of_weight(), of_weight)

    def forward(*tensors: Any) -> tuple[Tensor, Tensor]:
        return _run(call, plan, Operands(*tensors), False)[:2]

    def backward(dy: Tensor, x: Any, v: Tensor, g: Tensor, n: Tensor, needs: Needs) -> Grads:
        return _run_backward(call, plan, dy, Operands(x, v, g, None), n, None, needs)

    def prepare_backward(dy: Tensor, x: Tensor | None, v: Tensor, g: Tensor, needs: Needs) -> Any:
        how = plan._replace(keeps="") if keeping is None else plan
        return module.pass_backward(call, how, dy, Operands(x, v, g, None), needs)

    run = None if forms_forward else module.pass_forward(call, plan, tensors)
    keeping = None
    if run is not None and plan.keeps in ("packed", "product"):
        keeping = module.pass_forward(call, plan, tensors, keep=True)
    return Launches(
        forward=forward,
        backward=backward,
        run=run,
        prepare_backward=prepare_backward,
        forms_forward=forms_forward,
        forms_backward=forms_backward,
        keeps=plan.keeps == "weight",
        keeping=keeping,
        weight=weight,
        conv=call.conv,
        dim=call.dim,
        eps=call.eps,
        norm=call.norm,
        signs=module.SIGNS,
        backwards=[],
    )


# --- the registered operators --------------------------------------------------------------------


def _planned(
    tensors: Operands, options: Sequence[Any], dtype: torch.dtype, backend: str
) -> tuple[Call, Plan]:
    """Checks and plans a call with the options of `_options`."""
    conv, dim, eps, norm = options
    geometry = Geometry.unpacked(conv) if conv else ()
    rank = len(geometry[0]) if geometry else 0
    backend = backend or plans.choose_backend(tensors.v)
    return prepare(rank, tensors, tuple(geometry), dim, eps, norm, backend, dtype)[:2]


def _layer(
    x: Tensor | None, v: Tensor, g: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    tensors = Operands(x, v, g, bias)
    *options, dtype, backend = rest
    planned = _planned(tensors, options, dtype, backend)
    return _run(*planned, tensors, keep=False, look=False)[:2]


def _layer_fake(
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: list[int],
    dim: int | None,
    eps: float,
    norm: Norm,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    n = v.new_empty(kept_shape(v.shape, dim), dtype=scale_dtype(v))
    if x is None:
        return torch.empty_like(v, dtype=dtype), n
    if not conv:
        return x.new_empty(*x.shape[:-1], v.shape[0]), n
    return torch.convolution(x, v.to(x.dtype), None, *Geometry.unpacked(conv)), n


def _layer_backward(
    dy: Tensor, x: Tensor | None, v: Tensor, g: Tensor, n: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Gradients are laid out as in the fake."""
    *options, backend, needs = rest
    tensors = Operands(x, v, g, None)
    call, plan = _planned(tensors, options, dy.dtype, backend)
    dx, dv, dg, db = _run_backward(call, plan, dy, tensors, n, None, tuple(needs))
    if dx is not None and x is not None and call.conv is not None:
        dx = laid_out_like(dx, x)
    dv = dv if dv is None else laid_out_like(dv, v)
    return tuple(
        grad if need and grad is not None else like.new_empty(0)
        for grad, like, need in zip((dx, dv, dg, db), (dy, v, g, dy), needs, strict=True)
    )


def laid_out_like(t: Tensor, like: Tensor) -> Tensor:
    """`t` in the strides that `torch.empty_like(like)` has."""
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)


def _layer_backward_fake(
    dy: Tensor, x: Tensor | None, v: Tensor, g: Tensor, n: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    conv, dim, *_, needs = rest
    channels = dy.shape[1 if conv else -1] if dy.ndim else 0
    dx = dy if x is None else torch.empty_like(x) if conv else x.new_empty(x.shape)
    like = (dx, v, g, dy), (None, None, kept_shape(v.shape, dim), (channels,))
    return tuple(
        t.new_empty(0) if not need else torch.empty_like(t) if shape is None else t.new_empty(shape)
        for t, shape, need in zip(*like, needs, strict=True)
    )


library = torch.library.Library("wn_kernels", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> Any:
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wn_kernels::{name}", fake, lib=library)
    return getattr(torch.ops.wn_kernels, name).default


_layer_op = register(
    "layer(Tensor? x, Tensor v, Tensor g, Tensor? bias, int[] conv, int? dim, float eps, str norm,"
    " ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _layer,
    _layer_fake,
)
_layer_backward_op = register(
    "layer_backward(Tensor dy, Tensor? x, Tensor v, Tensor g, Tensor n, int[] conv, int? dim,"
    " float eps, str norm, str backend, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _layer_backward,
    _layer_backward_fake,
)
