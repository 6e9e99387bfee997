"""The ATen path computes layers from ATen operations, on a CPU and on any device without Triton.

In every backend, the norms `n` have the shape of `g`, in float32 (float64 for a float64 `V`). The
norm of a slice of zeros is stored as `+inf`. Its scale `s = g / n`, its `dg = a / n` and its `dV`
are then zero without a special case.

The forward of a linear layer has two variants:

    scaled       y = (x Vᵀ) ⊙ s + b   (dim=0, None)        y = (x ⊙ s) Vᵀ + b   (dim=1)
    materialize  W = s ⊙ V, then y = x Wᵀ + b

The backward uses `a_j = ⟨dW_j, V_j⟩`, `dg = a / n` and `c = s · dg / n`:

    dX = (dY ⊙ s) V,   dV = s ⊙ (dYᵀ X) - c ⊙ V

For the other norms, `dV` is `s ⊙ dW - c ⊙ u` with the slope `u / d` of the norm (`reference.py`)
and `c = s · dg / d`.

A smaller product may hold `a` already, and then `a` needs no pass over the weights. It is
`a_j = Σ_m dY_mj (x Vᵀ)_mj` for dim=0, `a_k = Σ_m x_mk (dY V)_mk` for dim=1, and the sum of the
latter for `None`. `dV` then starts as `-c ⊙ u`, and the matmul accumulates onto it. `dV` is thus
written once.

A convolution has the variants `output`, `input` and `materialize`. `output` scales the channels of
its output, and `input` those of its input. The scale belongs to one of these sides. `materialize`
forms `W`. If the input is scaled, `a` comes from a smaller product again. It is `a_c = Σ x_c dX_c`
over the batch and the pixels, with `dX` before its scale.

Only float32 and float64 are scaled after a product. An unscaled float16 product can overflow where
the scaled one does not, so the planner gives lower precisions to `materialize`. In bfloat16, whose
range is that of float32, `dY` may be scaled for `dX`.

These formulas do not hold for norms far from one. Their squares leave float32's range, and so may
an unscaled product. If a caller passes `look`, norms out of range raise `OutOfRange`. The caller
then computes the definition in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call, Geometry, Grads, Needs, Operands, Slices
from . import vendor
from .aten_weight import (
    OutOfRange,
    fused_weight_norm,
    norms,
    scale,
    scaled_weight,
    subtracted,
    weight_norm,
    weight_norm_backward,
)
from .native.limits import AT_ONCE_BYTES, is_left
from .vendor import channel_sums, convolution_grads

__all__ = ["OutOfRange", "fused_weight_norm", "layer", "layer_backward"]


# --- linear ------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    slices: Slices,
    variant: str,
    keep_product: bool,
    look: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns `(y, n, product)` for `x` of shape `(M, K)`. `look` has the meaning of `norms`.

    `product` is the unscaled `x Vᵀ` if `keep_product` is true and the variant forms it (scaled,
    dim=0), and `None` otherwise. These `M·N` numbers save the backward a pass over the weights.
    """
    dim = slices.dim
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if variant == "materialize":
        w, n = weight_norm(v, g, slices, x.dtype, look)
        return F.linear(x, w, bias), n, None
    n = norms(v, slices, look)
    s = scale(g, n)
    if dim == 1:
        return F.linear(x * s, v, bias), n, None

    if dim == 0:
        s = s.view(-1)
    # If `V` is on the left, the epilogue transposes the product when it writes the output.
    product = torch.mm(v, x.t()).t() if is_left(len(x)) else torch.mm(x, v.t())
    kept = product if keep_product and dim == 0 else None
    y = product if kept is None and product.is_contiguous() else x.new_empty(product.shape)
    if bias is None:
        torch.mul(product, s, out=y)
    else:
        torch.addcmul(bias, product, s, out=y)
    return y, n, kept


def linear_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    product: Tensor | None,
    slices: Slices,
    variant: str,
    needs: Needs,
) -> Grads:
    """Returns `(dX, dV, dg, db)`, with `None` for those that `needs` excludes. `dY` is `(M, N)` and
    `x` is `(M, K)`."""
    dim = slices.dim
    needs_x, needs_v, needs_g, needs_bias = needs
    needs_weight = needs_v or needs_g
    dx = dv = dg = None
    db = dy.sum(0) if needs_bias else None
    s = scale(g, n)

    if variant == "materialize":
        if needs_x:
            dx = torch.mm(dy, scaled_weight(v, s, x.dtype))
    elif dim == 0:
        scaled_dy = (dy * s.view(-1)).to(x.dtype)
        if needs_x:
            dx = torch.mm(scaled_dy, v)
        if needs_weight and product is not None:
            dg = (dy * product).sum(0).view_as(n).div_(n)
            dv = _scaled_grad(scaled_dy, x, v, s, dg, n, slices) if needs_v else None
    elif needs_x:
        unscaled = torch.mm(dy, v)
        if needs_weight:
            a = x * unscaled
            dg = (a.sum(0, keepdim=True) if dim == 1 else a.sum()).div_(n)
            dv = _scaled_grad(dy, x * s, v, s, dg, n, slices) if needs_v else None
        dx = unscaled.mul_(s)

    if needs_weight and dg is None:
        dv, dg = weight_norm_backward(torch.mm(dy.t(), x), v, g, n, slices, overwrite=True)
    if dv is not None and dv.dtype != v.dtype:
        dv = dv.to(v.dtype)
    if dg is not None and dg.dtype != g.dtype:
        dg = dg.to(g.dtype)
    return dx, dv, dg, db


