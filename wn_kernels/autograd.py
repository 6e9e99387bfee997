"""The `torch.autograd.Function`s.

First derivatives run on the backend that served the forward. A backward that is itself being
differentiated (`create_graph=True`) runs on the composite formula of `backends/reference.py`,
whose derivatives of every order are right.

None of them saves its output, so an in-place activation after the layer works, and none saves `W`.
Where the planner lets a convolution keep a small `W`, no Function of ours is needed: the weight is
differentiable and PyTorch's own convolution does the rest, without Python in its backward.
They take `ctx` in `forward` because the `setup_context` form costs 40 µs more a call (it binds the
arguments through `inspect`); `functional.py` sends `torch.func` transforms, which need that form,
to the composite formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, plan
from .backends import aten, reference, vendor
from .backends.shapes import Geometry, kept_shape


def _differentiable_grads(
    composite: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """The composite's gradients with respect to `inputs`, as part of the graph."""
    with torch.enable_grad():
        # Aliases, because an input's own history may lead to another input.
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need and t is not None]
        grads = iter(torch.autograd.grad(composite(*aliases), wanted, grad, create_graph=True))
    return [next(grads) if need else None for need in needs]


class WeightNorm(torch.autograd.Function):
    """`W = g · V / ‖V‖`, materialised."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        g: Tensor,
        dim: int | None,
        eps: float,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        w, n = ops.weight_norm(v, g, dim, eps, dtype, backend)
        ctx.save_for_backward(v, g, n)
        ctx.options = dim, eps, dtype, backend
        return w

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        v, g, n = ctx.saved_tensors
        dim, eps, dtype, backend = ctx.options
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            dv, dg = _differentiable_grads(
                lambda v, g: reference.weight_norm(v, g, dim, eps, dtype), (v, g), needs, dw
            )
        else:
            dv, dg = ops.weight_norm_backward(dw, v, g, n, dim, eps, backend)
        return dv, dg, None, None, None, None


def weight_norm(
    v: Tensor, g: Tensor, dim: int | None, eps: float, dtype: torch.dtype, backend: str
) -> Tensor:
    """`W`, differentiable: by torch's own kernel where that serves, or by `WeightNorm`."""
    # The hook holds on to `V`, which is no matter for a leaf.
    if v.is_leaf and plan.goes_to_aten(backend):
        fused = aten.fused_weight_norm(v, g, dim, eps, dtype)
        if fused is not None:
            w = fused[0]
            if w.grad_fn is not None:
                w.grad_fn.register_hook(functools.partial(_right_second_order, v, g, dim))
            return w
    return WeightNorm.apply(v, g, dim, eps, dtype, backend)


def _right_second_order(
    v: Tensor,
    g: Tensor,
    dim: int | None,
    grad_inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor],
) -> tuple[Tensor | None, ...] | None:
    """Takes the place of torch's own backward of `W` where that is itself differentiated: its
    derivative takes the norm for a constant."""
    if not torch.is_grad_enabled():
        return None
    needs = [grad is not None for grad in grad_inputs]
    return tuple(
        _differentiable_grads(
            lambda v, g: reference.weight_norm(v, g, dim, 0.0), (v, g), needs, grad_outputs[0]
        )
    )


class Linear(torch.autograd.Function):
    """`y = x Wᵀ + b` with `W = g · V / ‖V‖`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        g: Tensor,
        bias: Tensor | None,
        dim: int | None,
        eps: float,
        backend: str,
        path: plan.AtenLinear | None,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        keep = needs[1] or needs[2]
        y, n, product = ops.linear(x, v, g, bias, dim, eps, backend, path, keep)
        ctx.save_for_backward(x, v, g, bias, n, product)
        ctx.options = dim, eps, backend, path
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, v, g, bias, n, product = ctx.saved_tensors
        dim, eps, backend, path = ctx.options
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            dx, dv, dg, db = _differentiable_grads(
                lambda x, v, g, bias: reference.linear(x, v, g, bias, dim, eps),
                (x, v, g, bias),
                needs,
                dy,
            )
        else:
            dx, dv, dg, db = ops.linear_backward(
                dy, x, v, g, n, product, dim, eps, backend, path, needs
            )
            if db is not None and db.dtype != bias.dtype:
                db = db.to(bias.dtype)
        return dx, dv, dg, db, None, None, None, None


class Convolution(torch.autograd.Function):
    """The convolution of `x` with `W = g · V / ‖V‖`, plus the bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        g: Tensor,
        bias: Tensor | None,
        conv: Geometry,
        dim: int | None,
        eps: float,
        backend: str,
        path: plan.AtenConvolution | None,
    ) -> Tensor:
        y, n = ops.convolution(x, v, g, bias, conv, dim, eps, backend, path)
        ctx.save_for_backward(x, v, g, bias, n)
        ctx.options = conv, dim, eps, backend, path
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, v, g, bias, n = ctx.saved_tensors
        conv, dim, eps, backend, path = ctx.options
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            dx, dv, dg, db = _differentiable_grads(
                lambda x, v, g, bias: reference.convolution(x, v, g, bias, conv, dim, eps),
                (x, v, g, bias),
                needs,
                dy,
            )
        else:
            dx, dv, dg, db = ops.convolution_backward(
                dy, x, v, g, n, conv, dim, eps, backend, path, needs
            )
            if db is not None and db.dtype != bias.dtype:
                db = db.to(bias.dtype)
        return dx, dv, dg, db, None, None, None, None, None


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
) -> Tensor:
    """The convolution of `x` with `W`, differentiable."""
    if path is None or not path.keeps_weight or not plan.goes_to_aten(backend):
        return Convolution.apply(x, v, g, bias, conv, dim, eps, backend, path)
    w = weight_norm(v, g, dim, eps, x.dtype, backend)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return vendor.convolution(x, w, bias, conv)


def second_order(
    dy: Tensor,
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    dim: int,
    conv: tuple | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The native library's `(dX, dV, dg)` as part of the graph: of a convolution where there is a
    geometry, of `W` itself where there is no `x`, of a linear layer otherwise."""

    def layer(x: Tensor | None, v: Tensor, g: Tensor) -> Tensor:
        g = g.view(kept_shape(v.shape, dim))
        if x is None:
            return reference.weight_norm(v, g, dim, eps)
        if conv is None:
            return reference.linear(x, v, g, None, dim, eps)
        return reference.convolution(x, v, g, None, Geometry(*conv), dim, eps)

    return _differentiable_grads(layer, (x, v, g), needs, dy)
