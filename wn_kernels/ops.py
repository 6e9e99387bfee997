"""The registered operators `torch.ops.wn_kernels.*`: schemas, fakes, and the one call into a
backend.

    weight_norm           (v, g)           -> (W, n)
    weight_norm_backward  (dW, v, g, n)    -> (dV, dg)
    linear                (x, v, g, bias)  -> (y, n)
    linear_backward       (dY, x, v, g, n) -> (dX, dV, dg, db)

`dim` is canonical (`None` or in `[0, ndim)`), `g` and `n` have the kept shape, `x` is `(*, K)`.
A gradient that `needs` does not ask for is an empty tensor. `backend` names the backend, `""`
leaves the choice to `plan`. No operator is differentiable by itself: `autograd.py` is.

The functions of the same names are what `functional.py` and `autograd.py` call. They go through
the registered operator where something has to see it, a compiler or a Triton kernel that must not
be launched on fake tensors, and straight to the ATen path otherwise: its operations are visible to
everything by themselves, and a call is 3 µs shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import plan
from .backends import aten
from .backends.reference import scale_dtype
from .backends.shapes import kept_shape

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


def _tf32() -> bool:
    """Whether PyTorch is set to take float32 products in TF32."""
    return torch.get_float32_matmul_precision() != "highest"


def _rows(x: Tensor) -> Tensor:
    """`(*, K)` as `(M, K)`."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _norm_like(v: Tensor, dim: int | None) -> Tensor:
    return v.new_empty(kept_shape(v.shape, dim), dtype=scale_dtype(v))


# --- weight_norm -------------------------------------------------------------------------------


def weight_norm(
    v: Tensor, g: Tensor, dim: int | None, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """`(W, n)`: the weight in `dtype` and in `V`'s memory layout, and the norms."""
    if backend == "aten":
        return aten.weight_norm(v, g, dim, eps, dtype)
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
    if backend == "aten":
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


# --- linear ------------------------------------------------------------------------------------

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def linear(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dim: int | None,
    eps: float,
    backend: str,
    keep_product: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, n, product)`: the output, the norms and, where `keep_product` allows it and the planner
    finds it worth its memory, `x Vᵀ` for the backward."""
    if backend != "aten":
        return *_linear_op(x, v, g, bias, dim, eps, backend), None
    path = plan.aten_linear(x.shape, v.shape, x.dtype, v.dtype, dim)
    keep_product = keep_product and path.keeps_product
    if x.ndim == 2:
        return aten.linear(x, v, g, bias, dim, eps, path.forward, keep_product)
    y, n, product = aten.linear(_rows(x), v, g, bias, dim, eps, path.forward, keep_product)
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
    if module is aten:
        return linear(x, v, g, bias, dim, eps, "aten", False)[:2]
    rows = _rows(x)
    path = plan.triton_linear(x.shape, v.shape, x.dtype, v.dtype, dim, _tf32())
    y, n = module.linear(rows, v, g, bias, dim, eps, path.forward)
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
    needs: tuple[bool, bool, bool, bool],
) -> Grads:
    """`(dX, dV, dg, db)`, `None` where `needs` is false."""
    if backend != "aten":
        grads = _linear_backward_op(dy, x, v, g, n, dim, eps, backend, needs)
        dx, dv, dg, db = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return dx, dv, dg, db
    variant = plan.aten_linear(x.shape, v.shape, x.dtype, v.dtype, dim).backward
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = _backend_of(backend, x)
    mask = (needs[0], needs[1], needs[2], needs[3])
    if module is aten:
        dx, dv, dg, db = linear_backward(dy, x, v, g, n, None, dim, eps, "aten", mask)
    else:
        rows = _rows(x)
        path = plan.triton_linear(x.shape, v.shape, x.dtype, v.dtype, dim, _tf32())
        dx, dv, dg, db = module.linear_backward(
            _rows(dy), rows, v, g, n, dim, eps, path.backward, mask
        )
        dx = dx if dx is None else dx.view(x.shape)
    return (
        dx if needs[0] and dx is not None else x.new_empty(0),
        dv if needs[1] and dv is not None else v.new_empty(0),
        dg if needs[2] and dg is not None else g.new_empty(0),
        db if needs[3] and db is not None else dy.new_empty(0),
    )


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
