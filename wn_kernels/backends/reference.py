"""This file defines weight norm and the layers built on it, in differentiable ATen operations.

    n_j = ‖V_j‖,  with eps > 0: max(‖V_j‖, eps)
    s_j = g_j / n_j,  0 where V_j = 0 and eps = 0
    W   = s ⊙ V

The norm is the root of the sum of squares (`"l2"`), the sum of magnitudes (`"l1"`) or the largest
magnitude (`"linf"`). Its slope is h = ∂n/∂V = u / d:

    l2     u = V,                    d = n
    l1     u = sign V,               d = 1
    linf   u = sign V · [|V| = n],   d = the number of these elements, which share the slope

sign 0 is 0. These are PyTorch's conventions. Norms and scales are computed and kept in float32, or
in float64 for a float64 `V`. The product runs in the input's dtype. Autograd derives every
derivative of every order from these operations. The direction of a slice of norm zero is defined as
zero, so that its derivatives are finite: its norm is `+inf`. The other backends are tested against
this file in float64. `torch.func` transforms run on it.

The backward of a layer takes `dY` to

    dX = dY W,   dW = dYᵀ X,   db = Σ dY
    dg = ⟨dW, V⟩ / n,   dV = s ⊙ dW − c ⊙ u,   c = s · dg / d

A convolution has products of its own. The backward of this backward is given the gradients `ddX`,
`ddV`, `ddg` and `ddb` with respect to these results. Its weight's part is `weight_grads_backward`:

    b = ⟨ddV, u⟩ / d,   t = ⟨ddV, dW⟩,   e = (ddg − s · b) / n
    f = (s · (t − k b · dg) + ddg · dg) / n / d    with k = 3 for l2, and 2 for the others
    ddW = s ⊙ ddV + e ⊙ V                          with respect to dW
    e ⊙ dW − c ⊙ ddV − f ⊙ u,   (t − b · dg) / n   with respect to V and g

The term with ddV comes from ∂h/∂V. It is zero for the other norms, whose slope is constant almost
everywhere. The products give the rest. `ddX Wᵀ + X ddWᵀ + ddb` is the gradient with respect to
`dY`, and `dY ddW` with respect to `x`. `dYᵀ ddX`, with respect to `W`, goes on to `V` and `g` as
`dW` does above. Where eps clamps a norm, the norm is a constant: `b`, `c`, `f`, and `dg` in these
sums, are zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Geometry, Grads, Norm, kept_shape, reduced_dims, scale_dtype
from . import vendor


def norms(v: Tensor, dim: int | None, eps: float, norm: Norm = "l2") -> Tensor:
    """Returns `n` in `scale_dtype(v)`, with the shape of `g`."""
    wide = v.to(scale_dtype(v))
    if norm == "l2":
        squares = summed(wide.square(), dim)
        zero = squares == 0
        # The slope of the root at zero is infinite, and its product with the outer mask's zero
        # would be NaN. The inner `where` keeps it out of the graph.
        n = torch.where(zero, 1.0, squares).sqrt()
    else:
        n = summed(wide.abs(), dim) if norm == "l1" else largest(wide.abs(), dim)
        zero = n == 0
    return torch.where(zero | (n <= eps), eps, n) if eps > 0 else torch.where(zero, math.inf, n)


def slice_norm(v: Tensor, dim: int | None, norm: Norm) -> Tensor:
    """Returns the norm of every slice, which is zero for a slice of zeros, with the shape of `g`.
    Sums are in float64 on a CPU and a CUDA device, and in `scale_dtype(v)` elsewhere."""
    dims = reduced_dims(v.ndim, dim)
    if not dims:
        return v.abs()
    dtype = torch.float64 if v.is_cpu or v.is_cuda else scale_dtype(v)
    if norm == "l2":
        return torch.linalg.vector_norm(v, 2, dims, keepdim=dim is not None, dtype=dtype)
    return summed(v.to(dtype).abs(), dim) if norm == "l1" else largest(v.abs(), dim)


def summed(products: Tensor, dim: int | None) -> Tensor:
    """Returns the sum of every slice, with dimensions kept."""
    if dims := reduced_dims(products.ndim, dim):  # for an empty list, `sum` reduces all dimensions
        # The addition reduces a DTensor's partial sums here, once.
        return products.sum(dims, keepdim=dim is not None) + 0.0
    return products


def largest(magnitudes: Tensor, dim: int | None) -> Tensor:
    """Returns the largest element of every slice, with dimensions kept, and 0 of an empty one."""
    dims = reduced_dims(magnitudes.ndim, dim)
    is_traced = torch._C._get_tracing_state() is not None  # sizes are tensors there
    if not dims or not (is_traced or magnitudes.numel()):
        return summed(magnitudes, dim)
    return magnitudes.amax(dims, keepdim=dim is not None) + 0.0


def slice_scale(v: Tensor, g: Tensor, dim: int | None, eps: float, norm: Norm = "l2") -> Tensor:
    """Returns `s = g / n` in `scale_dtype(v)`, with the shape of `g`."""
    n = norms(v, dim, eps, norm)
    return g.to(n.dtype) / n


def weight_norm(
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float,
    norm: Norm = "l2",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns `W = s ⊙ V` in `dtype`, which is `V`'s own by default."""
    return (v * slice_scale(v, g, dim, eps, norm)).to(dtype or v.dtype)


