"""The one call into a backend, and the registered operators `torch.ops.wn_kernels.*`.

    weight_norm           (v, g)           -> (W, n)
    weight_norm_backward  (dW, v, g, n)    -> (dV, dg)
    linear                (x, v, g, bias)  -> (y, n)
    linear_backward       (dY, x, v, g, n) -> (dX, dV, dg, db)
    convolution           (x, v, g, bias)  -> (y, n)
    convolution_backward  (dY, x, v, g, n) -> (dX, dV, dg, db)

`dim` is canonical (`None` or in `[0, ndim)`), `g` and `n` have the kept shape. `x` is `(*, K)` for
`linear`, `(B, C, *sizes)` for `convolution`, whose geometry follows it as `torch.convolution` takes
it. A gradient that `needs` excludes is an empty tensor. `backend` names the backend; where it is
`""`, the operator chooses when it runs. No operator is differentiable by itself: `autograd.py` is.

`layer` and `layer_backward` call the backend of a plan. They go through the registered operators
where something records the operations: a compiler, or a dispatch mode on whose tensors a Triton
kernel must not be launched. The operations of the ATen path can always be recorded by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plan as plans
from .backends import aten, vendor
from .call import Call, Geometry, Grads, Needs, Operands, kept_shape, recorder, scale_dtype
from .plan import Plan
from .prepare import prepare


def _module(backend: str) -> Any:
    """The backend's module. Triton's is imported on first use: `import wn_kernels` must not."""
    if backend == "triton":
        from .backends import triton

        return triton
    return aten


def _is_direct(plan: Plan, v: Tensor) -> bool:
    """Whether the backend can be called without the registered operator."""
    if not plan.forward:
        return False
    return plan.backend == "aten" or (plan.backend == "triton" and not recorder(v))


def _rows(x: Tensor) -> Tensor:
    """`(*, K)` as `(M, K)`."""
    if x.ndim == 2:
        return x
    return x.flatten(0, -2) if x.ndim > 2 else x.unsqueeze(0)


# --- one call down -------------------------------------------------------------------------------


def layer(
    call: Call, plan: Plan, tensors: Operands, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, n, kept)`: the output, which is `W` where there is no `x`, the norms, and what the plan
    keeps for the backward where `keep` allows it.

    Raises:
        aten.OutOfRange: a norm on a CPU is beyond the formulas of the ATen path.
    """
    x, v, g, bias = tensors
    if _is_direct(plan, v):
        return _run(call, plan, tensors, keep)
    if x is None:
        return *_weight_norm(v, g, call.dim, call.eps, call.x_dtype, plan.backend), None
    rest = call.dim, call.eps, plan.backend
    if call.conv is None:
        return *_linear(x, v, g, bias, *rest), None
    return *_convolution(x, v, g, bias, *call.conv, *rest), None