def _scaled_grad(
    lhs: Tensor, rhs: Tensor, v: Tensor, s: Tensor, dg: Tensor, n: Tensor, slices: Slices
) -> Tensor:
    """Returns `dV = lhsᵀ rhs - c ⊙ u`. One of the two factors includes the scale already."""
    u, c = subtracted(v, s, dg, n, slices)
    dv = torch.mul(u, c.neg_(), out=None if u is v else u)
    return dv.addr_(lhs[0], rhs[0]) if len(lhs) == 1 else dv.addmm_(lhs.t(), rhs)


# --- convolution -------------------------------------------------------------------------------


def convolution(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Geometry,
    slices: Slices,
    variant: str,
    look: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns `(y, n)` for `x` of shape `(B, C, *sizes)`. `look` has the meaning of `norms`."""
    dim = slices.dim
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if variant == "materialize":
        w, n = weight_norm(v, g, slices, x.dtype, look)
        return vendor.convolution(x, w, bias, conv), n
    n = norms(v, slices, look)
    s = conv.per_channel(scale(g, n), dim, x.ndim)
    if variant == "input":
        return vendor.convolution(x * s, v, bias, conv), n
    y = vendor.convolution(x, v, None, conv)
    if bias is None:
        return y.mul_(s), n
    return torch.addcmul(bias.view(-1, *[1] * (x.ndim - 2)), y, s, out=y), n


def convolution_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    conv: Geometry,
    slices: Slices,
    variant: str,
    needs: Needs,
) -> Grads:
    """Returns `(dX, dV, dg, db)`, with `None` for those that `needs` excludes."""
    dim = slices.dim
    needs_x, needs_v, needs_g, needs_bias = needs
    needs_weight = needs_v or needs_g
    s = scale(g, n)
    if variant == "input" and needs_x and needs_weight:
        # If the input is scaled, one call gives dX before its scale and s ⊙ dW.
        s_x = conv.per_channel(s, dim, x.ndim)
        dx, dv, db = convolution_grads(dy, x * s_x, v, conv, True, True, needs_bias)
        wide_dg = _channel_dots(x, dx, conv, dim).view_as(n).div_(n)
        dv.addcmul_(*subtracted(v, s, wide_dg, n, slices), value=-1)
        return dx.mul_(s_x), dv, wide_dg.to(g.dtype), db

    dx = dv = None
    dg: Tensor | None = None
    w: Tensor | None = None
    if needs_x and variant == "materialize":
        w = scaled_weight(v, s, x.dtype)
        if w.nbytes > AT_ONCE_BYTES:  # W is freed before dW is allocated
            dx, _, _ = convolution_grads(dy, x, w, conv, True, False, False)
            w = None
    elif needs_x and variant == "output":
        scaled_dy = dy * conv.per_channel(s, dim, x.ndim)
        dx, _, _ = convolution_grads(scaled_dy, x, v, conv, True, False, False)
    elif needs_x:
        dx, _, _ = convolution_grads(dy, x, v, conv, True, False, False)
        dx.mul_(conv.per_channel(s, dim, x.ndim))
    if w is None:  # the elements of a weight do not matter to dW
        _, dw, db = convolution_grads(dy, x, v.to(x.dtype), conv, False, needs_weight, needs_bias)
    else:
        dx, dw, db = convolution_grads(dy, x, w, conv, True, needs_weight, needs_bias)
    if needs_weight:
        dv, dg = weight_norm_backward(dw, v, g, n, slices, overwrite=True)
    return dx, dv, dg, db


def _channel_dots(x: Tensor, dx: Tensor, conv: Geometry, dim: int | None) -> Tensor:
    """Returns `a = ⟨dW, V⟩` of the slices along the input channels, from `dX` before its scale."""
    dots = x * dx
    if dim is None:
        return dots.sum()
    dots = channel_sums(dots)
    return dots.view(conv.groups, -1).sum(0) if dim == 1 else dots


# --- the signature that all backends share -------------------------------------------------------


def layer(
    call: Call, plan: Any, tensors: Operands, keep: bool, look: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes a call by `plan` and returns `(y, n, kept)`. `y` is the output, or `W` if there is
    no `x`. `n` are the norms. `kept` is the product that a linear layer saves for the backward if
    `keep` is true. The `x` of a linear layer is 2-d."""
    x, v, g, bias = tensors
    if x is None:
        return *weight_norm(v, g, call, call.x_dtype, look), None
    options = call, plan.forward
    if call.conv is not None:
        return *convolution(x, v, g, bias, call.conv, *options, look), None
    return linear(x, v, g, bias, *options, keep and plan.keeps == "product", look)


def layer_backward(
    call: Call,
    plan: Any,
    dy: Tensor,
    tensors: Operands,
    n: Tensor,
    kept: Tensor | None,
    needs: Needs,
) -> Grads:
    """Returns `(dX, dV, dg, db)`. A gradient that `needs` excludes is `None`, unless another output
    yields it at no extra cost."""
    x, v, g, _ = tensors
    if x is None:
        return None, *weight_norm_backward(dy, v, g, n, call), None
    options = call, plan.backward, needs
    if call.conv is not None:
        return convolution_backward(dy, x, v, g, n, call.conv, *options)
    return linear_backward(dy, x, v, g, n, kept, *options)