def linear(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dim: int | None,
    eps: float,
    norm: Norm = "l2",
) -> Tensor:
    """Returns `y = x Wᵀ + b` in `x`'s dtype. `x` has the shape `(*, K)`, and `V` has `(N, K)`."""
    w = weight_norm(v, g, dim, eps, norm, x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def convolution(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Geometry,
    dim: int | None,
    eps: float,
    norm: Norm = "l2",
) -> Tensor:
    """Returns the convolution of `x`, `(B, C, *sizes)`, with `W`, plus the bias, in `x`'s dtype."""
    w = weight_norm(v, g, dim, eps, norm, x.dtype)
    return vendor.convolution(x, w, None if bias is None else bias.to(x.dtype), conv)


def layer(
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Sequence | None,
    dim: int | None,
    eps: float,
    norm: Norm = "l2",
) -> Tensor:
    """Computes the call of a layer. It returns `W` if there is no `x`, a convolution if there is a
    geometry, and a linear layer otherwise. `g` has the kept shape, or is flat."""
    if g.ndim == 1:
        g = g.view(kept_shape(v.shape, dim))
    if x is None:
        return weight_norm(v, g, dim, eps, norm)
    if conv is None:
        return linear(x, v, g, bias, dim, eps, norm)
    return convolution(x, v, g, bias, Geometry(*conv), dim, eps, norm)


def layer_in_float64(
    x: Tensor | None, v: Tensor, g: Tensor, bias: Tensor | None, *options: Any
) -> Tensor:
    """Computes `layer` in float64 and returns it in the dtype of the product."""
    wide: Any = (None if t is None else t.double() for t in (x, v, g, bias))
    return layer(*wide, *options).to((v if x is None else x).dtype)


# --- derivatives ---------------------------------------------------------------------------------


def slope(v: Tensor, n: Tensor, norm: Norm) -> Tensor:
    """Returns `u`, in the dtype of `V`: the slope `∂n/∂V` of the norm, but for the factor `1 / d`.
    For l2 it is `V` itself."""
    if norm == "l2":
        return v
    return v.sign() if norm == "l1" else v.sign() * (v.abs() == n)


def slope_divisor(u: Tensor, n: Tensor, dim: int | None, norm: Norm) -> Tensor:
    """Returns `d`, with the shape of `g`, from `u` as `slope` returns it."""
    if norm == "l2":
        return n
    # A slice of zeros has no element with a slope.
    return torch.ones_like(n) if norm == "l1" else summed((u != 0).to(n.dtype), dim).clamp_min(1.0)


def weight_grads(
    dw: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    dim: int | None,
    eps: float,
    norm: Norm = "l2",
) -> tuple[Tensor, Tensor]:
    """Returns `(dV, dg)`, in the dtypes of `V` and `g`, from `n` as `norms` returns it."""
    wide_dw, wide_v, s = dw.to(n.dtype), v.to(n.dtype), g.view(n.shape).to(n.dtype) / n
    dg = summed(wide_dw * wide_v, dim) / n
    u = slope(wide_v, n, norm)
    c = _unless_clamped(s * dg / slope_divisor(u, n, dim, norm), n, eps)
    dv = s * wide_dw - c * u
    return dv.to(v.dtype), dg.view(g.shape).to(g.dtype)


def weight_grads_backward(
    ddv: Tensor,
    ddg: Tensor,
    dw: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor | None,
    dim: int | None,
    eps: float,
    norm: Norm = "l2",
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `weight_grads` with respect to `dW`, `V` and `g`, in their dtypes.
    The top of this file has the formulas.

    The derivatives of the result are right if `n` is `None`. The norms are then computed anew.
    """
    if n is None:
        n = norms(v, dim, eps, norm)
    wide_ddv, wide_dw, wide_v = ddv.to(n.dtype), dw.to(n.dtype), v.to(n.dtype)
    wide_ddg = ddg.view(n.shape).to(n.dtype)
    u = slope(wide_v, n, norm)
    d = slope_divisor(u, n, dim, norm)
    s = g.view(n.shape).to(n.dtype) / n
    dg = _unless_clamped(summed(wide_dw * wide_v, dim) / n, n, eps)
    b = _unless_clamped(summed(wide_ddv * u, dim) / d, n, eps)
    t = summed(wide_ddv * wide_dw, dim)
    e = (wide_ddg - s * b) / n
    k = 3 if norm == "l2" else 2
    f = _unless_clamped((s * (t - k * b * dg) + wide_ddg * dg) / n / d, n, eps)
    dv = e * wide_dw - f * u
    if norm == "l2":
        dv = dv - s * dg / d * wide_ddv
    return (
        (s * wide_ddv + e * wide_v).to(dw.dtype),
        dv.to(v.dtype),
        ((t - b * dg) / n).view(g.shape).to(g.dtype),
    )


def _unless_clamped(t: Tensor, n: Tensor, eps: float) -> Tensor:
    """Returns `t`, which is a factor of the norm's derivative, with zeros where `eps` clamps the
    norm."""
    return t.masked_fill(n <= eps, 0.0) if eps > 0 else t


def differentiable_grads(
    dy: Tensor | None,
    dw: Tensor | None,
    x: Tensor | None,
    v: Tensor,
    g: Tensor,
    conv: Sequence | None,
    dim: int | None,
    eps: float,
    needs: Sequence[bool],
    norm: Norm = "l2",
) -> Grads:
    """Returns `(dX, dV, dg, db)` of `layer`, with derivatives of every order. A gradient that
    `needs` excludes, or has no entry for, may be `None`.

    `dY` is the gradient of the output, which is `W` if there is no `x`. `dW` is another one of the
    weight, which is added to the layer's own. Either may be `None`.
    """
    needs_x, needs_v, needs_g, needs_bias = [*needs, *[False] * (4 - len(needs))]
    n = norms(v, dim, eps, norm)
    dx = db = None
    if x is None:
        dw = dy
    elif dy is not None:
        w = (v * (g.view(n.shape).to(n.dtype) / n)).to(x.dtype)
        wanted = needs_x, needs_v or needs_g, needs_bias
        if conv is None:
            dx, own, db = vendor.linear_grads(dy, x, w, *wanted)
        else:
            dx, own, db = vendor.convolution_grads(dy, x, w, Geometry(*conv), *wanted)
        dw = own if dw is None or own is None else own + dw
    if dw is None or not (needs_v or needs_g):
        return dx, None, None, db
    return dx, *weight_grads(dw, v, g, n, dim, eps, norm), db
