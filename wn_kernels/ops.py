"""The registered operators `torch.ops.wn_kernels.*`: schemas, fakes, and the one call into a
backend.

    weight_norm           (v, g)           -> (W, n)
    weight_norm_backward  (dW, v, g, n)    -> (dV, dg)
    linear                (x, v, g, bias)  -> (y, n)
    linear_backward       (dY, x, v, g, n) -> (dX, dV, dg, db)
    convolution           (x, v, g, bias)  -> (y, n)
    convolution_backward  (dY, x, v, g, n) -> (dX, dV, dg, db)

`dim` is canonical (`None` or in `[0, ndim)`), `g` and `n` have the kept shape. `x` is
`(*, K)` for `linear`, `(B, C, *sizes)` for `convolution`, whose geometry follows it as
`torch.convolution` takes it.
A gradient that `needs` does not ask for is an empty tensor. `backend` names the backend, `""`
leaves the choice to `plan`. No operator is differentiable by itself: `autograd.py` is.

The functions of the same names are what `functional.py` and `autograd.py` call. They go through
the registered operator where something has to see it, a compiler or a Triton kernel that must not
be launched on fake tensors, and straight to the ATen path otherwise: a call is 3 µs shorter, and it
may raise `aten.OutOfRange`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import plan
from .backends import aten
from .backends.reference import scale_dtype, takes_tf32
from .backends.shapes import Geometry, kept_shape
from .costs import Call

_library = torch.library.Library("wn_kernels", "DEF")


def _register(schema: str, implementation: Callable, fake: Callable) -> Any:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wn_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.wn_kernels, name).default


def _backend_of(name: str, x: Tensor) -> Any:
    """The backend's module. Triton's is imported on first use: `import wn_kernels` must not."""
    if (name or plan.choose_backend(x)) == "triton":
        from .backends import triton

        return triton
    return aten


def _rows(x: Tensor) -> Tensor:
    """`(*, K)` as `(M, K)`."""
    if x.ndim == 2:
        return x
    return x.flatten(0, -2) if x.ndim > 2 else x.unsqueeze(0)


def _chosen(
    backend: Any, x: Tensor, v: Tensor, dim: int | None, conv: Geometry | None = None
) -> Any:
    """How the backend, a module, serves a call."""
    call = Call(x.shape, v.shape, x.dtype, v.dtype, dim, conv)
    if backend is aten:
        return plan.choose(call, "aten")
    last = conv is not None and x.stride(1) == 1
    return plan.choose(call._replace(channels_last=last, tf32=takes_tf32(x.dtype)), "triton")


def _norm_like(v: Tensor, dim: int | None) -> Tensor:
    return v.new_empty(kept_shape(v.shape, dim), dtype=scale_dtype(v))


# --- weight_norm -------------------------------------------------------------------------------


def weight_norm(
    v: Tensor, g: Tensor, dim: int | None, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """`(W, n)`: the weight in `dtype` and in `V`'s memory layout, and the norms."""
    if plan.goes_to_aten(backend):
        return aten.weight_norm(v, g, dim, eps, dtype, look=True)
    return _weight_norm_op(v, g, dim, eps, dtype, backend)


_weight_norm_op = _register(
    "weight_norm(Tensor v, Tensor g, int? dim, float eps, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor)",
    lambda v, g, dim, eps, dtype, backend: _backend_of(backend, v).weight_norm(
        v, g, dim, eps, dtype
    ),
    lambda v, g, dim, eps, dtype, backend: (
        torch.empty_like(v, dtype=dtype),
        _norm_like(v, dim),
    ),
)


def weight_norm_backward(
    dw: Tensor, v: Tensor, g: Tensor, n: Tensor, dim: int | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """`(dV, dg)` from `dW`."""
    if plan.goes_to_aten(backend):
        return aten.weight_norm_backward(dw, v, g, n, dim, eps)
    return _weight_norm_backward_op(dw, v, g, n, dim, eps, backend)


_weight_norm_backward_op = _register(
    "weight_norm_backward(Tensor dw, Tensor v, Tensor g, Tensor n, int? dim, float eps,"
    " str backend) -> (Tensor, Tensor)",
    lambda dw, v, g, n, dim, eps, backend: _backend_of(backend, v).weight_norm_backward(
        dw, v, g, n, dim, eps
    ),
    lambda dw, v, g, n, dim, eps, backend: (
        torch.empty_like(v),
        g.new_empty(kept_shape(v.shape, dim)),
    ),
)


Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool, bool]


