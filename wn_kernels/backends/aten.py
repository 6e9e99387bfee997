"""The fast path from ATen operations: the CPU, and any device without Triton.

Shared by every backend: `norm` has the shape of `g`, in float32 (float64 for float64), and is
`+inf` for a slice of norm zero, so that its scale `s = g / n`, its `dg = a / n` and its `dV` come
out as zero without a special case.

Forward of a linear layer, in two variants:

    scaled       y = (x Vᵀ) ⊙ s + b   (dim=0, None)        y = (x ⊙ s) Vᵀ + b   (dim=1)
    materialize  W = s ⊙ V, then y = x Wᵀ + b

and backward, with `a_j = ⟨dW_j, V_j⟩`, `dg = a / n` and `c = s · dg / n`:

    dX = (dY ⊙ s) V,   dV = s ⊙ (dYᵀ X) - c ⊙ V

`a` needs no pass over the weights where a smaller product already holds it:
`a_j = Σ_m dY_mj (x Vᵀ)_mj` for dim=0, `a_k = Σ_m x_mk (dY V)_mk` for dim=1, its sum for `None`.
`dV` then starts as `-c ⊙ V` and the matmul accumulates onto it: one write of `dV` in all.

A convolution has the same variants: `output` scales the channels of its output, `input` those of
its input, whichever the scale belongs to, and `materialize` forms `W`. With the input scaled, `a`
comes from a smaller product again: `a_c = Σ x_c dX_c` over the batch and the pixels, with `dX`
before its scale.

Scaling after a product is for float32 and float64 only: an unscaled float16 product can overflow
where the scaled one does not, so the planner gives lower precisions to `materialize`.

Norms far from one are not for these formulas either: their squares leave float32's range, and so
may an unscaled product. A caller that asks for a `look` at them gets `OutOfRange`, and turns to the
definition in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import (
    NORM_RANGE,
    Call,
    Geometry,
    Grads,
    Needs,
    Operands,
    kept_shape,
    recorder,
    reduced_dims,
    scale_dtype,
)
from . import vendor
from .native.limits import LEFT_ROWS

INF = float("inf")

# Elements in a block of rows that two operations in a row visit while it is in cache (1 MiB of
# float32).
BLOCK = 1 << 18

# Elements of a row from which its norm is taken where it lies.
LONG_ROW = 32

# torch's own kernels, which take a norm and a scale (their gradients) in one operation, serve
# weights up to 32 MiB of float32; beyond, the allocator maps fresh pages for every result, whose
# faults cost more than the operation saves. A gradient that may take the place of `dW` needs no
# fresh result at all, which tells from 8 MiB on.
FUSED_MAX = 1 << 23
IN_PLACE_MIN = 1 << 21
_FUSED_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))

_fused_grad = torch.ops.aten._weight_norm_interface_backward.default


# --- norms and scaled weights ----------------------------------------------------------------


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in step, in blocks of rows that fit in cache."""
    first = tensors[0]
    rows = max(1, BLOCK // max(1, first[0].numel())) if len(first) else 1
    return zip(*(t.split(rows) for t in tensors), strict=True)


def _slice_dots(a: Tensor, b: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
    """`⟨A_j, B_j⟩` for every slice, keeping dimensions, accumulated in `dtype`.

    Reads each tensor once and writes no product of full size. Blocks are added in order.
    """
    if a.numel() == 0 or a.ndim == 0:
        product = a.to(dtype) * b.to(dtype)
        dims = reduced_dims(a.ndim, dim)
        return product.sum(dims, keepdim=dim is not None) if dims else product
    dims = reduced_dims(a.ndim, dim)
    parts = []
    for a_rows, b_rows in _blocks(a, b):
        product = a_rows.to(dtype) * b_rows.to(dtype)
        parts.append(product.sum(dims, keepdim=dim is not None) if dims else product)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if dim == 0 else torch.stack(parts).sum(0)


def _dense_rows(v: Tensor) -> Tensor | None:
    """`V` as a matrix of contiguous rows, for the layouts that convolutions use."""
    if v.is_contiguous():
        return v.flatten(1)
    last = v.movedim(1, -1)
    return last.flatten(1) if last.is_contiguous() else None


class OutOfRange(Exception):
    """A norm is too large or too small for the formulas of this file."""


def _is_in_range(n: Tensor) -> bool:
    """Whether all norms are; false for NaN."""
    least, most = NORM_RANGE[n.dtype]
    low, high = n.aminmax()
    return low.item() >= least and high.item() <= most


def _check_range(v: Tensor, n: Tensor) -> None:
    """Raises `OutOfRange` where it has to; on the CPU alone, where a look costs no wait."""
    if not v.is_cpu or not n.numel() or recorder(v) or _is_in_range(n):
        return
    dead = n.isinf()  # of norm zero, or too large
    live = n[~dead]
    if (live.numel() and not _is_in_range(live)) or torch.where(dead, v, 0.0).any():
        raise OutOfRange


def norms(v: Tensor, dim: int | None, eps: float, look: bool = False) -> Tensor:
    """`n`, with the shape of `g`; see the top of this file for a slice of norm zero.

    Raises:
        OutOfRange: `look` asks for it, and a norm is.
    """
    dtype = v.dtype
    if dtype is not torch.float32:
        dtype = scale_dtype(v)
    if dim == 0 and v.ndim == 2:
        if v.dtype is dtype:
            n = torch.linalg.vector_norm(v, 2, 1, True)
        else:
            n = torch.linalg.vector_norm(v, 2, 1, True, dtype=dtype)
    elif dim == 0 and v.ndim > 2 and v.numel() and (rows := _dense_rows(v)) is not None:
        n = torch.linalg.vector_norm(rows, 2, 1, dtype=dtype).view(kept_shape(v.shape, 0))
    elif dim is None and v.is_contiguous() and v.ndim > 1 and v.numel():
        # Rows first: one reduction over everything would keep to one accumulator.
        rows = torch.linalg.vector_norm(v.flatten(1), 2, 1, dtype=dtype)
        n = torch.linalg.vector_norm(rows)
    elif dim is not None and 0 < dim < v.ndim - 1 and v.numel() and v.is_contiguous():
        n = _interior_norms(v, dim, dtype).view(kept_shape(v.shape, dim))
    else:
        n = _slice_dots(v, v, dim, dtype).sqrt_()
    n = torch.threshold_(n, 0.0, INF) if eps == 0 else n.clamp_min_(eps)
    if look:
        _check_range(v, n)
    return n


def _interior_norms(v: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Of the rows behind `dim` first where they are long, else of a copy in which they are."""
    if v.stride(dim) >= LONG_ROW:
        rows = torch.linalg.vector_norm(v.flatten(dim + 1), 2, -1, dtype=dtype)
        return torch.linalg.vector_norm(rows.flatten(0, dim - 1), 2, 0)
    return torch.linalg.vector_norm(v.movedim(dim, 0).flatten(1), 2, 1, dtype=dtype)


def weight_norm(
    v: Tensor, g: Tensor, dim: int | None, eps: float, dtype: torch.dtype, look: bool = False
) -> tuple[Tensor, Tensor]:
    """`(W, n)`, `W` in `dtype` and in `V`'s memory layout; `look` as for `norms`."""
    fused = fused_weight_norm(v, g, dim, eps, dtype)
    if fused is not None:
        return fused
    n = norms(v, dim, eps, look)
    return _scaled_weight(v, _scale(g, n), dtype), n


def fused_weight_norm(
    v: Tensor, g: Tensor, dim: int | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """`(W, n)` by torch's own kernel, where it serves: differentiable, but once only.

    It makes NaN of a slice of norm zero, and its gradient divides by the norm's third power, so the
    norms have to be looked at.
    """
    if dtype is v.dtype and _fused_serves(v, g, dim, eps) and not recorder(v):
        assert dim is not None
        w, n = torch._weight_norm_interface(v, g, dim)
        if _is_in_range(n):
            return w, n
    return None


def _fused_serves(v: Tensor, g: Tensor, dim: int | None, eps: float) -> bool:
    return (
        (dim == 0 or dim == v.ndim - 1)
        and eps == 0
        and v.dtype is g.dtype
        and v.dtype in _FUSED_DTYPES
        and v.is_cpu
        and v.is_contiguous()
        and g.is_contiguous()
        and 0 < v.numel() <= FUSED_MAX
        and v.ndim > 1
    )


def _scale(g: Tensor, n: Tensor) -> Tensor:
    return g / n if g.dtype == n.dtype else g.to(n.dtype) / n


def _scaled_weight(v: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    w = v * s
    if w.dtype != s.dtype:  # a 0-d scale does not promote: multiply where the scale is kept
        w = v.to(s.dtype) * s
    return w if w.dtype == dtype else w.to(dtype)


def _dot_coefficient(s: Tensor, dg: Tensor, n: Tensor, eps: float) -> Tensor:
    """`c = s · dg / n`, zero where `n` was clamped: there the norm is a constant."""
    c = (s * dg).div_(n)
    return c.masked_fill_(n <= eps, 0.0) if eps > 0 else c


def weight_norm_backward(
    dw: Tensor,
    v: Tensor,
    g: Tensor,
    n: Tensor,
    dim: int | None,
    eps: float,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(dV, dg)` from `dW`, in the dtypes of `V` and `g`; in `V`'s layout, unless `dW` may be
    overwritten."""
    in_place = overwrite and v.numel() >= IN_PLACE_MIN
    if (
        not in_place
        and _fused_serves(v, g, dim, eps)
        and dw.dtype is v.dtype
        and dw.is_contiguous()
    ):
        return _fused_grad(dw, v, g, n, dim)
    dv = dw.to(n.dtype) if overwrite else torch.empty_like(v, dtype=n.dtype).copy_(dw)
    dg = _finish_weight_grad_(dv, v, g, n, dim, eps)
    return dv.to(v.dtype), dg


def _finish_weight_grad_(
    dw: Tensor, v: Tensor, g: Tensor, n: Tensor, dim: int | None, eps: float
) -> Tensor:
    """Turns `dW`, in place, into `dV = s ⊙ dW - c ⊙ V`; returns `dg`."""
    s = _scale(g, n)
    if dim == 0 and dw.numel():  # a slice is a row: its dot and its update meet in cache
        dims = reduced_dims(v.ndim, 0)
        dgs = []
        for dw_rows, v_rows, s_rows, n_rows in _blocks(dw, v, s, n):
            v_rows = v_rows.to(dw.dtype)
            product = dw_rows * v_rows
            a = product.sum(dims, keepdim=True) if dims else product
            dg = a.div_(n_rows)
            c = _dot_coefficient(s_rows, dg, n_rows, eps)
            dw_rows.mul_(s_rows).addcmul_(v_rows, c, value=-1)
            dgs.append(dg)
        dg = torch.cat(dgs)
    else:
        dg = _slice_dots(dw, v, dim, n.dtype).div_(n)
        c = _dot_coefficient(s, dg, n, eps)
        if dw.ndim == 0 or not dw.numel():
            dw.mul_(s).addcmul_(v.to(dw.dtype), c, value=-1)
        else:
            for dw_rows, v_rows in _blocks(dw, v):
                dw_rows.mul_(s).addcmul_(v_rows.to(dw.dtype), c, value=-1)
    return dg.to(g.dtype)


# --- linear ------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dim: int | None,
    eps: float,
    variant: str,
    keep_product: bool,
    look: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, n, product)` for `x` of shape `(M, K)`; `look` as for `norms`.

    `product` is the unscaled `x Vᵀ` where `keep_product` asks for it and the variant forms it
    (scaled, dim=0): `M·N` numbers that save the backward a pass over the weights.
    """
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if variant == "materialize":
        w, n = weight_norm(v, g, dim, eps, x.dtype, look)
        return F.linear(x, w, bias), n, None
    n = norms(v, dim, eps, look)
    s = _scale(g, n)
    if dim == 1:
        return F.linear(x * s, v, bias), n, None

    if dim == 0:
        s = s.view(-1)
    # MKL is up to twice as fast with `V` on the left, for a few rows; the epilogue transposes the
    # product on its way out.
    product = torch.mm(v, x.t()).t() if 1 < len(x) < LEFT_ROWS else torch.mm(x, v.t())
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
    dim: int | None,
    eps: float,
    variant: str,
    needs: Needs,
) -> Grads:
    """`(dX, dV, dg, db)`, `None` where `needs` says so; `dY` is `(M, N)`, `x` is `(M, K)`."""
    needs_x, needs_v, needs_g, needs_bias = needs
    needs_weight = needs_v or needs_g
    dx = dv = dg = None
    db = dy.sum(0) if needs_bias else None
    s = _scale(g, n)

    if variant == "materialize":
        if needs_x:
            dx = torch.mm(dy, _scaled_weight(v, s, x.dtype))
    elif dim == 0:
        scaled_dy = dy * s.view(-1)
        if needs_x:
            dx = torch.mm(scaled_dy, v)
        if needs_weight and product is not None:
            dg = (dy * product).sum(0).view_as(n).div_(n)
            dv = _scaled_grad(scaled_dy, x, v, s, dg, n, eps) if needs_v else None
    elif needs_x:
        unscaled = torch.mm(dy, v)
        if needs_weight:
            a = x * unscaled
            dg = (a.sum(0, keepdim=True) if dim == 1 else a.sum()).div_(n)
            dv = _scaled_grad(dy, x * s, v, s, dg, n, eps) if needs_v else None
        dx = unscaled.mul_(s)

    if needs_weight and dg is None:
        dv, dg = weight_norm_backward(torch.mm(dy.t(), x), v, g, n, dim, eps, overwrite=True)
    if dv is not None and dv.dtype != v.dtype:
        dv = dv.to(v.dtype)
    if dg is not None and dg.dtype != g.dtype:
        dg = dg.to(g.dtype)
    return dx, dv, dg, db


def _scaled_grad(
    lhs: Tensor, rhs: Tensor, v: Tensor, s: Tensor, dg: Tensor, n: Tensor, eps: float
) -> Tensor:
    """`dV = lhsᵀ rhs - c ⊙ V`, where either factor carries the scale already."""
    dv = torch.mul(v, _dot_coefficient(s, dg, n, eps).neg_())
    return dv.addr_(lhs[0], rhs[0]) if len(lhs) == 1 else dv.addmm_(lhs.t(), rhs)


# --- convolution -------------------------------------------------------------------------------


def convolution(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    conv: Geometry,
    dim: int | None,
    eps: float,
    variant: str,
    look: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(y, n)` for `x` of shape `(B, C, *sizes)`; `look` as for `norms`."""
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if variant == "materialize":
        w, n = weight_norm(v, g, dim, eps, x.dtype, look)
        return vendor.convolution(x, w, bias, conv), n
    n = norms(v, dim, eps, look)
    s = conv.per_channel(_scale(g, n), dim, x.ndim)
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
    dim: int | None,
    eps: float,
    variant: str,
    needs: Needs,
) -> Grads:
    """`(dX, dV, dg, db)`, `None` where `needs` says so."""
    needs_x, needs_v, needs_g, needs_bias = needs
    needs_weight = needs_v or needs_g
    s = _scale(g, n)
    if variant == "input" and needs_x and needs_weight:
        # With its input scaled, one call gives dX before its scale and s ⊙ dW.
        s_x = conv.per_channel(s, dim, x.ndim)
        dx, dv, db = convolution_grads(dy, x * s_x, v, conv, True, True, needs_bias)
        wide_dg = _channel_dots(x, dx, conv, dim).view_as(n).div_(n)
        dv.addcmul_(v, _dot_coefficient(s, wide_dg, n, eps), value=-1)
        return dx.mul_(s_x), dv, wide_dg.to(g.dtype), db

    dx = dv = None
    dg: Tensor | None = None
    if needs_x:
        if variant == "materialize":  # W is gone before dW takes its memory
            w = _scaled_weight(v, s, x.dtype)
            dx, _, _ = convolution_grads(dy, x, w, conv, True, False, False)
            del w
        elif variant == "output":
            scaled_dy = dy * conv.per_channel(s, dim, x.ndim)
            dx, _, _ = convolution_grads(scaled_dy, x, v, conv, True, False, False)
        else:
            dx, _, _ = convolution_grads(dy, x, v, conv, True, False, False)
            dx.mul_(conv.per_channel(s, dim, x.ndim))
    _, dw, db = convolution_grads(dy, x, v.to(x.dtype), conv, False, needs_weight, needs_bias)
    if needs_weight:
        dv, dg = weight_norm_backward(dw, v, g, n, dim, eps, overwrite=True)
    return dx, dv, dg, db


def convolution_grads(
    dy: Tensor, x: Tensor, w: Tensor, conv: Geometry, *needs: bool
) -> tuple[Any, Any, Any]:
    """`(dX, dW, db)` of the plain convolution of `x` with `w`, `None` where `needs` says so."""
    needs_x, needs_weight, needs_bias = needs
    db = None
    # Alone, ATen would compute the weight's gradient beside it; in float16, it sums in float16.
    if needs_bias and (not needs_weight or dy.element_size() == 2):
        db = dy.sum([i for i in range(dy.ndim) if i != 1])
    if not (needs_x or needs_weight):
        return None, None, db
    mask = (needs_x, needs_weight, needs_bias and db is None)
    dx, dw, bias_grad = vendor.convolution_backward(dy, x, w, conv, mask)
    return dx, dw, bias_grad if db is None else db


def _channel_dots(x: Tensor, dx: Tensor, conv: Geometry, dim: int | None) -> Tensor:
    """`a = ⟨dW, V⟩` of the slices along the input channels, from `dX` before its scale."""
    dots = x * dx
    if dim is None:
        return dots.sum()
    dots = dots.sum([i for i in range(x.ndim) if i != 1])
    return dots.view(conv.groups, -1).sum(0) if dim == 1 else dots


# --- the signature that all backends share -------------------------------------------------------


def layer(
    call: Call, plan: Any, tensors: Operands, keep: bool, look: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, n, kept)` as `plan` says: the output, which is `W` where there is no `x`, the norms, and
    what a linear layer saves for the backward where `keep` allows it. Its `x` is 2-d."""
    x, v, g, bias = tensors
    if x is None:
        return *weight_norm(v, g, call.dim, call.eps, call.x_dtype, look), None
    options = call.dim, call.eps, plan.forward
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
    """`(dX, dV, dg, db)`, `None` where `needs` says so and no other output brings it along."""
    x, v, g, _ = tensors
    if x is None:
        return None, *weight_norm_backward(dy, v, g, n, call.dim, call.eps), None
    options = call.dim, call.eps, plan.backward, needs
    if call.conv is not None:
        return convolution_backward(dy, x, v, g, n, call.conv, *options)
    return linear_backward(dy, x, v, g, n, kept, *options)