def _run(
    call: Call, plan: Plan, tensors: Operands, keep: bool, look: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    module = _module(plan.backend)
    options = (look,) if module is aten else ()
    x = tensors.x
    if call.conv is not None or x is None or x.ndim == 2:
        return module.layer(call, plan, tensors, keep, *options)
    y, n, kept = module.layer(call, plan, tensors._replace(x=_rows(x)), keep, *options)
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
    x, v, g, _ = tensors
    if _is_direct(plan, v):
        return _run_backward(call, plan, dy, tensors, n, kept, needs)
    rest = call.dim, call.eps, plan.backend
    if x is None:
        return None, *_weight_norm_backward(dy, v, g, n, *rest), None
    if call.conv is None:
        grads = _linear_backward(dy, x, v, g, n, *rest, needs)
    else:
        grads = _convolution_backward(dy, x, v, g, n, *call.conv, *rest, needs)
    dx, dv, dg, db = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dx, dv, dg, db


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
    flat = tensors._replace(x=_rows(x))
    dx, dv, dg, db = module.layer_backward(call, plan, _rows(dy), flat, n, kept, needs)
    return dx if dx is None else dx.view(x.shape), dv, dg, db


class Launches(NamedTuple):
    """What a node of the native library holds of a call on the Triton path.

    Attributes:
        forward: a function of `(x, v, g, bias)` that returns `(y, n)`.
        backward: a function of `(dy, x, v, g, bias, n, needs)` that returns the gradients.
        run: the pass of the forward, where it is one.
        prepare_backward: a function of `(dy, x, v, g, needs)` that returns the pass of the backward
            for these layouts, or `None` where it is none.
        forms_forward, forms_backward: whether PyTorch's product with a formed `W` serves them.
        keeps: whether a training step keeps that `W`.
        weight: the same of `W` alone, where it is formed.
        conv, dim: as in `Call`.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Grads]
    run: Callable[..., Any] | None
    prepare_backward: Callable[..., Callable[..., Any] | None]
    forms_forward: bool
    forms_backward: bool
    keeps: bool
    weight: Launches | None
    conv: Geometry | None
    dim: int | None


def launches(
    rank: int,
    tensors: tuple[Tensor | None, Tensor, Tensor, Tensor | None],
    geometry: tuple[Any, ...],
    dim: int | None,
    eps: float,
) -> Launches | None:
    """What the native library holds of a call, or `None` where Python has to serve the call. The
    library calls this once for a call's dtypes, layouts and options.

    Raises:
        TypeError, ValueError: as `prepare`.
    """
    operands = Operands(*tensors)
    found = prepare(rank, operands, geometry, dim, eps, "triton")
    if not found.fits:
        return None
    return _launches(found.call, found.plan, operands)


def _launches(call: Call, plan: Plan, tensors: Operands) -> Launches | None:
    module, x = _module("triton"), tensors.x
    if x is not None and call.conv is None:
        tensors = tensors._replace(x=_rows(x))
    forms_forward, forms_backward = (
        x is not None and way == "materialize" for way in (plan.forward, plan.backward)
    )
    weight = None
    if x is not None and (forms_forward or forms_backward):
        if vendor.is_wrong(x):  # PyTorch's product is
            return None
        of_weight = Operands(None, tensors.v, tensors.g, None)
        weight = _launches(call.of_weight(), plan.of_weight(), of_weight)

    def forward(*tensors: Any) -> tuple[Tensor, Tensor]:
        return _run(call, plan, Operands(*tensors), False)[:2]

    def backward(dy: Tensor, *tensors: Any) -> Grads:
        *operands, n, needs = tensors
        return _run_backward(call, plan, dy, Operands(*operands), n, None, needs)

    def prepare_backward(
        dy: Tensor, x: Tensor | None, v: Tensor, g: Tensor, needs: Needs
    ) -> Callable[..., Any] | None:
        return module.pass_backward(call, plan, dy, Operands(x, v, g, None), needs)

    return Launches(
        forward=forward,
        backward=backward,
        run=None if forms_forward else module.pass_forward(call, plan, tensors),
        prepare_backward=prepare_backward,
        forms_forward=forms_forward,
        forms_backward=forms_backward,
        keeps=bool(plan.keeps),
        weight=weight,
        conv=call.conv,
        dim=call.dim,
    )


# --- the registered operators --------------------------------------------------------------------

_library = torch.library.Library("wn_kernels", "DEF")

_GEOMETRY = (
    "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"
)


def _register(schema: str, implementation: Callable, fake: Callable) -> Any:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wn_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.wn_kernels, name).default


def _forward(
    x: Tensor | None, v: Tensor, g: Tensor, bias: Tensor | None, *rest: Any, dtype: Any = None
) -> tuple[Tensor, Tensor]:
    """What the three forward operators do; `rest` is a geometry, `dim`, `eps` and the backend."""
    tensors = Operands(x, v, g, bias)
    return _run(*_planned(tensors, *rest, dtype=dtype), tensors, keep=False, look=False)[:2]


def _backward(
    dy: Tensor, x: Tensor | None, v: Tensor, g: Tensor, n: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """What the three backward operators do; gradients are laid out as in their fakes."""
    *options, needs = rest
    tensors = Operands(x, v, g, None)
    call, plan = _planned(tensors, *options)
    dx, dv, dg, db = _run_backward(call, plan, dy, tensors, n, None, tuple(needs))
    if dx is not None and x is not None and call.conv is not None:
        dx = _laid_out_like(dx, x)
    dv = dv if dv is None else _laid_out_like(dv, v)
    return tuple(
        grad if need and grad is not None else like.new_empty(0)
        for grad, like, need in zip((dx, dv, dg, db), (dy, v, g, dy), needs, strict=True)
    )


def _planned(tensors: Operands, *rest: Any, dtype: Any = None) -> tuple[Call, Plan]:
    *lists, dim, eps, backend = rest
    geometry = tuple(tuple(o) if isinstance(o, Sequence) else o for o in lists)
    backend = backend or plans.choose_backend(tensors.v)
    rank = len(geometry[0]) if geometry else 0
    return prepare(rank, tensors, geometry, dim, eps, backend, dtype)[:2]


def _laid_out_like(t: Tensor, like: Tensor) -> Tensor:
    """`t` in the strides that `torch.empty_like(like)` has."""
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)


def _norm_like(v: Tensor, dim: int | None) -> Tensor:
    return v.new_empty(kept_shape(v.shape, dim), dtype=scale_dtype(v))


def _empty_grads(
    dx: Tensor, v: Tensor, g: Tensor, dim: int | None, db: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """What a fake of a layer's backward returns, from its `dx` and `db`."""
    return (
        dx if needs[0] else dx.new_empty(0),
        torch.empty_like(v) if needs[1] else v.new_empty(0),
        g.new_empty(kept_shape(v.shape, dim) if needs[2] else 0),
        db if needs[3] else db.new_empty(0),
    )


_weight_norm = _register(
    "weight_norm(Tensor v, Tensor g, int? dim, float eps, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor)",
    lambda v, g, dim, eps, dtype, backend: _forward(
        None, v, g, None, dim, eps, backend, dtype=dtype
    ),
    lambda v, g, dim, eps, dtype, backend: (torch.empty_like(v, dtype=dtype), _norm_like(v, dim)),
)

_weight_norm_backward = _register(
    "weight_norm_backward(Tensor dw, Tensor v, Tensor g, Tensor n, int? dim, float eps,"
    " str backend) -> (Tensor, Tensor)",
    lambda dw, v, g, n, *rest: _backward(dw, None, v, g, n, *rest, (False, True, True, False))[1:3],
    lambda dw, v, g, n, dim, *rest: (
        torch.empty_like(v),
        g.new_empty(kept_shape(v.shape, dim)),
    ),
)

_linear = _register(
    "linear(Tensor x, Tensor v, Tensor g, Tensor? bias, int? dim, float eps, str backend)"
    " -> (Tensor, Tensor)",
    _forward,
    lambda x, v, g, bias, dim, *rest: (
        x.new_empty(*x.shape[:-1], v.shape[0]),
        _norm_like(v, dim),
    ),
)

_linear_backward = _register(
    "linear_backward(Tensor dy, Tensor x, Tensor v, Tensor g, Tensor n, int? dim, float eps,"
    " str backend, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, x, v, g, n, dim, eps, backend, needs: _empty_grads(
        x.new_empty(x.shape), v, g, dim, dy.new_empty(v.shape[0]), needs
    ),
)

_convolution = _register(
    f"convolution(Tensor x, Tensor v, Tensor g, Tensor? bias, {_GEOMETRY}, int? dim, float eps,"
    " str backend) -> (Tensor, Tensor)",
    _forward,
    lambda x, v, g, bias, *rest: (
        torch.convolution(x, v.to(x.dtype), None, *rest[:6]),
        _norm_like(v, rest[6]),
    ),
)

_convolution_backward = _register(
    f"convolution_backward(Tensor dy, Tensor x, Tensor v, Tensor g, Tensor n, {_GEOMETRY},"
    " int? dim, float eps, str backend, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, x, v, g, n, *rest: _empty_grads(
        torch.empty_like(x), v, g, rest[6], dy.new_empty(dy.shape[1]), rest[-1]
    ),
)
