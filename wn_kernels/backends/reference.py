"""This file defines weight norm and the layers built on it, in differentiable ATen operations.

    n_j = ‖V_j‖₂,  with eps > 0: max(‖V_j‖₂, eps)
    s_j = g_j / n_j,  0 where n_j = 0
    W   = s ⊙ V

Norms and scales are computed and kept in float32, or in float64 for a float64 `V`. The product runs
in the input's dtype. Autograd derives every derivative of every order from these operations. The
direction of a slice of norm zero is defined as zero, so that its derivatives are finite. The other
backends are tested against this file in float64. A double backward and `torch.func` transforms run
on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Geometry, kept_shape, reduced_dims, scale_dtype
from . import vendor


def slice_scale(v: Tensor, g: Tensor, dim: int | None, eps: float) -> Tensor:
    """Returns `s = g / n` in `scale_dtype(v)`, with the shape of `g`."""
    v = v.to(scale_dtype(v))
    squares = v.square()
    if dims := reduced_dims(v.ndim, dim):  # an empty list would make `sum` reduce every dimension
        # The addition reduces a DTensor's partial sums here, once.
        squares = squares.sum(dims, keepdim=dim is not None) + 0.0
    zero = squares == 0
    # The slope of the root at zero is infinite, and its product with the outer mask's zero would be
    # NaN. The inner `where` keeps it out of the graph.
    n = torch.where(zero, 1.0, squares).sqrt()
    if eps > 0:
        n = torch.where(zero | (n <= eps), eps, n)
        zero = torch.zeros_like(zero)
    return torch.where(zero, 0.0, g.to(n.dtype) / n)


def weight_norm(
    v: Tensor, g: Tensor, dim: int | None, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns `W = s ⊙ V` in `dtype`, which is `V`'s own by default."""
    return (v * slice_scale(v, g, dim, eps)).to(dtype or v.dtype)


def linear(
    x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None, dim: int | None, eps: float
) -> Tensor:
    """Returns `y = x Wᵀ + b` in `x`'s dtype. `x` has the shape `(*, K)`, and `V` has `(N, K)`."""
    w = weight_norm(v, g, dim, eps, x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def convolution(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Geometry,
    dim: int | None,
    eps: float,
) -> Tensor:
    """Returns the convolution of `x`, `(B, C, *sizes)`, with `W`, plus the bias, in `x`'s dtype."""
    w = weight_norm(v, g, dim, eps, x.dtype)
    return vendor.convolution(x, w, None if bias is None else bias.to(x.dtype), conv)


def layer(
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Sequence | None,
    dim: int | None,
    eps: float,
) -> Tensor:
    """Computes the call of a layer. It returns `W` if there is no `x`, a convolution if there is a
    geometry, and a linear layer otherwise. `g` has the kept shape, or is flat."""
    if g.ndim == 1:
        g = g.view(kept_shape(v.shape, dim))
    if x is None:
        return weight_norm(v, g, dim, eps)
    if conv is None:
        return linear(x, v, g, bias, dim, eps)
    return convolution(x, v, g, bias, Geometry(*conv), dim, eps)


def layer_in_float64(
    x: Tensor | None, v: Tensor, g: Tensor, bias: Tensor | None, *options: Any
) -> Tensor:
    """Computes `layer` in float64 and returns it in the dtype of the product."""
    wide: Any = (None if t is None else t.double() for t in (x, v, g, bias))
    return layer(*wide, *options).to((v if x is None else x).dtype)


def differentiable_grads(
    dy: Tensor,
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Sequence | None,
    dim: int | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Returns `(dX, dV, dg, db)` of `layer` as part of the graph. A gradient is `None` if its entry
    of `needs` is false or missing."""
    inputs = (x, v, g, bias)
    needs = [*needs, *[False] * (len(inputs) - len(needs))]
    with torch.enable_grad():
        # Aliases separate the inputs, because an input's own history may lead to another input.
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need and t is not None]
        y = layer(*aliases, conv, dim, eps)  # type: ignore[arg-type, call-arg]
        y = y.to(dy.dtype)  # `W` alone may be needed in another dtype
        grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(grads) if need else None for need in needs]