def _all_tensors(
    grads: Grads, likes: tuple[Tensor, ...], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The gradients as an operator returns them: an empty tensor for one not asked for."""
    return tuple(
        grad if need and grad is not None else like.new_empty(0)
        for grad, like, need in zip(grads, likes, needs, strict=True)
    )


def _only_needed(grads: Sequence[Tensor], needs: Needs) -> Grads:
    """The reverse: `None` for one not asked for."""
    dx, dv, dg, db = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dx, dv, dg, db


# --- linear ------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dim: int | None,
    eps: float,
    backend: str,
    path: plan.AtenLinear | None,
    keep_product: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, n, product)`: the output, the norms and, where `keep_product` allows it and the ATen
    path's `path` finds it worth its memory, `x Vᵀ` for the backward."""
    if path is None or not plan.goes_to_aten(backend):
        return *_linear_op(x, v, g, bias, dim, eps, backend), None
    return _aten_linear(x, v, g, bias, dim, eps, path, keep_product, look=True)


def _aten_linear(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dim: int | None,
    eps: float,
    path: plan.AtenLinear,
    keep_product: bool,
    look: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    keep_product = keep_product and path.keeps_product
    if x.ndim == 2:
        return aten.linear(x, v, g, bias, dim, eps, path.forward, keep_product, look)
    y, n, product = aten.linear(_rows(x), v, g, bias, dim, eps, path.forward, keep_product, look)
    return y.view(*x.shape[:-1], v.shape[0]), n, product


def _linear(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dim: int | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = _backend_of(backend, x)
    path = _chosen(module, x, v, dim)
    if module is aten:
        return _aten_linear(x, v, g, bias, dim, eps, path, False)[:2]
    y, n = module.linear(_rows(x), v, g, bias, dim, eps, path.forward)
    return y.view(*x.shape[:-1], v.shape[0]), n


_linear_op = _register(
    "linear(Tensor x, Tensor v, Tensor g, Tensor? bias, int? dim, float eps, str backend)"
    " -> (Tensor, Tensor)",
    _linear,
    lambda x, v, g, bias, dim, eps, backend: (
        x.new_empty(*x.shape[:-1], v.shape[0]),
        _norm_like(v, dim),
    ),
)


def linear_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    product: Tensor | None,
    dim: int | None,
    eps: float,
    backend: str,
    path: plan.AtenLinear | None,
    needs: Needs,
) -> Grads:
    """`(dX, dV, dg, db)`, `None` where `needs` is false; `path` is the ATen path's."""
    if path is None or not plan.goes_to_aten(backend):
        grads = _linear_backward_op(dy, x, v, g, n, dim, eps, backend, needs)
        return _only_needed(grads, needs)
    return _aten_linear_backward(dy, x, v, g, n, product, dim, eps, path.backward, needs)


def _aten_linear_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    product: Tensor | None,
    dim: int | None,
    eps: float,
    variant: str,
    needs: Needs,
) -> Grads:
    if x.ndim == 2:
        return aten.linear_backward(dy, x, v, g, n, product, dim, eps, variant, needs)
    dx, dv, dg, db = aten.linear_backward(
        _rows(dy), _rows(x), v, g, n, product, dim, eps, variant, needs
    )
    return dx if dx is None else dx.view(x.shape), dv, dg, db


def _linear_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    dim: int | None,
    eps: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    module = _backend_of(backend, x)
    variant = _chosen(module, x, v, dim).backward
    mask = (needs[0], needs[1], needs[2], needs[3])
    if module is aten:
        dx, dv, dg, db = _aten_linear_backward(dy, x, v, g, n, None, dim, eps, variant, mask)
    else:
        dx, dv, dg, db = module.linear_backward(
            _rows(dy), _rows(x), v, g, n, dim, eps, variant, mask
        )
        dx = dx if dx is None else dx.view(x.shape)
    # As the fake has it.
    dv = dv if dv is None else _laid_out_like(dv, v)
    return _all_tensors((dx, dv, dg, db), (x, v, g, dy), needs)


_linear_backward_op = _register(
    "linear_backward(Tensor dy, Tensor x, Tensor v, Tensor g, Tensor n, int? dim, float eps,"
    " str backend, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_backward,
    lambda dy, x, v, g, n, dim, eps, backend, needs: (
        x.new_empty(x.shape if needs[0] else 0),
        torch.empty_like(v) if needs[1] else v.new_empty(0),
        g.new_empty(kept_shape(v.shape, dim) if needs[2] else 0),
        dy.new_empty(v.shape[0] if needs[3] else 0),
    ),
)


# --- convolution -------------------------------------------------------------------------------

_GEOMETRY = (
    "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"
)


def _geometry(arguments: Sequence[Any]) -> Geometry:
    """The geometry as an operator gets it, with lists for tuples."""
    stride, padding, dilation, transposed, output_padding, groups = arguments
    return Geometry(
        tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups
    )


def convolution(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Geometry,
    dim: int | None,
    eps: float,
    backend: str,
    path: plan.AtenConvolution | None,
) -> tuple[Tensor, Tensor]:
    """`(y, n)`: the output and the norms; `path` is the ATen path's."""
    if path is None or not plan.goes_to_aten(backend):
        return _convolution_op(x, v, g, bias, *conv, dim, eps, backend)
    return aten.convolution(x, v, g, bias, conv, dim, eps, path.forward, look=True)


def _convolution(
    x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    *geometry, dim, eps, backend = rest
    conv = _geometry(geometry)
    module = _backend_of(backend, x)
    variant = _chosen(module, x, v, dim, conv).forward
    return module.convolution(x, v, g, bias, conv, dim, eps, variant)


_convolution_op = _register(
    f"convolution(Tensor x, Tensor v, Tensor g, Tensor? bias, {_GEOMETRY}, int? dim, float eps,"
    " str backend) -> (Tensor, Tensor)",
    _convolution,
    lambda x, v, g, bias, *rest: (
        torch.convolution(x, v.to(x.dtype), None, *rest[:6]),
        _norm_like(v, rest[6]),
    ),
)


def convolution_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    conv: Geometry,
    dim: int | None,
    eps: float,
    backend: str,
    path: plan.AtenConvolution | None,
    needs: Needs,
) -> Grads:
    """`(dX, dV, dg, db)`, `None` where `needs` is false; `path` is the ATen path's."""
    if path is None or not plan.goes_to_aten(backend):
        grads = _convolution_backward_op(dy, x, v, g, n, *conv, dim, eps, backend, needs)
        return _only_needed(grads, needs)
    return aten.convolution_backward(dy, x, v, g, n, conv, dim, eps, path.backward, needs)


def _convolution_backward(
    dy: Tensor, x: Tensor, v: Tensor, g: Tensor, n: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *geometry, dim, eps, backend, needs = rest
    conv = _geometry(geometry)
    module = _backend_of(backend, x)
    mask = (needs[0], needs[1], needs[2], needs[3])
    variant = _chosen(module, x, v, dim, conv).backward
    grads = module.convolution_backward(dy, x, v, g, n, conv, dim, eps, variant, mask)
    dx, dv, dg, db = grads
    # As the fakes have it, whatever a vendor's library returned.
    dx = dx if dx is None else _laid_out_like(dx, x)
    dv = dv if dv is None else _laid_out_like(dv, v)
    return _all_tensors((dx, dv, dg, db), (x, v, g, dy), needs)


def _laid_out_like(t: Tensor, like: Tensor) -> Tensor:
    """`t` in the strides that `torch.empty_like(like)` has."""
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)


_convolution_backward_op = _register(
    f"convolution_backward(Tensor dy, Tensor x, Tensor v, Tensor g, Tensor n, {_GEOMETRY},"
    " int? dim, float eps, str backend, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _convolution_backward,
    lambda dy, x, v, g, n, *rest: (
        torch.empty_like(x) if rest[-1][0] else x.new_empty(0),
        torch.empty_like(v) if rest[-1][1] else v.new_empty(0),
        g.new_empty(kept_shape(v.shape, rest[6]) if rest[-1][2] else 0),
        dy.new_empty(dy.shape[1] if rest[-1][3] else 0),
    ),
)
